"""Losses that look at the sampled token only: every one is a function of the live log p(y).

So one number a token, the slope dL / d log p(y), defines the gradient: dL/dz = slope (e_y - p).
The fused output-layer loss asks for (value, slope) on each chunk; sampled_loss wraps the same pair
for a log-prob that autograd traces. Nothing here communicates.

With l = log p - log q, w = q/p, rho = p/p_old (1 without old_log_prob), r = w, all at y:

    estimator    value                              slope                 E_p[slope grad log p]
    k1_reward    rho l                              rho l                 grad KL(p||q)
    k2           rho l^2/2                          rho l                 grad KL(p||q)
    k3           rho (w - 1 + l)                    rho (1 - w)           grad KL(q||p)
    k3pp         rho (w - 1 + l)                    rho l                 grad KL(p||q)
    k5           -rho w l                           rho (1 - w)           grad KL(q||p)
    pg           -rho A, A = adv + c log(q/p_old)   -rho A                grad KL(p||q) at p = p_old
    vopd         as pg, A = adv + c (log(q/p_old) + baseline)             the same, other variance
    trrd         -R A, R = p / (p_old^a q^(1-a))    -R A
    rapo         rho (w log w - w + 1)              -rho w                grad KL(q||p)
    rapo_paper   rho (w log w - w + 1)              -rho w log w          neither
    f_pg         rho f(r)                           -rho (r f' - f)       grad sum_v p f(q/p)
    ppo          -rho A, A = adv                    -rho A
    dph_*        f(u), u = p/pi_0, y ~ pi_0         u f'(u)               grad of that divergence

pg, vopd, trrd and ppo are clipped as PPO clips: where the clip is active the slope is 0. With
old_log_prob, k2, k3, k5, rapo and f_pg carry rho as a detached importance weight, which makes the
last column hold for y ~ p_old. pg keeps l at p_old in its reward: away from p_old its gradient is
that of KL(p||q) - KL(p||p_old), a trust region, where k1_reward stays with KL(p||q).
k1_reward on the tokens outside a support (mask the others) completes a detached top-k sum to the
unbiased full KL(p||q) gradient. Every exp of a log-ratio clamps its argument to [-20, 20], and a
cap on w, r or l bounds the slope without changing its sign.

Shapes: [T] each. Sources: METHODS 1.3, 2, 5, 6, 7, 9, 11, 14, 16.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.importance import LOG_LIMIT, bounded_exp
from megaopd.losses.importance import vopd_baseline as vopd_baseline

LOG_2 = math.log(2.0)

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Terms:
    """Detached inputs of one call, and its parameters with the defaults filled in."""

    log_p: Tensor
    given: Mapping[str, Tensor]
    parameters: Mapping[str, float]
    kind: str = ""

    def __getitem__(self, name: str) -> float:
        return self.parameters[name]

    @property
    def log_q(self) -> Tensor:
        return self.given["teacher_log_prob"]

    @property
    def log_old(self) -> Tensor:
        return self.given.get("old_log_prob", self.log_p)

    @property
    def rho(self) -> Tensor:
        return bounded_exp(self.log_p - self.log_old)

    def log_weight(self, limit: float = math.inf) -> Tensor:
        """log of q/p, at most log(limit) and within [-20, 20]."""
        top = min(LOG_LIMIT, math.log(limit))
        return (self.log_q - self.log_p).clamp(-LOG_LIMIT, top)


def _k1_reward(t: Terms) -> Pair:
    both = t.rho * (t.log_p - t.log_q)
    return both, both


def _k2(t: Terms) -> Pair:
    log_ratio = t.log_p - t.log_q
    slope = log_ratio.clamp(-t["cap"], t["cap"])  # Huber's: linear beyond the cap
    return t.rho * slope * (log_ratio - slope / 2), t.rho * slope


def _k3_value(t: Terms) -> Tensor:
    return torch.expm1(t.log_weight()) + (t.log_p - t.log_q)


def _k3(t: Terms) -> Pair:
    return t.rho * _k3_value(t), -t.rho * torch.expm1(t.log_weight())


def _k3pp(t: Terms) -> Pair:
    rho, cap = t.rho, t["cap"]
    slope = torch.where(rho <= cap, rho * (t.log_p - t.log_q), 0.0)
    return rho.clamp_max(cap) * _k3_value(t), slope


def _k5(t: Terms) -> Pair:
    log_w = t.log_weight()
    return t.rho * log_w.exp() * log_w, -t.rho * torch.expm1(log_w)


def unclipped(
    ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float = math.inf
) -> Tensor:
    """Where a clipped policy gradient has a slope; low, high: the ratio's own bounds."""
    return torch.where(advantage < 0, (ratio > low) & (ratio < dual), ratio < high)


