"""Detached numbers that are known before the loss: importance weights, and a baseline for vOPD.

Sampling and training disagree: the engine computes in another precision, or with older weights.
tis_weights bounds p_old / p_rollout, a factor of every sampled-token loss. Losses over the whole
vocabulary need no such weight: their token expectation is exact.

Shapes: T tokens, N samples, S positions, G samples a prompt, K support.
"""

import torch
from torch import Tensor

from megaopd.errors import UserError

LOG_LIMIT = 20.0
# mode -> default (low, high) of p_old / p_rollout.
TIS_MODES: dict[str, tuple[float, float]] = {
    "token": (0.0, 2.0),  # clipped into the interval
    "seq": (0.0, 2.0),  # the sample's geometric mean over its tokens, clipped
    "mask": (0.5, 5.0),  # IcePop: tokens outside get 0, the others keep their ratio
    "reject": (0.5, 5.0),  # samples whose geometric mean is outside get 0, the others 1
    "off": (0.0, 0.0),
}


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp with its argument clamped to [-20, 20]."""
    return log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT).exp()


def tis_weights(
    old_log_prob: Tensor,
    rollout_log_prob: Tensor | None,
    mask: Tensor | None = None,
    *,
    mode: str = "token",
    low: float | None = None,
    high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(weights, metrics) from the trainer's and the engine's log-probs of the sampled tokens.

    [T] or [N, S], the same shape for all; `seq` and `reject` need [N, S]. Weights are detached, of
    that shape, in fp32 (fp64 for fp64), and 0 where mask is 0. low, high: None takes TIS_MODES'.
    Metrics, 0-dim, over the tokens of mask, dropped ones included:
      ess            (sum w)^2 / (n sum w^2), 1 when all weights are equal, 0 when all are dropped
      clip_fraction  tokens (seq, reject: samples) whose ratio is outside [low, high]
    Raises UserError without rollout_log_prob (unless mode='off') and for numbers that are no
    log-probs. A rollout drawn with top_p < 1 must report the truncated law it was drawn from.
    """
    bounds = _check_tis(old_log_prob, rollout_log_prob, mask, mode, low, high)
    dtype = torch.promote_types(old_log_prob.dtype, torch.float32)
    keep = torch.ones_like(old_log_prob, dtype=torch.bool) if mask is None else mask.ne(0)
    if mode == "off" or rollout_log_prob is None:
        zero = torch.zeros((), dtype=dtype, device=old_log_prob.device)
        return keep.to(dtype), {"ess": _ess(keep.to(dtype), keep), "clip_fraction": zero}
    log_ratio = old_log_prob.detach().to(dtype) - rollout_log_prob.detach().to(dtype)
    log_ratio = torch.where(keep, log_ratio, 0.0)
    if not log_ratio.isfinite().all():
        raise UserError(
            f"{int((~log_ratio.isfinite()).sum())} non-finite log-probs inside the mask",
            expected="the log-prob of every sampled token",
            fix="mask the tokens that were not sampled, or that the engine did not score",
        )
    counted = keep
    if mode in ("seq", "reject"):
        counted = keep.any(1, keepdim=True)
        log_ratio = log_ratio.sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp_min(1)
    ratio = bounded_exp(log_ratio)
    inside = (ratio >= bounds[0]) & (ratio <= bounds[1])
    if mode in ("token", "seq"):
        weights = ratio.clamp(*bounds)
    else:
        weights = torch.where(inside, ratio if mode == "mask" else torch.ones_like(ratio), 0.0)
    weights = torch.where(keep, weights, 0.0)
    outside = (counted & ~inside).sum() / counted.sum().clamp_min(1)
    return weights, {"ess": _ess(weights, keep), "clip_fraction": outside.to(dtype)}


def posterior_weights(
    ref_log_prob_NG: Tensor,
    old_log_prob_NG: Tensor,
    reward_NG: Tensor,
    *,
    beta: float = 0.05,
    cap: float = 10.0,
) -> Tensor:
    """w - 1 [N, G] for the forward KL from the posterior pi_0 exp(R / beta) / Z, by prompt.

    w = G softmax over the G samples of a prompt of log pi_0(y) + R / beta - log p_old(y), with
    log-probs of whole responses, at most cap; the 1 is the baseline. Use it as the `advantage` of
    every token: L = -(w - 1) sum_t log p(y_t). Source: arXiv 2205.11275 (GDC, DPG).
    """
    shapes = {tuple(x.shape) for x in (ref_log_prob_NG, old_log_prob_NG, reward_NG)}
    if len(shapes) > 1 or reward_NG.dim() != 2 or reward_NG.shape[1] < 2:
        raise UserError(
            f"shapes {sorted(shapes)}",
            expected="three times [N, G] with G >= 2",
            fix="sample at least two responses a prompt: weights are relative within a group",
        )
    if not (beta > 0 and cap > 0):
        raise UserError(f"beta={beta}, cap={cap}", expected="both > 0", fix="take .05 and 10")
    logits = (ref_log_prob_NG - old_log_prob_NG + reward_NG / beta).detach()
    return (logits.softmax(1) * reward_NG.shape[1]).clamp_max(cap) - 1


