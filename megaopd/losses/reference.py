"""The dense truth: every loss on full logits, in plain torch autograd, at its input's precision.

Nothing here is fast. Each sharded or chunked path is tested against these functions in fp64.
Ids >= vocab_size are padding: they are sliced off, which is what a logit of -inf does in both
models, without the NaN of (-inf) - (-inf).

Shapes: logits [..., V], labels [...], every result [...]. Throughout, x = log p (student),
y = log q (teacher), r = q / p, S a set of ids given as a mask [..., V].

`divergence` returns a value whose autograd gradient is the one to train with. A logit of -inf reads
as -1e30 there and in the targets, so that q = 0 and p = 0 stay finite; not so in rkl, fkl, entropy.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

FLOOR = -1e30  # what a logit of -inf reads as; also the logarithm of a weight of 0
OUTSIDE = -1e32  # below FLOOR: an id outside S never ties with an excluded id inside it
TAIL_FLOOR = 1e-30  # a tail mass before its logarithm
TAIL_NEGLIGIBLE = 1e-12  # both tails below this: the tail bucket is dropped
CHI2_LOG_LIMIT = 60.0


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
    return -_at(log_probs(logits, temperature, vocab_size), labels)


def entropy(logits: Tensor, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """-sum_v p_v log p_v."""
    log_p = log_probs(logits, temperature, vocab_size)
    return _kl(log_p, torch.zeros_like(log_p)).neg()


DIVERGENCES = {"rkl": rkl, "fkl": fkl}


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else FLOOR


def _log_mix(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """log(weight e^first + (1 - weight) e^second)."""
    return torch.logaddexp(first + _log(weight), second + _log(1 - weight))


def _rkl(x: Tensor, y: Tensor) -> Tensor:
    return x.exp() * (x - y)


def _fkl(x: Tensor, y: Tensor) -> Tensor:
    return y.exp() * (y - x)


def _jsd(x: Tensor, y: Tensor, beta: float = 0.5) -> Tensor:
    """beta q log(q/M) + (1-beta) p log(p/M), M = beta q + (1-beta) p; beta 0 is fkl, 1 is rkl."""
    if beta in (0, 1):
        return _rkl(x, y) if beta else _fkl(x, y)
    m = _log_mix(y, x, beta)
    return beta * y.exp() * (y - m) + (1 - beta) * x.exp() * (x - m)


def _skew_fkl(x: Tensor, y: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(q || alpha q + (1-alpha) p)."""
    return y.exp() * (y - _log_mix(y, x, alpha))


def _skew_rkl(x: Tensor, y: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1-alpha) q)."""
    return x.exp() * (x - _log_mix(x, y, alpha))


def _tv(x: Tensor, y: Tensor) -> Tensor:
    return (x.exp() - y.exp()).abs() / 2


def _hellinger(x: Tensor, y: Tensor) -> Tensor:
    return x.exp() - ((x + y) / 2).exp()


def _jeffreys(x: Tensor, y: Tensor) -> Tensor:
    return (y.exp() - x.exp()) * (y - x)


def _chi2(x: Tensor, y: Tensor) -> Tensor:
    """(q - p)^2 / p, with q^2/p cut at e^60: no gradient through it above."""
    return (2 * y - x).clamp_max(CHI2_LOG_LIMIT).exp() - 2 * y.exp() + x.exp()


def _softened_rkl(x: Tensor, y: Tensor) -> Tensor:
    """(p + q) log((p + q) / 2q)."""
    return (x.exp() + y.exp()) * (torch.logaddexp(x, y) - y - math.log(2))


def _alpha(x: Tensor, y: Tensor, alpha: float = 0.2) -> Tensor:
    """q f(p/q), f(u) = (u^(1-a) - (1-a) u - a) / (a (a-1))."""
    power = ((1 - alpha) * x + alpha * y).exp()
    return (power - (1 - alpha) * x.exp() - alpha * y.exp()) / (alpha * (alpha - 1))


Element = Callable[..., Tensor]
TERMS: dict[str, Element] = {
    "rkl": _rkl,
    "fkl": _fkl,
    "jsd": _jsd,
    "skew_fkl": _skew_fkl,
    "skew_rkl": _skew_rkl,
    "tv": _tv,
    "hellinger": _hellinger,
    "jeffreys": _jeffreys,
    "chi2": _chi2,
    "softened_rkl": _softened_rkl,
    "alpha": _alpha,
}
SUPPORTS = ("full", "student_topk", "teacher_topk", "intersection")


class _Finite(torch.autograd.Function):
    """-inf reads as FLOOR, and gets the gradient of a logit of that value (fkl: -q)."""

    @staticmethod
    def forward(_ctx: object, logits: Tensor) -> Tensor:
        return logits.clamp_min(FLOOR)

    @staticmethod
    def backward(_ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def _finite(logits: Tensor, vocab_size: int | None) -> Tensor:
    return _Finite.apply(logits[..., :vocab_size])  # pyright: ignore[reportReturnType]


def _at(values: Tensor, ids: Tensor) -> Tensor:
    """values[..., ids]: [..., V] and [...] to [...]."""
    return values.gather(-1, ids[..., None])[..., 0]


def topk_ids(logits: Tensor, k: int) -> Tensor:
    """Ids [..., min(k, V)] of the k largest logits, descending; equal ones in order of id."""
    return torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[..., :k]


def topk_mask(logits: Tensor, k: int) -> Tensor:
    """[..., V], true on the k largest logits."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, topk_ids(logits, k), True)


