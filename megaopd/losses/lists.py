"""Losses on a short list of tokens: truncated divergences and the Plackett-Luce loss.

The list (a head, topk.py) is complete on every rank, so nothing here communicates. Each loss gives
its value and a gradient of the form

    dz_v = coef_v on the list, p_v * const elsewhere

With S the support, m its indicator, P = p(S), Q = q(S), c = sum_S p rho, the gradients are those of
"The Many Faces of On-Policy Distillation" (arXiv 2605.11182), for any f-divergence with G = p g:

    unnorm  sum_S p f(r)                     coef = m G - p sum_S G      const = -sum_S G
    sg      c = sum_S p sg[rho]  (rkl)       coef = m p rho - p c        const = -c
    renorm  D_f(p/P, q/Q on S)               coef = m (G' - p' sum G')   const = 0
    tail    D_f on K+1 buckets               coef = G - p sum G          const = g_tail - sum G

On the list g_tail, which grows as 1/(tail mass), never enters: it would have to cancel.

Shapes: C rows, K entries of the list. All in fp64: a few buckets of nearly equal laws cancel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megaopd.losses.blocks import Norm
from megaopd.losses.divergences import KINDS, Laws
from megaopd.losses.topk import Head

TAIL_FLOOR = 1e-30
SLOPE_LIMIT = 1e36  # of the tail's gradient per unit of mass; p times it stays in fp32
TAIL_DROP = 1e-12  # below this in both laws the tail bucket is rounding noise


@dataclass
class ListLoss:
    """value, const [C]; coef [C, K]; label_coef [C] or None: see above. All detached."""

    value: Tensor
    const: Tensor
    coef: Tensor
    label_coef: Tensor | None = None


def head_laws(head: Head, norm: Norm) -> Laws:
    """log p and log q on the list, at full-vocabulary normalisation; in fp64, as K is small."""
    assert norm.m_t is not None and norm.log_z_t is not None
    x = head.s.double() - norm.m_s[:, None] - norm.log_z_s[:, None]
    return Laws.of(x, head.t.double() - norm.m_t[:, None] - norm.log_z_t[:, None])


def truncated(
    kind: str,
    parameter: float,
    variant: str,
    laws: Laws,
    member: Tensor,
    tail_p: Tensor,
    tail_q: Tensor,
) -> ListLoss:
    """A divergence cut down to S = member [C, K]; tail_p, tail_q [C]: the mass outside S."""
    if variant == "tail":
        return _tail(kind, parameter, laws, member, tail_p, tail_q)
    if variant in ("renorm", "intersect"):
        return _renorm(kind, parameter, laws, member)
    if variant == "unnorm":
        term, g = KINDS[kind].pair(laws, parameter)
        coef = _on(member, g)
        total = coef.sum(1)
        return ListLoss(_on(member, term).sum(1), -total, coef - laws.p * total[:, None])
    term = _on(member, laws.p * (laws.x - laws.y))
    value = term.sum(1)
    return ListLoss(value, -value, term - laws.p * value[:, None])


def sampled_tail(
    laws: Laws, head: ListLoss, log_ratio: Tensor, outside: Tensor, ratio: Tensor
) -> ListLoss:
    """sg on S plus sg[rho_y] log p_y where the sampled token y is outside S: unbiased for rkl.

    log_ratio = log p(y) - log q(y), outside: 1 where y is not in S, ratio = p(y)/p_old(y); all [C].
    """
    slope = torch.where(outside, log_ratio * ratio, 0.0)
    on_list = head.coef - laws.p * slope[:, None]
    return ListLoss(head.value + slope, head.const - slope, on_list, slope)


def plackett_luce(laws: Laws, tail_p: Tensor) -> ListLoss:
    """PLD (arXiv 2506.12542), cut after K ranks, with full-vocabulary suffix sums.

    L = sum_k q_k [log R_k - log p_k], R_k = tail_p + sum_{j>=k} p_j: the list in rank order, q the
    teacher's full-vocabulary law, tail_p the student's mass outside the list.
    dz = p B_K outside, p B_i - q_i at rank i, with B_i = sum_{k<=i} q_k / R_k.
    """
    suffix = laws.p.flip(1).cumsum(1).flip(1) + tail_p[:, None]
    reach = (laws.q / suffix).cumsum(1)
    value = (laws.q * (suffix.log() - laws.x)).sum(1)
    return ListLoss(value, reach[:, -1], laws.p * reach - laws.q)


def _tail(
    kind: str, parameter: float, laws: Laws, member: Tensor, tail_p: Tensor, tail_q: Tensor
) -> ListLoss:
    pair = KINDS[kind].pair
    term, g = pair(laws, parameter)
    x, y = (mass.clamp_min(TAIL_FLOOR).log() for mass in (tail_p, tail_q))
    bucket = Laws.of(x, y)
    tail_term, tail_g = pair(bucket, parameter)
    keep = ((tail_p >= TAIL_DROP) | (tail_q >= TAIL_DROP)).to(term.dtype)
    keep_g = torch.where(tail_p >= TAIL_FLOOR, keep, 0.0)  # the floor stops the gradient
    total = _on(member, g).sum(1) + keep_g * tail_g
    const = (keep_g * tail_g / bucket.p).clamp(-SLOPE_LIMIT, SLOPE_LIMIT) - total
    value = _on(member, term).sum(1) + keep * tail_term
    coef = torch.where(member, g - laws.p * total[:, None], laws.p * const[:, None])
    return ListLoss(value, const, coef)


def _renorm(kind: str, parameter: float, laws: Laws, member: Tensor) -> ListLoss:
    log_p = _on(member, laws.p).sum(1, keepdim=True).clamp_min(TAIL_FLOOR).log()
    log_q = _on(member, laws.q).sum(1, keepdim=True).clamp_min(TAIL_FLOOR).log()
    inside = Laws.of(laws.x - log_p, laws.y - log_q)
    term, g = KINDS[kind].pair(inside, parameter)
    total = _on(member, g).sum(1, keepdim=True)
    value = _on(member, term).sum(1)
    return ListLoss(value, torch.zeros_like(value), _on(member, g - inside.p * total))


def _on(member: Tensor, x: Tensor) -> Tensor:
    """x on the support, 0 elsewhere (also where x is not finite)."""
    return torch.where(member, x, 0.0)
