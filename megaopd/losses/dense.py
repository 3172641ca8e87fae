"""Losses on vocabulary-sharded logits that the caller holds.

For training prefer fused_head.py, which never holds the logits of all tokens. The gradient per unit
of upstream is made in forward, chunk by chunk, kept in the logits' dtype, and multiplied by the
upstream in backward, which communicates nothing.

Shapes: T tokens, Vp = V/TP local ids.
"""

from typing import Any

import torch
from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.chunk import Batch, Listed
from megaopd.losses.engine import Engine, make_engine
from megaopd.losses.terms import CrossEntropy, Target, Term, divergence_term
from megaopd.losses.vocab_parallel import Group, Shard

FLOOR = -1e15  # what a logit of -inf is read as: probability 0, and no inf - inf


def vocab_parallel_divergence(
    student_logits_TVp: Tensor,
    teacher_logits_TVp: Tensor,
    *,
    kind: str,
    support: str | None = None,
    k: int | None = None,
    variant: str | None = None,
    temperature: float = 1.0,
    beta: float | None = None,
    alpha: float | None = None,
    target: Target | None = None,
    base_logits_TVp: Tensor | None = None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    group: Group = None,
    chunk_size: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Per-token divergence of student p = softmax(z_s/tau) from teacher q = softmax(z_t/tau).

    kind, support, variant and their defaults: terms.Divergence and docs/losses.md. For instance
    rkl: tau^2 KL(p||q), d/dz = tau p (log p - log q - KL(p||q)).  fkl: tau^2 KL(q||p),
    d/dz = tau (p - q). The teacher is detached. Ids >= vocab_size have probability 0 in both;
    -inf is read as -1e15. `k` with support="full" and return_stats is the list of the diagnostics.

    Returns loss [T] in fp32 (fp64 for fp64 logits), the same on every rank of `group`; with
    return_stats also a dict of detached [T]: student_entropy, teacher_entropy, with labels [T]
    student_log_prob and teacher_log_prob, and with a list mass_student, mass_teacher, bucket_kl,
    overlap and teacher_rank (all at the temperature). A label outside the vocabulary gives an
    arbitrary finite log-prob: give it weight 0.

    Collectives per chunk of rows: one all-gather of scalars (rkl: 20 B a token and rank in fp32);
    general f: one SUM of two scalars more; a list: one all-gather more, 12 k bytes a token and rank
    (24 k for intersection and with return_stats, which look at both lists). None in backward.
    Raises UserError for a combination that does not exist.
    """
    term, stats_k = divergence_term(
        return_stats, k, kind=kind, support=support, variant=variant,
        temperature=temperature, alpha=alpha, beta=beta, target=target or Target(),
    )  # fmt: skip
    for name, x in (("teacher", teacher_logits_TVp), ("base", base_logits_TVp)):
        if x is not None and student_logits_TVp.shape != x.shape:
            raise UserError(
                f"{name} logits {list(x.shape)}",
                expected=f"the student's shape {list(student_logits_TVp.shape)}",
                fix=f"load the {name}'s output layer on the student's vocabulary partition",
            )
    loss, stats = _apply(
        term, student_logits_TVp, teacher_logits_TVp, base_logits_TVp, labels,
        group, vocab_size, chunk_size, return_stats, stats_k,
    )  # fmt: skip
    return (loss, stats) if return_stats else loss


def vocab_parallel_log_prob(
    logits_TVp: Tensor,
    ids_T: Tensor,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log softmax(z/tau)[id] for each token: [T], the same on every rank of `group`.

    d/dz = (e_id - p) / tau, with e_id on the rank that owns the id. Differentiable in the logits:
    sampled_loss takes it from here.
    Collectives: one all-gather per chunk (12 B a token and rank in fp32), none in backward.
    """
    term = CrossEntropy(temperature=temperature)
    return -_apply(term, logits_TVp, None, None, ids_T, group, vocab_size, None, False, None)[0]


def _apply(
    term: Term,
    student: Tensor,
    teacher: Tensor | None,
    base: Tensor | None,
    labels: Tensor | None,
    group: Group,
    vocab_size: int | None,
    chunk_size: int | None,
    stats: bool,
    stats_k: int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    engine = make_engine(
        [term],
        Shard.of(student.shape[-1], group, vocab_size),
        softcaps=(None, None, None),
        chunk_size=chunk_size,
        stats=stats,
        stats_k=stats_k,
        has_teacher=teacher is not None,
        has_base=base is not None,
        has_labels=labels is not None,
        vocab_size=vocab_size,
        like=student,
    )
    if labels is not None and labels.shape != student.shape[:1]:
        raise UserError(
            f"labels of shape {list(labels.shape)}", expected=f"[{student.shape[0]}], one a row"
        )
    want_grad = torch.is_grad_enabled() and student.requires_grad
    holder: dict[str, Tensor] = {}
    others = [None if x is None else x.detach() for x in (teacher, base)]
    loss = _VocabParallelLoss.apply(student, *others, labels, engine, want_grad, holder)
    return loss, holder


class _VocabParallelLoss(torch.autograd.Function):
    """Keeps the unit gradient in the logits' dtype; backward is one multiplication a row."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        base: Tensor | None,
        labels: Tensor | None,
        engine: Engine,
        want_grad: bool,
        stats: dict[str, Tensor],
    ) -> Tensor:
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        dtype = engine.logits_dtype(student)
        tokens = student.shape[0]
        loss = torch.empty(tokens, dtype=wide, device=student.device)
        grad = torch.zeros_like(student) if want_grad else None
        for a in range(0, tokens, engine.chunk_size):
            rows = slice(a, min(a + engine.chunk_size, tokens))
            laws = [_load(x, rows, engine.shard, dtype) for x in (student, teacher, base)]
            batch = Batch(None if labels is None else labels[rows])
            ones = loss.new_ones(1, rows.stop - a)
            values, found, dz, scale = engine.run(*laws, batch, ones, want_grad)  # pyright: ignore
            loss[rows] = values[0]
            for name, value in found.items():
                stats.setdefault(name, torch.empty_like(loss))[rows] = value
            if grad is not None and dz is not None:
                dz = dz.dense(engine.shard.valid) if isinstance(dz, Listed) else dz
                dz = dz if scale is None else dz.mul_(scale[:, None])
                grad[rows, : engine.shard.valid] = dz
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        scaled = None if grad is None else (grad * grads[0][:, None]).to(grad.dtype)
        return (scaled, *(None,) * 6)


def _load(x: Tensor | None, rows: slice, shard: Shard, dtype: torch.dtype) -> Tensor | None:
    """A chunk's logits without padding, copied to the arithmetic's precision; -inf -> FLOOR."""
    if x is None:
        return None
    part = x[rows, : shard.valid]
    return part.to(dtype, copy=True, memory_format=torch.contiguous_format).clamp_min_(FLOOR)
