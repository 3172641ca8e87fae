"""From configuration to the terms of losses/, all of which share one pass over the logits."""

from dataclasses import dataclass

from megaopd.losses import CrossEntropy, Divergence, Entropy, Sampled, Target
from megaopd.losses.terms import Term
from megaopd.objectives.spec import ObjectiveConfig

# Names of the terms. The first one that an objective has is its loss.
TERMS = ("distill", "sft", "entropy")


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
    terms: dict[str, WeightedTerm] = {}
    if objective.is_divergence:
        terms["distill"] = WeightedTerm(_divergence(objective))
    elif objective.is_sampled:
        terms["distill"] = WeightedTerm(_sampled(objective))
    if objective.loss == "sft":
        terms["sft"] = WeightedTerm(CrossEntropy())
    elif objective.sft_coef:
        terms["sft"] = WeightedTerm(CrossEntropy(), objective.sft_coef)
    if objective.entropy_coef:
        terms["entropy"] = WeightedTerm(Entropy(), -objective.entropy_coef, importance=False)
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


def _sampled(o: ObjectiveConfig) -> Sampled:
    numbers = {"clip_low": o.clip_low, "clip_high": o.clip_high, "cap": o.cap, "kind": o.f_kind}
    return Sampled(
        estimator=o.loss,
        options={name: value for name, value in numbers.items() if value},
        baseline=o.resolved_baseline or None,
        k=o.resolved_baseline_k or None,
    )
