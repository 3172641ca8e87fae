"""From configuration to the terms of losses/, all of which share one pass over the logits."""

from dataclasses import dataclass

from megaopd.losses import CrossEntropy, Divergence, Entropy, Sampled, Sinkhorn, Target
from megaopd.losses.terms import Term
from megaopd.objectives.spec import ObjectiveConfig

# Names of the terms, which are also those of the loss families: each has its own token weights and
# denominator. distill_low: rapo's part on the tempered reference; returns: what a loss on the next
# token leaves out.
TERMS = ("distill", "distill_low", "sinkd", "returns", "rl", "sft", "replay", "entropy")


@dataclass(frozen=True)
class WeightedTerm:
    """coef scales the token weights.

    importance: whether importance weights apply. Not to the entropy: it is exact in the token.
    """

    term: Term
    coef: float = 1.0
    importance: bool = True


def make_terms(objective: ObjectiveConfig) -> dict[str, WeightedTerm]:
    """The terms of an objective by name, of TERMS, in their order; it minimises their sum."""
    o, terms = objective, dict[str, WeightedTerm]()
    if o.loss == "sinkd":
        terms["distill"] = WeightedTerm(_sinkhorn(o), o.coef)
    elif o.is_divergence:
        terms["distill"] = WeightedTerm(_divergence(o), o.coef)
    elif o.is_sampled:
        terms["distill"] = WeightedTerm(_sampled(o), o.coef)
    elif o.loss == "rapo":
        low = Target(kind="tempered", weight=o.low_power)
        terms["distill"] = WeightedTerm(Divergence(kind="fkl"), o.coef)
        terms["distill_low"] = WeightedTerm(Divergence(kind="fkl", target=low), o.coef)
    if o.sinkd_coef:
        terms["sinkd"] = WeightedTerm(Sinkhorn(), o.sinkd_coef)
    if o.returns:
        # Its ratio to the sampling weights is 1 but for the later updates of a rollout.
        long = Sampled(estimator="ppo", advantage="returns")
        terms["returns"] = WeightedTerm(long, o.coef)
    if o.rl:
        terms["rl"] = WeightedTerm(_policy_gradient(o), o.rl_coef)
    if o.loss == "sft":
        terms["sft"] = WeightedTerm(CrossEntropy())
    elif o.sft_coef:
        terms["sft"] = WeightedTerm(CrossEntropy(), o.sft_coef)
    if o.replay:
        terms["replay"] = WeightedTerm(Sampled(estimator=o.replay), o.replay_coef, importance=False)
    if o.entropy_coef:
        terms["entropy"] = WeightedTerm(Entropy(), -o.entropy_coef, importance=False)
    return terms


def _divergence(o: ObjectiveConfig) -> Divergence:
    return Divergence(
        kind=o.loss,
        support=o.support or None,
        k=o.k or None,
        variant=o.variant or None,
        temperature=o.temperature,
        alpha=o.alpha or None,
        beta=o.beta or None,
        target=Target(kind=o.target, weight=o.target_weight),
    )


def _sinkhorn(o: ObjectiveConfig) -> Sinkhorn:
    target = Target(kind=o.target, weight=o.target_weight)
    return Sinkhorn(temperature=o.temperature, epsilon=o.beta or 0.1, target=target)


def _sampled(o: ObjectiveConfig) -> Sampled:
    numbers = {"clip_low": o.clip_low, "clip_high": o.clip_high, "cap": o.cap, "kind": o.f_kind}
    return Sampled(
        estimator=o.loss,
        options={name: value for name, value in numbers.items() if value},
        baseline=o.resolved_baseline or None,
        k=o.resolved_baseline_k or None,
        without=("advantage",),  # of rewards: the rl term's
    )


def _policy_gradient(o: ObjectiveConfig) -> Sampled:
    if o.rl == "dpg":
        return Sampled(estimator="ppo")
    options = {
        "clip_low": o.rl_clip_low,
        "clip_high": o.rl_clip_high,
        "dual_clip": o.dual_clip,
    }
    return Sampled(estimator=o.rl, options=options | ({"mix": o.mix} if o.rl == "trrd" else {}))
