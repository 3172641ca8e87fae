"""Token losses on vocabulary-parallel logits. Needs torch only; knows no trainer and no model.

reference.py says what is right, chunk.py how it is computed on shards, dense.py and fused_head.py
from what (logits, hidden states), reduce.py with which weights tokens are summed.
"""

from megaopd.losses.dense import vocab_parallel_divergence, vocab_parallel_log_prob
from megaopd.losses.fused_head import (
    FusedLoss,
    fused_linear_cross_entropy,
    fused_linear_divergence,
    fused_linear_log_prob,
)
from megaopd.losses.reduce import LOSS_AGG, loss_weights

__all__ = [
    "LOSS_AGG",
    "FusedLoss",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "fused_linear_log_prob",
    "loss_weights",
    "vocab_parallel_divergence",
    "vocab_parallel_log_prob",
]