def _clipped(ratio: Tensor, advantage: Tensor, t: Terms) -> Pair:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), for A < 0 at most -dual_clip A."""
    low, high, dual = 1 - t["clip_low"], 1 + t["clip_high"], t["dual_clip"]
    objective = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    negative = advantage < 0
    active = unclipped(ratio, advantage, low, high, dual)
    if dual < math.inf:
        objective = torch.where(negative, torch.maximum(objective, dual * advantage), objective)
    return -objective, torch.where(active, -ratio * advantage, 0.0)


def _pg(t: Terms) -> Pair:
    advantage = t["kl_coef"] * (t.log_q - t.log_old) + t.given.get("advantage", 0.0)
    return _clipped(t.rho, advantage, t)


def _vopd(t: Terms) -> Pair:
    baseline, floor = t.given.get("baseline"), t["reward_floor"]
    if (baseline is None) == (floor == 0):
        how_many = "neither" if baseline is None else "both"
        raise UserError(
            f"estimator='vopd' with {how_many} of baseline and reward_floor",
            expected="one of them",
            fix="pass baseline=vopd_baseline(mode, ...); mode 'none' gives 0",
        )
    reward = t.log_q - t.log_old
    if baseline is None:
        reward = reward.clamp_min(math.log(floor) / (1 - floor))
    else:
        reward = reward + baseline
    return _clipped(t.rho, t["kl_coef"] * reward + t.given.get("advantage", 0.0), t)


def _trrd(t: Terms) -> Pair:
    mix = t["mix"]
    ratio = bounded_exp(t.log_p - mix * t.log_old - (1 - mix) * t.log_q)
    return _clipped(ratio, t.given["advantage"], t)


def _ppo(t: Terms) -> Pair:
    return _clipped(t.rho, t.given["advantage"], t)


def _rapo(t: Terms) -> Pair:
    log_w = t.log_weight(t["cap"])
    w = log_w.exp()
    return t.rho * (w * log_w - w + 1), -t.rho * w


def _rapo_paper(t: Terms) -> Pair:
    log_w = t.log_weight(t["cap"])
    return _rapo(t)[0], -t.rho * log_w.exp() * log_w


# kind -> (f(r), A(r) = r f'(r) - f(r) + const with A(1) = 0), as functions of (r, log r).
F_KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]]
F_KINDS = {
    "rkl": (lambda r, s: -s, lambda r, s: s),
    "fkl": (lambda r, s: r * s, lambda r, s: r - 1),
    "js": (
        lambda r, s: r * s - (r + 1) * (F.softplus(s) - LOG_2),
        lambda r, s: F.softplus(s) - LOG_2,
    ),
    "softened_rkl": (
        lambda r, s: (r + 1) * (F.softplus(-s) - LOG_2),
        lambda r, s: LOG_2 - F.softplus(-s),
    ),
    "hellinger": (lambda r, s: 1 - r.sqrt(), lambda r, s: (r.sqrt() - 1) / 2),
    "jeffreys": (lambda r, s: (r - 1) * s, lambda r, s: s + r - 1),
    "tv": (lambda r, s: (r - 1).abs() / 2, lambda r, s: s.sign() / 2),
    "chi2": (lambda r, s: (r - 1) ** 2, lambda r, s: r * r - 1),
}


def _f_pg(t: Terms) -> Pair:
    if t.kind not in F_KINDS:
        raise UserError(
            f"kind={t.kind!r}",
            expected="one of " + ", ".join(map(repr, F_KINDS)),
            fix="'rkl' is reverse KL, 'fkl' forward KL",
        )
    f, advantage = F_KINDS[t.kind]
    log_r = t.log_weight(t["cap"])
    return t.rho * f(log_r.exp(), log_r), -t.rho * advantage(log_r.exp(), log_r)


def _dph_forward(t: Terms) -> Pair:
    log_u = -t.log_weight()
    slope = torch.expm1(log_u)
    value = slope - log_u
    return value.clamp_max(t["cap"]), torch.where(value < t["cap"], slope, 0.0)


def _dph_js(t: Terms) -> Pair:
    log_u = -t.log_weight()
    u = log_u.exp()
    value = u * log_u - (u + 1) * (F.softplus(log_u) - LOG_2)
    return value, u * (LOG_2 - F.softplus(-log_u))


def _dph_alpha(t: Terms) -> Pair:
    log_u, a = -t.log_weight(), t["alpha"]
    u, mixed = log_u.exp(), ((1 - a) * log_u).exp()
    return (mixed - (1 - a) * u - a) / (a * (a - 1)), (u - mixed) / a


@dataclass(frozen=True)
class Estimator:
    """What one name stands for. `parameters` holds the numbers that it takes, and their defaults
    (inf: no limit); `takes` the tensors that it may be given beside those that it needs."""

    terms: Callable[[Terms], Pair]
    doc: str
    needs: tuple[str, ...] = ("teacher_log_prob",)
    takes: tuple[str, ...] = ("old_log_prob", "importance_weight")
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.needs, *self.takes, *self.parameters)


_OFF, _IS = "old_log_prob", "importance_weight"
_NO_CLIP = {"clip_low": math.inf, "clip_high": math.inf, "dual_clip": math.inf}
_PPO_CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
_TRRD_CLIP = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}

# fmt: off
ESTIMATORS: dict[str, Estimator] = {
    "k1_reward": Estimator(_k1_reward, "reverse KL: sg[l] rho, k1 in the reward (also called k4)"),
    "k2": Estimator(_k2, "reverse KL: l^2/2, as KDRL; cap: limit of |slope|",
                    parameters={"cap": math.inf}),
    "k3": Estimator(_k3, "has the gradient of FORWARD KL, and the value of reverse KL"),
    "k3pp": Estimator(_k3pp, "reverse KL: k3 times the live rho, as Skill-SD; slope 0 at rho > cap",
                      parameters={"cap": 10.0}),
    "k5": Estimator(_k5, "forward KL with a control variate"),
    "pg": Estimator(_pg, "policy gradient: log(q/p_old) as reward, added to an RL advantage",
                    takes=(_OFF, _IS, "advantage"), parameters={"kl_coef": 1.0, **_NO_CLIP}),
    "vopd": Estimator(_vopd, "pg with a baseline (vopd_baseline) or a floor on the reward",
                      takes=(_OFF, _IS, "advantage", "baseline"),
                      parameters={"kl_coef": 1.0, "reward_floor": 0.0, **_NO_CLIP}),
    "trrd": Estimator(_trrd, "RLAD: PPO on the ratio p / (p_old^mix q^(1-mix))",
                      needs=("teacher_log_prob", "advantage"),
                      parameters={"mix": 0.5, **_TRRD_CLIP}),
    "rapo": Estimator(_rapo, "forward KL of a tempered reference: -sg[w] log p; cap: limit of w",
                      parameters={"cap": 10.0}),
    "rapo_paper": Estimator(_rapo_paper, "w log w - w + 1 differentiated: not FKL's gradient",
                            parameters={"cap": 10.0}),
    "f_pg": Estimator(_f_pg, "an f-divergence of F_KINDS by policy gradient; a cap on r biases",
                      needs=("teacher_log_prob", "kind"), parameters={"cap": math.inf}),
    "ppo": Estimator(_ppo, "PPO / GRPO surrogate: no teacher", needs=("advantage",),
                     parameters=_PPO_CLIP),
    "dph_forward": Estimator(_dph_forward, "KL(pi_0||p), y ~ pi_0; slope 0 where value > cap",
                             takes=(), parameters={"cap": 10.0}),
    "dph_js": Estimator(_dph_js, "2 JSD(pi_0, p), y ~ pi_0 (js_low_var)", takes=()),
    "dph_alpha": Estimator(_dph_alpha, "alpha-divergence, y ~ pi_0; alpha -> 1: KL(pi_0||p)",
                           takes=(), parameters={"alpha": 0.2}),
}
# fmt: on

REFUSED = {
    "k1": "log p - log q differentiated has expected gradient 0: it trains nothing",
    "k3_reward": "k3 in the reward has neither KL's gradient",
}
MEANING = {
    "teacher_log_prob": "log q(y) [T] (dph_*: the stored log pi_0(y))",
    "old_log_prob": "log p(y) [T] at the weights that sampled y, recomputed by the trainer",
    "advantage": "detached RL advantage [T]",
    "baseline": "what is added to -l [T]: vopd_baseline(mode, ...)",
    "importance_weight": "trainer against engine [T]: tis_weights(...)",
    "kind": "one of " + ", ".join(F_KINDS),
}
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "clip_low": (lambda x: x > 0, "> 0"),
    "clip_high": (lambda x: x > 0, "> 0"),
    "dual_clip": (lambda x: x > 1, "> 1"),
    "cap": (lambda x: x > 0, "> 0"),
    "mix": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "alpha": (lambda x: 0 < x < 1, "in (0, 1)"),
    "reward_floor": (lambda x: 0 < x < 1, "in (0, 1)"),
    "kl_coef": (lambda x: 0 <= x < math.inf, ">= 0"),
}


def sampled_terms(
    log_prob: Tensor,
    teacher_log_prob: Tensor | None,
    *,
    estimator: str,
    old_log_prob: Tensor | None = None,
    advantage: Tensor | None = None,
    baseline: Tensor | None = None,
    importance_weight: Tensor | None = None,
    kind: str | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    cap: float | None = None,
    mix: float | None = None,
    alpha: float | None = None,
    reward_floor: float | None = None,
    kl_coef: float | None = None,
) -> Pair:
    """(value [T], slope [T]) of one of ESTIMATORS: dL/dz = slope (e_y - p). Detached, elementwise.

    None leaves a parameter at its default in ESTIMATORS; clips are distances from 1. In fp32
    (fp64 for fp64 log-probs). importance_weight multiplies value and slope. A token that the
    teacher did not score needs any finite log-prob, and weight 0 afterwards.
    Raises UserError for an estimator that does not exist or cannot train, for a missing input, and
    for one that the estimator does not use.
    """
    tensors = {"teacher_log_prob": teacher_log_prob, "old_log_prob": old_log_prob}
    tensors |= {"advantage": advantage, "baseline": baseline}
    tensors |= {"importance_weight": importance_weight}
    numbers = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "cap": cap}
    numbers |= {"mix": mix, "alpha": alpha, "reward_floor": reward_floor, "kl_coef": kl_coef}
    given = {name: x for name, x in tensors.items() if x is not None}
    chosen = {name: x for name, x in numbers.items() if x is not None}
    entry = _checked(estimator, {**given, **chosen} | ({} if kind is None else {"kind": kind}))
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    log_p = log_prob.detach().to(dtype)
    for name, tensor in given.items():
        if tensor.dim() and tensor.shape != log_prob.shape:
            raise UserError(
                f"{name} of shape {list(tensor.shape)}",
                expected=f"log_prob's shape {list(log_prob.shape)}",
                fix="one number a token; repeat a per-sample number over its tokens",
            )
        given[name] = tensor.detach().to(dtype)
    terms = Terms(log_p, given, {**entry.parameters, **chosen}, kind or "")
    with torch.no_grad():
        value, slope = entry.terms(terms)
        weight = given.get("importance_weight")
        return (value, slope) if weight is None else (value * weight, slope * weight)


def sampled_loss(
    log_prob: Tensor, teacher_log_prob: Tensor | None, *, estimator: str, **options: Any
) -> Tensor:
    """Loss [T] with the value of sampled_terms, and slope * d log_prob as its gradient.

    Takes the options of sampled_terms. log_prob [T] is the one that autograd traces.
    """
    value, slope = sampled_terms(log_prob, teacher_log_prob, estimator=estimator, **options)
    return value + slope * (log_prob - log_prob.detach())


def _checked(estimator: str, given: Mapping[str, Any]) -> Estimator:
    if estimator not in ESTIMATORS:
        reason = f": {REFUSED[estimator]}" if estimator in REFUSED else ""
        raise UserError(
            f"estimator={estimator!r}{reason}",
            expected="one of " + ", ".join(map(repr, ESTIMATORS)),
            fix="for reverse KL take 'k2', 'k3pp', 'k1_reward' or 'pg'; for forward KL 'k5'",
        )
    entry = ESTIMATORS[estimator]
    for name in entry.needs:
        if name not in given:
            raise UserError(
                f"estimator={estimator!r} without {name}",
                expected=f"{name}: {MEANING[name]}",
                fix=f"pass {name}, or take an estimator that does not need it",
            )
    for name, value in given.items():
        if name not in entry.inputs:
            users = ", ".join(key for key, other in ESTIMATORS.items() if name in other.inputs)
            raise UserError(
                f"{name} with estimator={estimator!r}",
                expected=f"no {name}: this estimator does not use it",
                fix=f"remove {name}, or take one of {users}",
            )
        if name in _RANGES and not _RANGES[name][0](value):
            words = _RANGES[name][1]
            raise UserError(
                f"{name}={value}", expected=f"a number {words}", fix=f"set {name} {words}"
            )
    return entry
