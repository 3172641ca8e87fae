"""Losses at the output layer: hidden states in, scalar out, one chunk of logits at a time.

The student's and the teacher's vocabulary-sharded output layers are applied to a chunk of rows,
the chunk's loss and its gradient in the logits are computed in place (chunk.py), and the gradients
of hidden states and weight are accumulated at once, in forward. Backward multiplies them by the
upstream scalar and communicates nothing. Logits memory: [C, Vp] for the student and for the
teacher, plus the row blocks of chunk.py; nothing grows with T but hidden states and a few scalars
a token.

Arithmetic: matrix products in the weight's dtype, everything else in fp32 (fp64 for fp64 weights);
the weight gradient is accumulated in fp32.

Sequence parallel: rank r holds rows [r*T/R, (r+1)*T/R) of hidden states. A chunk takes C/R rows of
every rank (all-gather), its hidden gradient goes back to them (reduce-scatter), token weights and
labels are permuted alike; nothing gathers all T.

Shapes: T tokens, C rows of a chunk, R tensor-parallel ranks, H and Ht hidden, Vp = V/R local ids.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.chunk import (
    CROSS_ENTROPY,
    DEFAULT_CHUNK,
    Kind,
    Plan,
    choose_stats,
    chunk_gradient_,
    chunk_moments,
    chunk_stats,
    divergence_kind,
    make_plan,
    scale_logits_,
)
from megaopd.losses.vocab_parallel import (
    Group,
    Shard,
    all_gather_rows,
    all_reduce_sum_,
    group_size,
    reduce_scatter_rows,
)


@dataclass(frozen=True)
class FusedLoss:
    """loss: scalar, carries the gradient. per_token [T] and stats (name -> [T]): detached.

    All three are complete and the same on every tensor-parallel rank, in full-sequence order.
    """

    loss: Tensor
    per_token: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


def fused_linear_divergence(
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    teacher_hidden_THt: Tensor,
    teacher_weight_VpHt: Tensor,
    *,
    token_weights: Tensor,
    kind: str,
    support: str = "full",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    group: Group = None,
    chunk_size: int = DEFAULT_CHUNK,
    sequence_parallel: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
    return_stats: bool = False,
) -> FusedLoss:
    """sum_t w_t L_t of student p = softmax(f(h W')/tau) from teacher q = softmax(f(h_t W_t')/tau).

    rkl: L = tau^2 KL(p||q), dL/dz = tau p (log p - log q - KL(p||q)).  fkl: L = tau^2 KL(q||p),
    dL/dz = tau (p - q).  f is the identity, or softcap*tanh(z/softcap) for both models.
    token_weights [T] hold mask, importance weight and denominator; rows of weight 0 add nothing.

    Gradients: hidden (summed over `group`; with sequence_parallel its own rows) and weight. The
    teacher and token_weights get none. return_stats adds student_entropy, teacher_entropy and, with
    labels [T], student_log_prob, teacher_log_prob, all at the temperature.

    Collectives per chunk: one MAX and one SUM of packed scalars (20 B/token for the loss alone, 36
    with statistics and labels, in fp32). Hidden gradient: one all-reduce of [T, H]; with
    sequence_parallel, per chunk, all-gathers of the hidden states and a reduce-scatter.
    token_weights and labels have T rows in both cases, hidden states T/R with sequence_parallel.

    Raises UserError for a kind or support that does not exist, shapes that disagree, and a bias.
    Source: dense vocabulary-parallel divergence of on-policy distillation (arXiv 2605.11182).
    """
    spec = divergence_kind(kind, support)
    if teacher_weight_VpHt.shape[0] != weight_VpH.shape[0]:
        raise UserError(
            f"the teacher's output layer has {teacher_weight_VpHt.shape[0]} ids on this rank",
            expected=f"{weight_VpH.shape[0]}, as the student's",
            fix="load the teacher's output layer on the student's vocabulary partition",
        )
    return _fused(
        spec,
        hidden_TH,
        weight_VpH,
        teacher_hidden_THt.detach(),
        teacher_weight_VpHt.detach(),
        token_weights=token_weights,
        labels=labels,
        temperature=temperature,
        vocab_size=vocab_size,
        group=group,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        softcap=softcap,
        bias=bias,
        return_stats=return_stats,
    )


def fused_linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    labels_T: Tensor,
    *,
    token_weights: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: Group = None,
    chunk_size: int = DEFAULT_CHUNK,
    sequence_parallel: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
    return_stats: bool = False,
) -> FusedLoss:
    """sum_t -w_t log p(label_t): supervised fine-tuning. dL/dz = (p - e_label) / tau.

    A label outside the vocabulary (an ignore index) gives an arbitrary finite per-token value: its
    weight must be 0. No temperature^2. return_stats adds student_log_prob and student_entropy.
    Collectives per chunk: one MAX and one SUM (12 B/token in fp32; 16 with statistics); hidden
    states as in fused_linear_divergence.
    """
    return _fused(
        CROSS_ENTROPY,
        hidden_TH,
        weight_VpH,
        None,
        None,
        token_weights=token_weights,
        labels=labels_T,
        temperature=temperature,
        vocab_size=vocab_size,
        group=group,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        softcap=softcap,
        bias=bias,
        return_stats=return_stats,
    )


def fused_linear_log_prob(
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    ids_T: Tensor,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_size: int = DEFAULT_CHUNK,
    sequence_parallel: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """log p(id_t) of each token, [T], without gradient, for scoring; the same on every rank.

    Collectives per chunk: one MAX and one SUM (12 B/token in fp32).
    """
    with torch.no_grad():
        scored = fused_linear_cross_entropy(
            hidden_TH,
            weight_VpH,
            ids_T,
            token_weights=torch.zeros(ids_T.shape, device=hidden_TH.device),
            temperature=temperature,
            vocab_size=vocab_size,
            group=group,
            chunk_size=chunk_size,
            sequence_parallel=sequence_parallel,
            softcap=softcap,
        )
    return -scored.per_token


def _fused(
    kind: Kind,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    *,
    token_weights: Tensor,
    labels: Tensor | None,
    temperature: float,
    vocab_size: int | None,
    group: Group,
    chunk_size: int,
    sequence_parallel: bool,
    softcap: float | None,
    bias: Tensor | None,
    return_stats: bool,
) -> FusedLoss:
    if bias is not None:
        raise UserError("an output layer with a bias", expected="none", fix="fold or drop the bias")
    ranks = group_size(group) if sequence_parallel else 1
    _check_rows("token_weights", token_weights, hidden.shape[0] * ranks, ranks)
    if labels is not None:
        _check_rows("labels", labels, hidden.shape[0] * ranks, ranks)
    if teacher_hidden is not None:
        _check_rows("teacher_hidden", teacher_hidden, hidden.shape[0], ranks)
    plan = make_plan(
        kind,
        Shard.of(weight.shape[0], group, vocab_size),
        temperature=temperature,
        softcap=softcap,
        stats=choose_stats(return_stats, kind.uses_teacher, labels is not None),
        chunk_size=chunk_size,
    )
    want_grad = torch.is_grad_enabled()  # always off inside an autograd.Function, so asked here
    layout = _Layout(plan, ranks, want_grad)
    loss, per_token, stats = _FusedHead.apply(
        hidden, weight, teacher_hidden, teacher_weight, token_weights.detach(), labels, layout
    )
    return FusedLoss(loss, per_token, dict(zip(plan.stats, stats, strict=True)))


def _check_rows(name: str, x: Tensor, rows: int, ranks: int) -> None:
    if x.shape[0] != rows:
        raise UserError(
            f"{name} has {x.shape[0]} rows",
            expected=f"{rows}, from the hidden states" + (f" x {ranks} ranks" * (ranks > 1)),
            fix="token_weights and labels take the full sequence, hidden states this rank's part",
        )


@dataclass(frozen=True)
class _Layout:
    """How rows of full-sequence vectors and of this rank's hidden states make up chunks.

    Seen as [ranks, T/ranks], a chunk is a range of columns: all of one row without sequence
    parallel, the same slice of every rank's rows with it. One spelling serves both.
    """

    plan: Plan
    ranks: int
    want_grad: bool

    def chunks(self, local_rows: int) -> list[slice]:
        step = max(1, self.plan.chunk_size // self.ranks)
        return [slice(a, min(a + step, local_rows)) for a in range(0, local_rows, step)]

    def take(self, full: Tensor, rows: slice) -> Tensor:
        return full.reshape(self.ranks, -1)[:, rows].reshape(-1)

    def put(self, full: Tensor, rows: slice, chunk: Tensor) -> None:
        """full [..., T], chunk [..., C]."""
        width = rows.stop - rows.start
        view = full.view(*full.shape[:-1], self.ranks, full.shape[-1] // self.ranks)
        view[..., rows] = chunk.view(*chunk.shape[:-1], self.ranks, width)

    def gather(self, local: Tensor, rows: slice) -> Tensor:
        return (
            all_gather_rows(local[rows], self.plan.shard.group) if self.ranks > 1 else local[rows]
        )


class _Head:
    """One model's output layer: logits of a chunk in a buffer that is made once."""

    def __init__(self, weight: Tensor, plan: Plan, rows: int, dtype: torch.dtype) -> None:
        self.weight = weight[: plan.shard.valid]
        self.plan = plan
        self.buffer = torch.empty(rows, plan.shard.valid, dtype=dtype, device=weight.device)

    def logits(self, hidden_CH: Tensor) -> Tensor:
        out = self.buffer[: hidden_CH.shape[0]]
        hidden_CH = hidden_CH.to(self.weight.dtype)
        if self.weight.dtype == out.dtype:
            torch.mm(hidden_CH, self.weight.t(), out=out)
        else:
            out.copy_(hidden_CH @ self.weight.t())
        return scale_logits_(out, self.plan)