def _support(student: Tensor, teacher: Tensor, support: str, k: int) -> Tensor:
    if support == "intersection":
        return topk_mask(student, k) & topk_mask(teacher, k)
    return topk_mask(student if support == "student_topk" else teacher, k)


def _sum_on(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(-1)


def _renormalised(term: Element, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """D of p / sum_S p and q / sum_S q; S empty: 0."""
    x, y = (torch.log_softmax(v.masked_fill(~mask, OUTSIDE), dim=-1) for v in (x, y))
    return _sum_on(mask, term(x, y))


def _with_tail(term: Element, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """D over K+1 buckets: the ids of S, and all others as one (the clamp stops its gradient)."""
    tail_p, tail_q = _sum_on(~mask, x.exp()), _sum_on(~mask, y.exp())
    tail = term(tail_p.clamp_min(TAIL_FLOOR).log(), tail_q.clamp_min(TAIL_FLOOR).log())
    negligible = (tail_p < TAIL_NEGLIGIBLE) & (tail_q < TAIL_NEGLIGIBLE)
    return _sum_on(mask, term(x, y)) + torch.where(negligible, 0.0, tail)


def _stop_gradient(x: Tensor, y: Tensor, mask: Tensor, sampled: Tensor | None) -> Tensor:
    """Gradient of sum_S p sg[rho] + [y not in S] sg[rho_y] log p_y; sampled: y, None: no such term.

    Value: sum_S p rho + [y not in S] rho_y.
    """
    rho = (x - y).detach()
    head = _sum_on(mask, x.exp() * rho)
    if sampled is None:
        return head
    log_p_y = _at(x, sampled)
    tail = _at(rho, sampled) * (1 + log_p_y - log_p_y.detach())
    return head + torch.where(_at(mask, sampled), 0.0, tail)


def _bdkd(x: Tensor, y: Tensor, hard: bool, alpha: float = 2.0, beta: float = 1.0) -> Tensor:
    """w_F FKL + w_R RKL by the entropy gap d = H_q - H_p (detached).

    Soft: w_F = 2 sigmoid(d / beta), w_R = 2 - w_F. Hard: d > 0 gives (alpha, 1), else (1, alpha).
    """
    gap = ((x.exp() * x).sum(-1) - (y.exp() * y).sum(-1)).detach()
    forward = 2 * torch.sigmoid(gap / beta)
    reverse = 2 - forward
    if hard:
        forward = torch.where(gap > 0, alpha, torch.ones_like(gap))
        reverse = 1 + alpha - forward
    return forward * _fkl(x, y).sum(-1) + reverse * _rkl(x, y).sum(-1)


def _pld(
    student: Tensor, teacher: Tensor, ranks: int, temperature: float, labels: Tensor | None
) -> Tensor:
    """sum_{k <= ranks} a_k (log sum_{j >= k} exp s_{pi_j} - s_{pi_k}), j over the whole vocabulary.

    pi: the label first where there is one, then descending teacher logits.
    a_k = softmax(teacher / temperature)_{pi_k} over the whole vocabulary.
    """
    weights = torch.softmax(teacher / temperature, dim=-1)
    if labels is not None:
        teacher = teacher.scatter(-1, labels[..., None], torch.inf)
    order = topk_ids(teacher, teacher.shape[-1])
    scores = student.gather(-1, order)
    ranks = min(ranks, scores.shape[-1])
    rank = torch.arange(scores.shape[-1], device=scores.device)
    before = rank < rank[:ranks, None]  # [ranks, V]
    suffix = torch.logsumexp(scores[..., None, :].masked_fill(before, OUTSIDE), dim=-1)
    return (weights.gather(-1, order)[..., :ranks] * (suffix - scores[..., :ranks])).sum(-1)


def _variants(kind: str, support: str) -> tuple[str | None, ...]:
    """Which variants exist; none where the kind has no such support."""
    if support == "full":
        return (None, "hard") if kind == "bdkd" else (None,) * (kind in (*TERMS, "pld"))
    if support not in SUPPORTS or kind not in TERMS:
        return ()
    of_any = (None, "unnorm", "renorm", "tail", "intersect")
    return (*of_any, "sg", "sampled_tail") if kind == "rkl" else of_any


def divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str,
    support: str = "full",
    k: int | None = None,
    variant: str | None = None,
    temperature: float = 1.0,
    alpha: float | None = None,
    beta: float | None = None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """The loss of each token [...], in nats, times temperature^2; differentiable in `student`.

    kind: a key of TERMS, or "bdkd" (full support; variant "hard", alpha = delta, beta = T_g), "pld"
    (k ranks; temperature for the teacher only and no temperature^2), "kl_top" (fkl on teacher_topk,
    variant renorm unless given). variant: None is "tail"; "intersect" is renorm on intersection.
    labels: for pld the id to rank first; for sampled_tail the sampled id, drawn at `temperature`.
    Raises ValueError for a combination that does not exist.
    """
    if kind == "kl_top":
        kind, support, k, variant = "fkl", "teacher_topk", k or 1000, variant or "renorm"
    if variant not in (known := _variants(kind, support)):
        raise ValueError(f"{variant=} for {kind=}, {support=}: expected one of {known}")
    student, teacher = _finite(student, vocab_size), _finite(teacher.detach(), vocab_size)
    if kind == "pld":
        return _pld(student, teacher, k or 64, temperature, labels)
    x, y = log_probs(student, temperature), log_probs(teacher, temperature)
    given = {key: value for key, value in (("alpha", alpha), ("beta", beta)) if value is not None}
    if kind == "bdkd":
        return _bdkd(x, y, variant == "hard", **given) * temperature**2
    term = partial(TERMS[kind], **given)
    if support == "full":
        return term(x, y).sum(-1) * temperature**2
    if k is None or k < 1:
        raise ValueError(f"got {k=} for {support=}: expected k >= 1")
    mask = _support(student, teacher, "intersection" if variant == "intersect" else support, k)
    if variant in ("renorm", "intersect"):
        value = _renormalised(term, x, y, mask)
    elif variant == "unnorm":
        value = _sum_on(mask, term(x, y))
    elif variant in ("sg", "sampled_tail"):
        value = _stop_gradient(x, y, mask, labels if variant == "sampled_tail" else None)
    else:
        value = _with_tail(term, x, y, mask)
    return value * temperature**2


# ---- targets (METHODS 0.3): teacher logits for `divergence` --------------------------------------
# Pass them on with the same temperature: geometric and tempered targets commute with it, the linear
# ones return temperature * log(mix of the tempered laws), which divided by it again is that law.


def geometric_target(base: Tensor, teacher: Tensor, weight: float) -> Tensor:
    """Logits of softmax((1-w) log base + w log teacher); w > 1 extrapolates beyond the teacher.

    An id that either model excludes (with a coefficient other than 0) is excluded.
    """
    mixed = (1 - weight) * base.clamp_min(FLOOR) + weight * teacher.clamp_min(FLOOR)
    excluded = (base.isneginf() & (weight != 1)) | (teacher.isneginf() & (weight != 0))
    return mixed.masked_fill(excluded, FLOOR).detach()


def tempered_target(teacher: Tensor, phi: float) -> Tensor:
    """Logits of softmax(phi z): phi = 0 is uniform over the ids that are not excluded."""
    return (phi * teacher.clamp_min(FLOOR)).masked_fill(teacher.isneginf(), FLOOR).detach()


def linear_target(
    other: Tensor,
    teacher: Tensor,
    weight: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """temperature * log((1-w) A + w B) of the laws of other and teacher; [..., vocab_size]."""
    a = log_probs(_finite(other.detach(), vocab_size), temperature)
    b = log_probs(_finite(teacher.detach(), vocab_size), temperature)
    return temperature * _log_mix(b, a, weight)


def one_hot_target(
    labels: Tensor,
    teacher: Tensor,
    weight: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """temperature * log((1-w) onehot(label) + w q); [..., vocab_size]."""
    label = torch.full_like(teacher, FLOOR).scatter(-1, labels[..., None], 0.0)
    return linear_target(temperature * label, teacher, weight, temperature, vocab_size)


# ---- diagnostics (METHODS 25) --------------------------------------------------------------------


@torch.no_grad()
def diagnostics(
    student: Tensor,
    teacher: Tensor,
    *,
    k: int,
    labels: Tensor,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """What METHODS 25 logs, for each token [...], of the laws at `temperature` (no temperature^2).

    bucket_kl and both masses are on the student's top-k. teacher_rank: 0-based rank of the label in
    the teacher's list, k if outside. teacher_prefers: 1 where q_y > e p_y.
    """
    student, teacher = _finite(student, vocab_size), _finite(teacher, vocab_size)
    x, y = log_probs(student, temperature), log_probs(teacher, temperature)
    mask, teacher_ids = topk_mask(student, k), topk_ids(teacher, k)
    size = teacher_ids.shape[-1]
    hit = teacher_ids == labels[..., None]
    log_p, log_q = _at(x, labels), _at(y, labels)
    return {
        "mass_student": _sum_on(mask, x.exp()),
        "mass_teacher": _sum_on(mask, y.exp()),
        "bucket_kl": _with_tail(_rkl, x, y, mask),
        "overlap": mask.gather(-1, teacher_ids).sum(-1).to(x.dtype) / size,
        "teacher_rank": torch.where(hit.any(-1), hit.int().argmax(-1), size),
        "student_entropy": -(x.exp() * x).sum(-1),
        "teacher_entropy": -(y.exp() * y).sum(-1),
        "student_log_prob": log_p,
        "teacher_log_prob": log_q,
        "log_ratio": log_p - log_q,
        "kl_rkl": _rkl(x, y).sum(-1),
        "teacher_prefers": (log_q - log_p > 1).to(x.dtype),
    }
