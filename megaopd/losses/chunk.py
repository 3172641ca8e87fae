"""One chunk of vocabulary-sharded logits: statistics -> losses -> d loss / d logits.

Used by dense.py (logits are given) and by fused_head.py (logits are made chunk by chunk), so there
is one place where a loss becomes numbers. All C x Vp work is in blocks.py; here are the rounds of
communication between those passes, and the algebra on a few numbers a token:

    0  one all-gather      only with a top-k list: its ids and both models' logits; the listed
                           tokens are then taken out of the logits, so that what is left is the tail
                           (remote.py: a list from a teacher elsewhere; one SUM instead)
    1  one all-gather      each shard's own offsets (its largest logits), and relative to them z_s,
                           z_t and the moments that the terms and statistics ask for; every rank
                           brings them to common offsets and adds them up, in the order of ranks
    2  one packed SUM      only for mixtures and general f: the values and sum of G

A MAX followed by a SUM would say the same in two collectives, each a wait for the slowest rank.

With everything relative to the offsets m, and d_s = sum e^(s-m_s) (s-t), d_t likewise:

    rkl = d_s/z_s - (m_s - m_t) - log(z_s/z_t)      H(p) = m_s + log z_s - a_s/z_s
    fkl = d_t/z_t + (m_s - m_t) + log(z_s/z_t)      log p(y) = s[y] - m_s - log z_s

s - t is never split into two logarithms, which keeps the digits of a small divergence. 4 bytes a
token and scalar in fp32: rkl gathers 2 + 3, 20 B a rank. The gradient needs no communication.

Shapes: C rows, Vp local ids (padding already sliced off), K entries of the list.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaopd.losses.blocks import Blocks, Coefs, Norm
from megaopd.losses.divergences import KINDS, Laws
from megaopd.losses.evaluate import Contributions, Evaluation, Labels, evaluate_terms
from megaopd.losses.lists import head_laws
from megaopd.losses.native import NativeBlocks, make_blocks
from megaopd.losses.plan import Plan
from megaopd.losses.remote import Given
from megaopd.losses.topk import MASKED, Head, contains, global_lists, take_out_
from megaopd.losses.vocab_parallel import all_gather_packed, all_reduce_sum_

Moments = dict[str, Tensor]  # name -> [C]


@dataclass
class ChunkLoss:
    """values [terms, C] and stats (name -> [C]) are complete; dz = grad * scale[:, None].

    The token weights are in scale or in grad already; scale None is 1. Where dz is 0 but at a few
    tokens, grad is Listed instead of [C, Vp].
    """

    values: Tensor
    stats: dict[str, Tensor]
    grad: "Tensor | Listed | None" = None
    scale: Tensor | None = None


@dataclass
class Listed:
    """A gradient that lives on a list of local columns: columns, values [C, K] (0: not owned)."""

    columns: Tensor
    values: Tensor

    def dense(self, width: int) -> Tensor:
        full = self.values.new_zeros(self.values.shape[0], width)
        return full.scatter_add_(1, self.columns, self.values)


@dataclass
class Batch:
    """What comes with the tokens of a chunk: labels [C], per-token inputs by name, [C] each."""

    labels: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


def run_chunk(
    plan: Plan, s: Tensor, t: Tensor | None, batch: Batch, weights: Tensor, want_grad: bool
) -> ChunkLoss:
    """The terms of `plan` on scaled logits s, t [C, Vp], which are overwritten.

    weights [terms, C]: token weight x coefficient of each term; they scale the gradient only.
    """
    labels = _local_labels(plan, s, t, batch.labels)
    given = None if plan.known is None else Given.of(plan, batch.inputs, batch.labels)
    if given is None:
        head, teacher_list = _take_head(plan, s, t, batch.labels)
    else:
        head, teacher_list = given.take_head(plan, s)
    tops = None if head is None else [head.s.amax(1), head.t.amax(1)]
    if tops is not None and labels is not None:  # a label in the list's front is filled in later
        tops = [torch.maximum(*pair) for pair in zip(tops, (labels.s, labels.t), strict=True)]
    blocks = make_blocks(plan, s, t, want_grad, tops)
    norm, moments, tail = _moments(plan, blocks, labels, head)
    if given is not None:
        norm, moments, tail = given.complete(norm, moments, tail, labels, head)
    unit = len(plan.terms) == 1
    # Rows are scaled one by one: a list of numbers made a tensor would be a copy from the host.
    rows = zip(weights, plan.factors, strict=True)
    if unit or not plan.terms:  # none: statistics alone
        factors = weights.new_ones(len(plan.terms), s.shape[0])
    else:
        factors = torch.stack([w * f for w, f in rows])
    facts = Evaluation(norm, moments, tail, labels, head, teacher_list, batch.inputs)
    values, coefs, extra = evaluate_terms(plan, facts, factors)
    if coefs.parts:
        _general(plan, blocks, norm, coefs, head, values)
    for value, factor in zip(values, plan.tau_squared, strict=True):
        value *= factor
    stats = facts.stats(plan)
    if given is not None:
        stats |= given.stats(plan, facts)
    out = ChunkLoss(values, stats)
    if want_grad:
        if plan.program == "zero" and plan.sparse(s) and head is not None:
            owned, columns = plan.shard.owned(head.ids)
            dz = _list_gradient(plan, facts, coefs, extra).to(norm.m_s.dtype)
            out.grad, scale = Listed(columns, torch.where(owned, dz, 0.0)), None
        else:
            on_list = coefs.p
            coefs.p = on_list if extra.rest is None else on_list + extra.rest
            out.grad, scale = blocks.gradient(norm, coefs)
            coefs.p = on_list
            _add_lists_(out.grad, scale, plan, facts, coefs, extra)
        if unit:
            weight = weights[0] * plan.factors[0]
            scale = weight if scale is None else scale * weight
        out.scale = scale
    return out


def _local_labels(plan: Plan, s: Tensor, t: Tensor | None, ids: Tensor | None) -> Labels | None:
    """The labels' logits where this rank owns them, 0 elsewhere: round 1 completes them."""
    if ids is None or not plan.uses_labels:
        return None
    owned, column = plan.shard.owned(ids)
    laws = [s] if t is None else [s, t]
    y = [torch.where(owned, plan.scaled(plan.shard.gather_owned(x, ids)[1]), 0.0) for x in laws]
    return Labels(ids, owned, column, y[0], y[-1])


