"""The dense truth: every loss on full logits, in plain torch autograd, at its input's precision.

Nothing here is fast. Each sharded or chunked path is tested against these functions in fp64.
Ids >= vocab_size are padding: they are sliced off, which is what a logit of -inf does in both
models, without the NaN of (-inf) - (-inf).

Shapes: logits [..., V], labels [...], every result [...].
"""

import torch
from torch import Tensor


def log_probs(logits_V: Tensor, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """log softmax(z / temperature) over the ids below vocab_size."""
    return torch.log_softmax(logits_V[..., :vocab_size] / temperature, dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p (log p - log q), where p = 0 contributes 0 and no NaN gradient."""
    p = log_p.exp()
    ratio = torch.where(p == 0, 0.0, log_p) - torch.where(p == 0, 0.0, log_q)
    return (p * ratio).sum(-1)


def rkl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, vocab_size: int | None = None
) -> Tensor:
    """KL(p || q) * temperature^2; d/dz_v = p_v (log p_v - log q_v - KL) at temperature 1."""
    log_p = log_probs(student, temperature, vocab_size)
    log_q = log_probs(teacher.detach(), temperature, vocab_size)
    return _kl(log_p, log_q) * temperature**2


def fkl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, vocab_size: int | None = None
) -> Tensor:
    """KL(q || p) * temperature^2; d/dz_v = p_v - q_v at temperature 1."""
    log_p = log_probs(student, temperature, vocab_size)
    log_q = log_probs(teacher.detach(), temperature, vocab_size)
    return _kl(log_q, log_p) * temperature**2


def cross_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, vocab_size: int | None = None
) -> Tensor:
    """-log p(label); no temperature^2, so that it stays minus the log-prob under that law."""
    return -log_probs(logits, temperature, vocab_size).gather(-1, labels[..., None])[..., 0]


def entropy(logits: Tensor, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """-sum_v p_v log p_v."""
    log_p = log_probs(logits, temperature, vocab_size)
    return _kl(log_p, torch.zeros_like(log_p)).neg()


DIVERGENCES = {"rkl": rkl, "fkl": fkl}
