"""Token losses on vocabulary-parallel logits. Needs torch only; knows no trainer and no model.

What is right is in reference.py; which losses exist, in terms.py and divergences.py. A chunk of
logits goes through engine.py -> chunk.py (communication) -> blocks.py or kernels/ (all numbers of
the vocabulary); dense.py and fused_head.py are the entrances for given logits and for hidden
states. remote.py is a teacher elsewhere, known by log-probs of a few tokens. sampled.py,
importance.py and sinkhorn.py hold what lives on sampled tokens or whole chunks, reduce.py the
weights with which tokens are summed. docs/losses.md says which loss to choose.
"""

from megaopd.losses.dense import vocab_parallel_divergence, vocab_parallel_log_prob
from megaopd.losses.fused_head import (
    FusedLoss,
    Objective,
    OutputLayer,
    fused_linear_cross_entropy,
    fused_linear_divergence,
    fused_linear_log_prob,
    fused_linear_objectives,
)
from megaopd.losses.importance import tis_weights, vopd_baseline
from megaopd.losses.reduce import LOSS_AGG, loss_weights
from megaopd.losses.remote import ListedTeacher
from megaopd.losses.sampled import sampled_loss, sampled_terms
from megaopd.losses.sinkhorn import sinkhorn_divergence
from megaopd.losses.terms import CrossEntropy, Divergence, Entropy, Sampled, Sinkhorn, Target
from megaopd.losses.topk import vocab_parallel_topk

__all__ = [
    "LOSS_AGG",
    "CrossEntropy",
    "Divergence",
    "Entropy",
    "FusedLoss",
    "ListedTeacher",
    "Objective",
    "OutputLayer",
    "Sampled",
    "Sinkhorn",
    "Target",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "fused_linear_log_prob",
    "fused_linear_objectives",
    "loss_weights",
    "sampled_loss",
    "sampled_terms",
    "sinkhorn_divergence",
    "tis_weights",
    "vocab_parallel_divergence",
    "vocab_parallel_log_prob",
    "vocab_parallel_topk",
    "vopd_baseline",
]
