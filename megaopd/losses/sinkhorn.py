"""Sinkhorn divergence: how far the student's laws of a chunk of tokens are from the teacher's.

Rows are tokens. With P_i = softmax(z_s,i / tau), Q_j = softmax(z_t,j / tau) of a chunk of N rows:

    W_ij = sum_v |P_i(v) - Q_j(v)|            in [0, 2]
    Pi   = exp(-W / epsilon), then `iterations` times rows / their sum, columns / their sum
    L    = sum_ij Pi_ij W_ij                  one row: 2 TV(P, Q)

Gradient, through all iterations: with G = dL/dW [N, N] and u_i(v) = sum_j G_ij sign(P_i - Q_j)(v),
dL/dz_i = P_i (u_i - <P_i, u_i>) / tau, sign(0) = 0. Normaliser: the number of rows, no tau^2.

The plan couples the rows of a chunk, so the loss is not a sum over tokens: the chunks of
sinkhorn_divergence are drawn from a seed, the same on every tensor-parallel rank, and rows never
meet across data-parallel ranks. In the pass over the output layer (sinkhorn_chunk) they are the
chunks of that pass, and a token has a value and a weight of its own:

    L_i = sum_j Pi_ij W_ij,   loss = sum_i w_i L_i,   G = d loss / dW through all iterations

With equal weights that is L times the weight. A token of weight 0 is not among the rows: neither
the student's nor the teacher's law of it is matched with others.
Collectives a chunk of C rows: MAX[2, C], SUM[2, C], SUM[C, C], and SUM[C] for the gradient, all in
forward. Memory: P and Q of one chunk, blocks of C*C*v numbers, and the gradient in the logits'
type. Time C V/R numbers a token. Source: SinKD (arXiv 2402.17110).

Shapes: T tokens, C rows of one chunk, Vp = V/R local ids, v ids of one block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.chunk import ChunkLoss
from megaopd.losses.plan import Plan
from megaopd.losses.terms import Sinkhorn
from megaopd.losses.vocab_parallel import Group, Shard, all_reduce_max_, all_reduce_sum_

# Numbers in a [C, C, v] block: 16 MB in fp32.
BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Transport:
    """The parameters of one call."""

    temperature: float
    epsilon: float
    iterations: int
    envelope: bool
    shard: Shard


def sinkhorn_divergence(
    student_logits_TVp: Tensor,
    teacher_logits_TVp: Tensor,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    chunk: int = 128,
    seed: int = 0,
    envelope: bool = False,
    mask: Tensor | None = None,
    denominator: float | None = None,
    vocab_size: int | None = None,
    group: Group = None,
) -> Tensor:
    """Sum of L over the chunks / number of rows: a scalar, the same on every rank of `group`.

    mask [T]: rows that count, and no other row is looked at; None: all. denominator replaces their
    number. seed: of the permutation that puts rows into chunks, of sizes that differ by at most
    one and are at most `chunk`. envelope=True takes Pi as constant in the gradient: cheaper, and
    not exact. Without rows the loss is 0 with gradient 0. Ids >= vocab_size have probability 0.

    In fp32 (fp64 for fp64 logits), the chunk's plan in fp64. The teacher is detached; the gradient
    is computed in forward if the student's logits need one. Raises UserError for shapes that do not
    agree and numbers out of range.
    """
    _check(student_logits_TVp, teacher_logits_TVp, mask, denominator)
    numbers = {"temperature": temperature, "epsilon": epsilon}
    for name, value in {**numbers, "iterations": iterations, "chunk": chunk}.items():
        if not value > 0:
            raise UserError(f"{name}={value}", expected="> 0", fix=f"set {name} above 0")
    shard = Shard.of(student_logits_TVp.shape[-1], group, vocab_size)
    transport = Transport(temperature, epsilon, iterations, envelope, shard)
    if mask is None:
        mask = student_logits_TVp.new_ones(student_logits_TVp.shape[0], dtype=torch.bool)
    chunks = row_chunks(mask, chunk, seed)
    bottom = sum(len(rows) for rows in chunks) if denominator is None else denominator
    wants_gradient = student_logits_TVp.requires_grad and torch.is_grad_enabled()
    return _Sinkhorn.apply(
        student_logits_TVp,
        teacher_logits_TVp.detach(),
        chunks,
        bottom,
        transport,
        wants_gradient,
    )


def row_chunks(mask_T: Tensor, chunk: int, seed: int) -> list[Tensor]:
    """The rows where mask is not 0, shuffled by seed, in chunks of nearly equal size <= chunk.

    Equal sizes, because the divergence of a chunk depends on how many rows it may match.
    """
    rows = mask_T.nonzero()[:, 0]
    if not len(rows):
        return []
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return list(rows[order.to(rows.device)].tensor_split(-(-len(rows) // chunk)))


class _Sinkhorn(torch.autograd.Function):
    """Backward only scales a gradient that forward has left."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        chunks: list[Tensor],
        denominator: float,
        transport: Transport,
        wants_gradient: bool,
    ) -> Tensor:
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        grad = torch.zeros_like(student) if wants_gradient else None
        valid = transport.shard.valid
        for rows in chunks:
            logits = [x[rows, :valid].to(dtype) for x in (student, teacher)]
            values, dz = _one_chunk(logits[0], logits[1], transport, wants_gradient)
            total += values.sum()
            if grad is not None and dz is not None:
                grad[rows, :valid] = dz.div_(denominator).to(grad.dtype)
        ctx.save_for_backward(grad)
        return (total / max(denominator, 1e-30)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (None if grad is None else grad * grads[0].to(grad.dtype), *[None] * 5)


def sinkhorn_chunk(plan: Plan, s: Tensor, t: Tensor, weights: Tensor, want_grad: bool) -> ChunkLoss:
    """The only term of `plan`, a Sinkhorn, on scaled logits s, t [C, Vp]; weights [1, C].

    Token weights are in the gradient.
    """
    (term,) = plan.terms
    assert isinstance(term, Sinkhorn)
    values, grad = torch.zeros_like(weights), torch.zeros_like(s) if want_grad else None
    rows = weights[0].nonzero()[:, 0]
    if len(rows):
        # The logits are divided by the temperature already.
        transport = Transport(1.0, term.epsilon, term.iterations, False, plan.shard)
        own, dz = _one_chunk(s[rows], t[rows], transport, want_grad, weights[0, rows])
        values[0, rows] = own.to(values.dtype)
        if grad is not None and dz is not None:
            grad[rows] = dz.div_(term.temperature)
    return ChunkLoss(values, {}, grad)


def _one_chunk(
    student_CV: Tensor,
    teacher_CV: Tensor,
    transport: Transport,
    wants_gradient: bool,
    weights_C: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(L_i of the chunk's rows [C], d sum_i w_i L_i / dz of the local ids or None).

    weights_C: w, else 1. student_CV and teacher_CV are consumed.
    """
    p, q = _softmax_pair(student_CV, teacher_CV, transport)
    cost = torch.zeros(len(p), len(q), dtype=p.dtype, device=p.device)
    for ids in _blocks(p):
        cost += torch.cdist(p[:, ids], q[:, ids], p=1.0)
    cost = all_reduce_sum_(cost, transport.shard.group).double()
    with torch.enable_grad():
        cost.requires_grad_(wants_gradient)
        plan = transport_plan(cost, transport.epsilon, transport.iterations)
        values = ((plan.detach() if transport.envelope else plan) * cost).sum(1)
        loss = (values if weights_C is None else values * weights_C.double()).sum()
    if not wants_gradient:
        return values, None
    (by_cost,) = torch.autograd.grad(loss, cost)
    by_law = torch.empty_like(p)
    for ids in _blocks(p):
        signs = (p[:, None, ids] - q[None, :, ids]).sign_()
        by_law[:, ids] = torch.bmm(by_cost.to(p.dtype)[:, None], signs)[:, 0]
    dot = all_reduce_sum_((p * by_law).sum(1), transport.shard.group)
    return values.detach(), by_law.sub_(dot[:, None]).mul_(p).div_(transport.temperature)


def transport_plan(cost_NN: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Pi [N, N]: exp(-W/epsilon) with rows, then columns, normalised `iterations` times.

    On logarithms, whatever epsilon: exp(-2/epsilon) leaves fp32 below epsilon = .02.
    """
    log_plan = -cost_NN / epsilon
    for _ in range(iterations):
        log_plan = log_plan.log_softmax(1).log_softmax(0)
    return log_plan.exp()


def _softmax_pair(student: Tensor, teacher: Tensor, transport: Transport) -> list[Tensor]:
    """Both laws on the local ids, in place: one MAX and one SUM."""
    group = transport.shard.group
    pair = [x.div_(transport.temperature) for x in (student, teacher)]
    maxima = torch.stack(
        [x.amax(1) if x.shape[1] else x.new_full(x.shape[:1], -torch.inf) for x in pair]
    )
    all_reduce_max_(maxima, group)
    pair = [x.sub_(m[:, None]).exp_() for x, m in zip(pair, maxima, strict=True)]
    sums = all_reduce_sum_(torch.stack([x.sum(1) for x in pair]), group)
    return [x.div_(z[:, None]) for x, z in zip(pair, sums, strict=True)]


def _blocks(x_CV: Tensor) -> list[slice]:
    """Ranges of ids such that [C, C, v] numbers stay below BLOCK_ELEMENTS."""
    rows, width = x_CV.shape
    size = max(1, BLOCK_ELEMENTS // (rows * rows))
    return [slice(a, min(a + size, width)) for a in range(0, width, size)]


def _check(
    student: Tensor, teacher: Tensor, mask: Tensor | None, denominator: float | None
) -> None:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise UserError(
            f"student logits {list(student.shape)}, teacher logits {list(teacher.shape)}",
            expected="[T, Vp] twice",
            fix="flatten the tokens; load the teacher's output layer on the student's partition",
        )
    if mask is not None and mask.shape != student.shape[:1]:
        raise UserError(
            f"mask of shape {list(mask.shape)}",
            expected=f"[{student.shape[0]}], one number a row",
            fix="flatten the mask as the logits are",
        )
    if denominator is not None and not denominator > 0:
        raise UserError(
            f"denominator={denominator}", expected="> 0", fix="count the step's rows first"
        )