# mode -> the inputs that it needs, in the order of vopd_baseline's signature.
BASELINES: dict[str, tuple[str, ...]] = {
    "none": (),
    "value": ("rkl",),
    "topk": ("student_log_probs", "teacher_log_probs"),
    "unnorm": ("student_log_probs", "teacher_log_probs"),
    "optimal": ("rkl", "sum_p2", "sum_p2_rho"),
}


def vopd_baseline(
    mode: str,
    *,
    rkl: Tensor | None = None,
    student_log_probs: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    sum_p2: Tensor | None = None,
    sum_p2_rho: Tensor | None = None,
) -> Tensor:
    """What vOPD adds to -l [T], detached; any function of the state alone leaves it unbiased.

    value    KL(p||q) [T], exact: minus the value of the state, V = -KL(p||q)
    topk     sum over a list [T, K] of pt (log pt - log qt), both renormalised on the list
    unnorm   sum over the list of p (log p - log q) with the probabilities as they are
    optimal  minus b* = E[A |score|^2] / E[|score|^2] with A = -l: the least variance of the
             gradient at the logits. With |e_y - p|^2 = 1 - 2 p_y + s, s = sum_v p^2:
             (KL (1 + s) - 2 sum_v p^2 (log p - log q)) / (1 - s)
    none     0

    student_log_probs, teacher_log_probs [T, K]: of full-vocabulary laws, on one list of ids.
    Raises UserError for an unknown mode and for an input that is missing or not used.
    """
    inputs = {"rkl": rkl, "student_log_probs": student_log_probs}
    inputs |= {"teacher_log_probs": teacher_log_probs, "sum_p2": sum_p2, "sum_p2_rho": sum_p2_rho}
    given = {name: x.detach() for name, x in inputs.items() if x is not None}
    if mode not in BASELINES or set(given) != set(BASELINES[mode]):
        needs = BASELINES.get(mode)
        raise UserError(
            f"baseline mode {mode!r} with " + (", ".join(given) or "no input"),
            expected=("one of " + ", ".join(BASELINES))
            if needs is None
            else (", ".join(needs) or "no input"),
            fix="'topk' needs the lists that top-k distillation has, 'value' the exact KL(p||q)",
        )
    if mode == "none":
        return torch.zeros(())
    if mode == "value":
        return given["rkl"]
    if mode == "optimal":
        rest = 1 - given["sum_p2"]
        best = (given["rkl"] * (1 + given["sum_p2"]) - 2 * given["sum_p2_rho"]) / rest
        # A nearly deterministic student: 0/0, and a score that vanishes whatever the baseline.
        return torch.where(rest > 1e-4, best, given["rkl"])
    log_p, log_q = given["student_log_probs"], given["teacher_log_probs"]
    if mode == "topk":
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _ess(weights: Tensor, keep: Tensor) -> Tensor:
    squares = (weights * weights).sum() * keep.sum()
    return weights.sum() ** 2 / squares.clamp_min(1e-30)


def _check_tis(
    old: Tensor,
    rollout: Tensor | None,
    mask: Tensor | None,
    mode: str,
    low: float | None,
    high: float | None,
) -> tuple[float, float]:
    """The bounds of the ratio."""
    if mode not in TIS_MODES:
        raise UserError(
            f"mode={mode!r}",
            expected="one of " + ", ".join(map(repr, TIS_MODES)),
            fix="'token' is the default",
        )
    bounds = tuple(
        default if x is None else x for x, default in zip((low, high), TIS_MODES[mode], strict=True)
    )
    if mode == "off":
        if low is not None or high is not None:
            raise UserError(
                f"low={low}, high={high} with mode='off'", expected="no bounds", fix="remove them"
            )
    elif rollout is None:
        raise UserError(
            f"mode={mode!r} without rollout log-probs",
            expected="the log-prob of each token under the law that the engine sampled it from",
            fix="have the engine return log-probs, or set mode='off'",
        )
    elif not 0 <= bounds[0] <= 1 <= bounds[1]:
        raise UserError(
            f"low={bounds[0]}, high={bounds[1]}",
            expected="0 <= low <= 1 <= high",
            fix="the ratio is 1 where trainer and engine agree",
        )
    for name, other in (("rollout_log_prob", rollout), ("mask", mask)):
        if other is not None and other.shape != old.shape:
            raise UserError(
                f"{name} of shape {list(other.shape)}",
                expected=f"old_log_prob's shape {list(old.shape)}",
                fix="one number a token",
            )
    if mode in ("seq", "reject") and old.dim() != 2:
        raise UserError(
            f"mode={mode!r} with log-probs of shape {list(old.shape)}",
            expected="[N, S] and a mask: this mode averages over the tokens of a sample",
            fix="pad the samples to [N, S], or take mode='token'",
        )
    return bounds[0], bounds[1]