class _Gradients:
    """Gradients of hidden states and weight, accumulated chunk by chunk; None where not needed."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, layout: _Layout, need: tuple[bool, bool]
    ) -> None:
        self.layout, self.source = layout, weight[: layout.plan.shard.valid]
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.hidden = torch.empty_like(hidden) if need[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if need[1] else None

    def add(self, dlogits: Tensor, hidden_CH: Tensor, rows: slice) -> None:
        group, weight = self.layout.plan.shard.group, self.source
        dlogits = dlogits.to(weight.dtype)
        if self.hidden is not None:
            grad = dlogits @ weight
            self.hidden[rows] = reduce_scatter_rows(grad, group) if self.layout.ranks > 1 else grad
        if self.weight is not None:
            own = self.weight[: weight.shape[0]]
            hidden_CH = hidden_CH.to(weight.dtype)
            if own.dtype == weight.dtype:
                own.addmm_(dlogits.t(), hidden_CH)
            else:
                own.add_(dlogits.t() @ hidden_CH)

    def finish(self) -> None:
        if self.hidden is not None and self.layout.ranks == 1:
            all_reduce_sum_(self.hidden, self.layout.plan.shard.group)


class _FusedHead(torch.autograd.Function):
    """Loss and gradients in forward; backward is a multiplication by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        token_weights: Tensor,
        labels: Tensor | None,
        layout: _Layout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan, chunks = layout.plan, layout.chunks(hidden.shape[0])
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        token_weights = token_weights.to(wide)
        rows = layout.ranks * max((c.stop - c.start for c in chunks), default=0)
        student = _Head(weight, plan, rows, wide)
        teacher = None
        if teacher_weight is not None and plan.needs_teacher:
            teacher = _Head(teacher_weight, plan, rows, wide)
        need = tuple(layout.want_grad and n for n in ctx.needs_input_grad[:2])
        grads = _Gradients(hidden, weight, layout, (need[0], need[1]))
        per_token = torch.empty_like(token_weights)
        stats = per_token.new_empty(len(plan.stats), per_token.shape[0])
        for c in chunks:
            h = layout.gather(hidden, c)
            s, t = student.logits(h), None
            if teacher is not None and teacher_hidden is not None:
                t = teacher.logits(layout.gather(teacher_hidden, c))
            y = None if labels is None else layout.take(labels, c)
            moments = chunk_moments(s, t, y, plan)
            layout.put(per_token, c, plan.loss_of(moments))
            layout.put(stats, c, chunk_stats(moments, plan))
            if any(need):
                chunk_gradient_(s, t, y, moments, layout.take(token_weights, c), plan)
                grads.add(s, h, c)
        grads.finish()
        ctx.save_for_backward(grads.hidden, grads.weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(per_token, stats)
        ctx.set_materialize_grads(False)
        # A masked token may have an infinite loss (padding can hold anything): 0 * inf must be 0.
        loss = torch.where(token_weights == 0, 0.0, token_weights * per_token).sum()
        return loss, per_token, stats

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        scale = upstream[0]
        if scale is None:
            return (None,) * 7
        # Always multiplied: asking whether the scale is 1 would wait for the device.
        grad_hidden = None if hidden is None else (hidden * scale).to(hidden.dtype)
        grad_weight = None if weight is None else (weight * scale).to(ctx.weight_dtype)
        return (grad_hidden, grad_weight, *(None,) * 5)
