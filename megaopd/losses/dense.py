"""Losses on vocabulary-sharded logits that the caller holds.

For training prefer fused_head.py, which never holds the logits of all tokens. The gradient is
recomputed from the logits in backward, chunk by chunk, and communicates nothing.

Shapes: T tokens, Vp = V/TP local ids.
"""

from typing import Any

import torch
from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.chunk import (
    CROSS_ENTROPY,
    Plan,
    choose_stats,
    chunk_gradient_,
    chunk_moments,
    chunk_stats,
    divergence_kind,
    make_plan,
    scale_logits_,
)
from megaopd.losses.vocab_parallel import Group, Shard


def vocab_parallel_divergence(
    student_logits_TVp: Tensor,
    teacher_logits_TVp: Tensor,
    *,
    kind: str,
    support: str = "full",
    k: int | None = None,
    variant: str | None = None,
    temperature: float = 1.0,
    beta: float | None = None,
    alpha: float | None = None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    group: Group = None,
    chunk_size: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Per-token divergence of student p = softmax(z_s/tau) from teacher q = softmax(z_t/tau).

    rkl: tau^2 KL(p||q), d/dz = tau p (log p - log q - KL(p||q)).  fkl: tau^2 KL(q||p),
    d/dz = tau (p - q). The teacher is detached. Ids >= vocab_size have probability 0 in both.
    A token with q = 0 and p > 0 makes rkl infinite, as it is; q = 0 in fkl contributes 0.

    Returns loss [T] in fp32 (fp64 for fp64 logits), the same on every rank of `group`; with
    return_stats also a dict of detached [T]: student_entropy, teacher_entropy and, with labels [T],
    student_log_prob, teacher_log_prob (at the temperature). A label outside the vocabulary gives an
    arbitrary finite log-prob: give it weight 0.

    Collectives: one MAX and one SUM per chunk of rows (20 to 36 B/token), none in backward.
    Raises UserError for a kind, support or option that does not exist.
    Source: rkl as in on-policy distillation (arXiv 2605.11182), fkl as in classic distillation.
    """
    spec = divergence_kind(kind, support)
    for name, value in (("k", k), ("variant", variant), ("beta", beta), ("alpha", alpha)):
        if value is not None:
            raise UserError(
                f"{name}={value!r} with kind={kind!r}, support={support!r}",
                expected=f"no {name}: full-vocabulary rkl and fkl have no such option",
                fix=f"remove {name}",
            )
    if student_logits_TVp.shape != teacher_logits_TVp.shape:
        raise UserError(
            f"teacher logits {list(teacher_logits_TVp.shape)}",
            expected=f"the student's shape {list(student_logits_TVp.shape)}",
            fix="load the teacher's output layer on the student's vocabulary partition",
        )
    plan = make_plan(
        spec,
        Shard.of(student_logits_TVp.shape[-1], group, vocab_size),
        temperature=temperature,
        stats=choose_stats(return_stats, True, labels is not None),
        chunk_size=chunk_size,
    )
    loss, stats = _VocabParallelLoss.apply(
        student_logits_TVp, teacher_logits_TVp.detach(), labels, plan
    )
    return (loss, dict(zip(plan.stats, stats, strict=True))) if return_stats else loss


def vocab_parallel_log_prob(
    logits_TVp: Tensor,
    ids_T: Tensor,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log softmax(z/tau)[id] for each token: [T], the same on every rank of `group`.

    d/dz = (e_id - p) / tau, with e_id on the rank that owns the id. Differentiable in the logits.
    Collectives: one MAX and one SUM per chunk (12 B/token in fp32), none in backward.
    """
    shard = Shard.of(logits_TVp.shape[-1], group, vocab_size)
    plan = make_plan(CROSS_ENTROPY, shard, temperature=temperature)
    nll, _ = _VocabParallelLoss.apply(logits_TVp, None, ids_T, plan)
    return -nll


class _VocabParallelLoss(torch.autograd.Function):
    """Saves the logits as they came and a few scalars a token; backward is local."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, labels: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        names = ("m_s", *(("m_t",) if plan.needs_teacher else ()), *plan.moment_names)
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        scalars = torch.empty(len(names), student.shape[0], dtype=dtype, device=student.device)
        loss = torch.empty_like(scalars[0])
        stats = scalars.new_empty(len(plan.stats), student.shape[0])
        for rows in _chunks(student.shape[0], plan.chunk_size):
            s, t, y = _load(student, teacher, labels, rows, plan)
            moments = chunk_moments(s, t, y, plan)
            loss[rows] = plan.loss_of(moments)
            stats[:, rows] = chunk_stats(moments, plan)
            scalars[:, rows] = torch.stack([moments[name] for name in names])
        ctx.save_for_backward(student, teacher, labels, scalars)
        ctx.plan, ctx.names = plan, names
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        student, teacher, labels, scalars = ctx.saved_tensors
        plan: Plan = ctx.plan
        grad = torch.empty_like(student)
        grad[:, plan.shard.valid :] = 0
        for rows in _chunks(student.shape[0], plan.chunk_size):
            s, t, y = _load(student, teacher, labels, rows, plan)
            moments = dict(zip(ctx.names, scalars[:, rows], strict=True))
            chunk_gradient_(s, t, y, moments, grads[0][rows], plan)
            grad[rows, : plan.shard.valid] = s
        return grad, None, None, None


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(a, min(a + size, tokens)) for a in range(0, tokens, size)]


def _load(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, rows: slice, plan: Plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A chunk's logits without padding, copied to the arithmetic's precision and scaled."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32

    def one(logits: Tensor) -> Tensor:
        return scale_logits_(logits[rows, : plan.shard.valid].to(dtype, copy=True), plan)

    return (
        one(student),
        one(teacher) if teacher is not None and plan.needs_teacher else None,
        None if labels is None else labels[rows],
    )