def _take_head(
    plan: Plan, s: Tensor, t: Tensor | None, labels: Tensor | None
) -> tuple[Head | None, Tensor | None]:
    """The list that the terms need, taken out of s and t; the teacher's ids too if asked for."""
    need = plan.lists
    if need is None or t is None:
        return None, None
    both = need.intersect or (plan.stats and need.k > 0)
    student = need.source == "student"
    found = global_lists(
        s, t, need.k, plan.shard, student=student or both, teacher=not student or both
    )
    by_name = dict(
        zip(
            [n for n, w in (("s", student or both), ("t", not student or both)) if w],
            found,
            strict=True,
        )
    )
    ids, s_k, t_k = by_name["s" if student else "t"]
    teacher_ids = by_name["t"][0] if "t" in by_name else None
    if need.label_first and labels is not None:
        ids, s_k, t_k = _label_first(ids, s_k, t_k, labels)
    member = torch.ones_like(ids, dtype=torch.bool)
    if need.intersect:
        assert teacher_ids is not None
        member = contains(teacher_ids, ids)
    take_out_(s, t, ids, plan.shard)
    return Head(ids, plan.scaled(s_k), plan.scaled(t_k), member), teacher_ids


def _label_first(
    ids: Tensor, s: Tensor, t: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The list with the label in front, and without it or else without the last entry behind.

    The label's logits (column 0) are filled in later, from round 1.
    """
    hit = ids == labels[:, None]
    drop = torch.where(hit.any(1), hit.to(torch.int8).argmax(1), ids.shape[1] - 1)
    place = torch.arange(ids.shape[1] - 1, device=ids.device)
    place = place + (place >= drop[:, None])
    rest = [x.gather(1, place) for x in (ids, s, t)]
    first = [labels[:, None], *(torch.full_like(x[:, :1], MASKED) for x in (s, t))]
    return tuple(torch.cat(pair, 1) for pair in zip(first, rest, strict=True))  # pyright: ignore


def _moments(
    plan: Plan, blocks: Blocks | NativeBlocks, labels: Labels | None, head: Head | None
) -> tuple[Norm, Moments, Moments]:
    """Round 1. (norm, moments over the vocabulary, moments without the head), on every rank."""
    names = plan.moments
    if not names:
        assert head is not None
        zero = torch.zeros_like(head.s[:, 0])
        return Norm(head.s.amax(1), zero, head.t.amax(1), zero), {}, {}
    local = blocks.moments(names)
    laws = blocks.offsets.shape[0]
    ends = [] if labels is None else [labels.s, labels.t][:laws]
    packed = torch.cat([blocks.offsets, local, *(y[None] for y in ends)])
    offsets, by_rank = all_gather_packed(packed, plan.shard.group).tensor_split([laws], 1)
    m = offsets.amax(0)
    _rescale_(by_rank, names, offsets - m)
    sums = by_rank.sum(0)
    if labels is not None:
        labels.s, labels.t = sums[len(names)], sums[-1]
    tail = dict(zip(names, sums, strict=False))
    moments = tail
    if head is not None:
        moments, tail, m = _with_head(plan, head, labels, sums[: len(names)], m)
    norms = [_split(m[i], moments[z]) for i, z in enumerate(("z_s", "z_t")) if z in moments]
    return Norm(*norms[0], *norms[-1]), moments, tail


def _split(m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp = m + log z as a rounded part and the (tiny) rest, made in fp64.

    Then s minus the first is exact for the likely tokens, and probabilities sum to 1 to the last
    bit: a gradient g - E[g] would otherwise be off by E[g] times the defect.
    """
    exact = m.double() + z.double().log()
    rounded = exact.to(m.dtype)
    return rounded, (exact - rounded).to(m.dtype)


def _rescale_(sums: Tensor, names: tuple[str, ...], shift: Tensor) -> None:
    """In place: sums relative to an offset -> relative to a larger one.

    sums [..., n, C] begin with `names`; shift [..., laws, C] <= 0.

    A shard without ids has offset -inf and sums 0: its factor is 0.
    """
    factor = shift.exp()
    for i, name in enumerate(names):
        f = factor[..., 0 if name.endswith("_s") else -1, :]
        sums[..., i, :] *= f * f if name in ("q_s", "r_s") else f


def _with_head(
    plan: Plan, head: Head, labels: Labels | None, sums: Tensor, m: Tensor
) -> tuple[Moments, Moments, Tensor]:
    """Adds the listed tokens to the moments of the rest; offsets grow to cover them."""
    if plan.lists is not None and plan.lists.label_first and labels is not None:
        head.s[:, 0], head.t[:, 0] = labels.s, labels.t
    top = torch.maximum(m, torch.stack([head.s.amax(1), head.t.amax(1)]))
    _rescale_(sums, plan.moments, m - top)
    e_s, e_t = (head.s - top[0][:, None]).exp(), (head.t - top[1][:, None]).exp()
    d = head.s - head.t
    terms = {
        "z_s": e_s, "z_t": e_t, "d_s": e_s * d, "d_t": -e_t * d, "a_s": e_s * head.s,
        "a_t": e_t * head.t, "q_s": e_s * e_s, "r_s": e_s * e_s * d,
    }  # fmt: skip
    tail = dict(zip(plan.moments, sums, strict=True))
    return {name: tail[name] + terms[name].sum(1) for name in plan.moments}, tail, top


def _general(
    plan: Plan,
    blocks: Blocks | NativeBlocks,
    norm: Norm,
    coefs: Coefs,
    head: Head | None,
    values: Tensor,
) -> None:
    """Round 2: the values of general f-divergences, and their part of the gradient's p_coef."""
    sums = all_reduce_sum_(blocks.divergence_sums(norm, coefs), plan.shard.group)
    if head is not None:
        laws = head_laws(head, norm)
        for i, (kind, parameter, coef) in enumerate(coefs.parts):
            term, g = KINDS[kind].pair(laws, parameter)
            sums[i] += term.sum(1).to(sums.dtype)
            sums[-1] += coef * g.sum(1).to(sums.dtype)
    for row, value in zip(plan.general_rows, sums, strict=False):
        values[row] = value
    coefs.p = coefs.p - sums[-1]


def _add_lists_(
    grad: Tensor,
    scale: Tensor | None,
    plan: Plan,
    facts: Evaluation,
    coefs: Coefs,
    extra: Contributions,
) -> None:
    """Adds the gradient at listed tokens and at labels, on the rank that owns them."""
    if plan.shard.valid == 0:
        return
    inverse = None if scale is None else 1.0 / scale
    head, labels = facts.head, facts.labels
    here = None if labels is None else labels.owned
    if head is not None:
        dz = _list_gradient(plan, facts, coefs, extra)
        if extra.label is not None and labels is not None and here is not None:
            hit = head.ids == labels.ids[:, None]  # added once, in one sum: bf16 would cancel
            dy = extra.label if (cap := plan.slope(labels.s)) is None else extra.label * cap
            dz = dz + torch.where(hit, dy[:, None], 0.0)
            here = here & ~hit.any(1)
        owned, column = plan.shard.owned(head.ids)
        dz = (dz if inverse is None else dz * inverse[:, None]).to(grad.dtype)
        grad.scatter_add_(1, column, torch.where(owned, dz, 0.0))
    if extra.label is not None and labels is not None and here is not None:
        _add_labels_(grad, inverse, plan, facts, coefs, extra, here)


def _add_labels_(
    grad: Tensor,
    inverse: Tensor | None,
    plan: Plan,
    facts: Evaluation,
    coefs: Coefs,
    extra: Contributions,
    here: Tensor,
) -> None:
    """dz at labels that are on no list; `here`: this rank owns it.

    A narrow buffer is overwritten with the whole of it, made in fp32: for a likely token p - 1
    is the difference of two numbers that bf16 has rounded already.
    """
    labels = facts.labels
    assert labels is not None and extra.label is not None
    dy, column = extra.label, labels.column[:, None]
    narrow = grad.dtype not in (torch.float32, torch.float64)
    if narrow:
        one = Head(labels.ids[:, None], labels.s[:, None], labels.t[:, None], here[:, None])
        rest = coefs.p if extra.rest is None else coefs.p + extra.rest
        dy = dy + _dense_at(one, head_laws(one, facts.norm), coefs, rest)[:, 0]
    slope = plan.slope(labels.s)
    dy = dy if slope is None else dy * slope
    dy = (dy if inverse is None else dy * inverse).to(grad.dtype)
    if narrow:
        old = grad.gather(1, column)
        grad.scatter_(1, column, torch.where(here[:, None], dy[:, None], old))
    else:
        grad.scatter_add_(1, column, torch.where(here, dy, 0.0)[:, None])


def _list_gradient(plan: Plan, facts: Evaluation, coefs: Coefs, extra: Contributions) -> Tensor:
    """dz [C, K] at the listed tokens: the passes over the vocabulary left them at 0."""
    head, laws = facts.head, facts.laws
    assert head is not None and laws is not None
    dz = _dense_at(head, laws, coefs, coefs.p)
    for part in extra.head:
        dz = dz + part
    slope = plan.slope(head.s)
    return dz if slope is None else dz * slope


def _dense_at(head: Head, laws: Laws, coefs: Coefs, p_coef: Tensor) -> Tensor:
    """blocks.py's gradient at a few tokens [C, K]."""
    dz = laws.p * p_coef[:, None]
    if coefs.pd is not None:
        dz = dz + laws.p * (head.s - head.t) * coefs.pd[:, None]
    if coefs.px is not None:
        dz = dz + laws.p * laws.x * coefs.px[:, None]
    if coefs.q is not None:
        dz = dz + laws.q * coefs.q[:, None]
    for kind, parameter, coef in coefs.parts:
        dz = dz + KINDS[kind].pair(laws, parameter)[1] * coef[:, None]
    return dz
