"""Every f-divergence, once: what one token contributes, and its derivative.

An f-divergence of the student p from the teacher q is D = sum_v p_v f(q_v / p_v). With
g_v = dD/dp_v taken as if the p_v were free, and G_v = p_v g_v,

    dD/dz_v = G_v - p_v sum_u G_u                         (METHODS: softmax's Jacobian on g)

so a kind is two elementwise functions of x = log p, y = log q: the term p f(r) and G. The same
pair serves the whole vocabulary, a shard of it, a list of top-k tokens, and K+1 buckets. Adding a
kind is adding an entry to KINDS; outside of this package, docs/extending.md.

G is exact, not up to a multiple of p: a truncated sum is not invariant to such a multiple.

    kind          p f(r)                                  G
    rkl           p (x - y)                               p (x - y + 1)
    fkl           q (y - x)                               -q
    jsd(b)        b q log(q/M) + (1-b) p log(p/M)         (1-b) p log(p/M)       M = b q + (1-b) p
    skew_fkl(a)   q log(q/M)                              -(1-a) p q/M           M = a q + (1-a) p
    skew_rkl(a)   p log(p/M)                              p (log(p/M) + 1 - a p/M) M = a p + (1-a) q
    tv            |p - q| / 2                             p sign(p - q) / 2
    hellinger     p - sqrt(p q)                           p - sqrt(p q) / 2
    jeffreys      (q - p) (y - x)                         p (x - y + 1) - q
    chi2          q^2/p - 2 q + p                         p - q^2/p
    softened_rkl  (p + q) log((p+q) / 2q)                 p (log((p+q) / 2q) + 1)
    alpha(a)      (p^(1-a) q^a - (1-a) p - a q)/(a(a-1))  p (1 - (q/p)^a) / a

Shapes: any; x, y, p, q alike. Nothing here communicates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this a mixture's logarithm is taken as that of the floor: no NaN from 0 * log 0.
TINY = 1e-37
# q^2/p overflows fp32 beyond e^88; chi2 is cut at e^60, far above where it trains.
CHI2_LOG_LIMIT = 60.0

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Laws:
    """Student and teacher on some set of tokens: x = log p, y = log q, p, q."""

    x: Tensor
    y: Tensor
    p: Tensor
    q: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Laws":
        return cls(x, y, x.exp(), y.exp())


@dataclass(frozen=True)
class Kind:
    """pair(laws, parameter) -> (p f(r), G). `parameter` names the keyword that it takes."""

    pair: Callable[[Laws, float], Pair]
    parameter: str | None = None  # "alpha", "beta" or None
    default: float | None = None
    low: float = 0.0  # open interval of the parameter
    high: float = 1.0


def _rkl(w: Laws, _: float) -> Pair:
    term = w.p * (w.x - w.y)
    return term, term + w.p


def _fkl(w: Laws, _: float) -> Pair:
    return w.q * (w.y - w.x), -w.q


def _jsd(w: Laws, beta: float) -> Pair:
    log_m = torch.lerp(w.p, w.q, beta).clamp_min_(TINY).log_()
    g = (w.x - log_m).mul_(w.p).mul_(1 - beta)
    return torch.sub(w.y, log_m, out=log_m).mul_(w.q).mul_(beta).add_(g), g


def _skew_fkl(w: Laws, alpha: float) -> Pair:
    m = torch.lerp(w.p, w.q, alpha).clamp_min_(TINY)
    g = (w.p * w.q).div_(m).mul_(alpha - 1)
    return torch.sub(w.y, m.log_(), out=m).mul_(w.q), g


def _skew_rkl(w: Laws, alpha: float) -> Pair:
    m = torch.lerp(w.q, w.p, alpha).clamp_min_(TINY)
    rest = torch.div(w.p, m).mul_(-alpha).add_(1.0).mul_(w.p)
    term = torch.sub(w.x, m.log_(), out=m).mul_(w.p)
    return term, rest.add_(term)


def _tv(w: Laws, _: float) -> Pair:
    d = w.p - w.q
    return d.abs().mul_(0.5), d.sign_().mul_(w.p).mul_(0.5)


def _hellinger(w: Laws, _: float) -> Pair:
    root = (w.x + w.y).mul_(0.5).exp_()
    return w.p - root, torch.sub(w.p, root, alpha=0.5)


def _jeffreys(w: Laws, _: float) -> Pair:
    d = w.x - w.y
    return (w.p - w.q) * d, w.p * (d + 1) - w.q


def _chi2(w: Laws, _: float) -> Pair:
    square = torch.sub(w.y, w.x, alpha=0.5).mul_(2).clamp_max_(CHI2_LOG_LIMIT).exp_()
    return square - 2 * w.q + w.p, w.p - square


def _softened_rkl(w: Laws, _: float) -> Pair:
    # log((p+q)/2q) through whichever of p, q is larger: q may be 0 where p is not.
    d = w.x - w.y
    ratio = torch.nn.functional.softplus(d, threshold=60).sub_(0.6931471805599453)
    return (w.p + w.q) * ratio, (ratio + 1).mul_(w.p)


def _alpha(w: Laws, a: float) -> Pair:
    mixed = torch.lerp(w.x, w.y, a).exp_()
    term = (mixed - (1 - a) * w.p - a * w.q) / (a * (a - 1))
    return term, torch.sub(w.p, mixed).div_(a)


KINDS: dict[str, Kind] = {
    "rkl": Kind(_rkl),
    "fkl": Kind(_fkl),
    "jsd": Kind(_jsd, "beta", 0.5),
    "skew_fkl": Kind(_skew_fkl, "alpha", 0.1),
    "skew_rkl": Kind(_skew_rkl, "alpha", 0.1),
    "tv": Kind(_tv),
    "hellinger": Kind(_hellinger),
    "jeffreys": Kind(_jeffreys),
    "chi2": Kind(_chi2),
    "softened_rkl": Kind(_softened_rkl),
    "alpha": Kind(_alpha, "alpha", 0.2),
}
# What the kernels know by the same formulas; kinds that are added take the plain passes.
FUSED = frozenset(KINDS)
