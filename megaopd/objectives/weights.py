"""What each sample weighs in each term of an objective, and its advantage: from the rewards.

A term that does not look at a sample has no weight for it, and does not count its tokens in its
denominator; a weight of 0 counts them. Advantages and weights are numbers: nothing differentiates
through them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, pstdev

from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.objectives.spec import ObjectiveConfig

LEAST_STD = 1e-8  # of a group's rewards; below it they say nothing
ROLLOUT_TERMS: tuple[str, ...] = (
    "distill", "distill_low", "sinkd", "returns", "rl", "sft", "entropy",
)  # fmt: skip


def weigh(
    samples: Sequence[Sample], objective: ObjectiveConfig
) -> tuple[list[Sample], dict[str, float]]:
    """(the samples with weights and advantages, metrics): METHODS 4, 6, 9 and the GRPO base of 16.

    Samples of a prompt are a group; of kinds other than rollout only their own term sees one.

    Raises:
        UserError: rewards are needed, and a sample has none.
    """
    o = objective
    mixed = any(s.kind != "rollout" for s in samples)
    if not (o.needs_rewards or mixed) or o.loss == "sft":
        return list(samples), {}
    groups = _groups(samples)
    if o.needs_rewards:
        _check_rewards(samples, o)
    factors = _pass_rate_factors(groups, samples) if o.weigh else {}
    own_sft = not any(s.kind == "sft" for s in samples)
    found = []
    for i, sample in enumerate(samples):
        if sample.kind != "rollout":
            found.append(replace(sample, weights={sample.kind: 1.0}))
            continue
        weights: dict[str, float] = dict.fromkeys(ROLLOUT_TERMS, 1.0)
        if not own_sft:
            del weights["sft"]
        group = [samples[j].reward or 0.0 for j in groups[sample.prompt.id]]
        _weigh_distillation(weights, o, sample.reward or 0.0, group, factors.get(i, 1.0))
        own = o.rl in ("ppo", "trrd")  # dpg's is of the whole sequence: trainer/sequences.py
        advantage = _advantage(o, sample.reward or 0.0, group) if own else 0.0
        found.append(replace(sample, weights=weights, advantage=advantage))
    return found, _metrics(found, groups, o)


def scaled(sample: Sample, factor: float, *terms: str) -> Sample:
    """The sample with its weight in these terms (none named: in all that see it) times `factor`.

    Its tokens stay in the terms' denominators.
    """
    before = _weights_of(sample)
    chosen = terms or tuple(before)
    weights = {name: w * factor if name in chosen else w for name, w in before.items()}
    return replace(sample, weights=weights)


def completed(samples: Sequence[Sample]) -> list[Sample]:
    """With weights for all where some have them: a sample without is in no term otherwise."""
    if all(s.weights is None for s in samples):
        return list(samples)
    return [replace(s, weights=_weights_of(s)) for s in samples]


def _weights_of(sample: Sample) -> Mapping[str, float]:
    if sample.weights is not None:
        return sample.weights
    return dict.fromkeys(ROLLOUT_TERMS if sample.kind == "rollout" else (sample.kind,), 1.0)


def _weigh_distillation(
    weights: dict[str, float], o: ObjectiveConfig, reward: float, group: list[float], factor: float
) -> None:
    """What the loss itself makes of a rollout; the terms beside it look at every one."""
    left_out = {"wrong": reward >= 1.0, "unsolved": max(group) >= 1.0, "right": reward < 1.0}
    weights["distill"] = weights["sinkd"] = weights["returns"] = factor
    weights["distill_low"] = 0.0
    if o.loss == "rapo":
        weights["distill"], weights["distill_low"] = factor * reward, factor * (1.0 - reward)
    if left_out.get(o.only, False):
        for name in ("distill", "distill_low", "sinkd", "returns"):
            del weights[name]


def _groups(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Places of the rollouts of each prompt."""
    groups: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        if sample.kind == "rollout":
            groups.setdefault(sample.prompt.id, []).append(i)
    return groups


def _check_rewards(samples: Sequence[Sample], o: ObjectiveConfig) -> None:
    bare = next((s for s in samples if s.kind == "rollout" and s.reward is None), None)
    if bare is not None:
        what = (
            f"rl = {o.rl}" if o.rl else f"loss = {o.loss}, only = {o.only!r}, weigh = {o.weigh!r}"
        )
        raise UserError(
            f"a sample of prompt {bare.prompt.id} has no reward, with objective.{what}",
            expected="a verifier, and an answer that it compares with, for every prompt",
            fix="give the prompts answers, or remove what needs rewards from [objective]",
        )


def _advantage(o: ObjectiveConfig, reward: float, group: list[float]) -> float:
    if o.advantage == "reward":
        return reward
    centred = reward - fmean(group)
    if o.advantage == "centred":
        return centred
    std = pstdev(group)
    return centred / (std + 1e-6) if std > LEAST_STD else 0.0


def _pass_rate_factors(
    groups: Mapping[str, list[int]], samples: Sequence[Sample]
) -> dict[int, float]:
    """p (1 - p) of each sample's group, over its mean; 0 where every prompt is all or nothing."""
    raw = {}
    for places in groups.values():
        rate = fmean(samples[i].reward or 0.0 for i in places)
        raw |= dict.fromkeys(places, rate * (1.0 - rate))
    mean = fmean(raw.values()) if raw else 0.0
    return {i: value / mean if mean > 0 else 0.0 for i, value in raw.items()}


def _metrics(
    samples: Sequence[Sample], groups: Mapping[str, list[int]], o: ObjectiveConfig
) -> dict[str, float]:
    """How much of the step the rewards leave to learn from."""
    if not o.needs_rewards or not groups:
        return {}
    rewards = [[samples[i].reward or 0.0 for i in places] for places in groups.values()]
    found = {"groups/mixed": fmean(float(max(g) > min(g)) for g in rewards)}
    found["groups/solved"] = fmean(float(max(g) >= 1.0) for g in rewards)
    rollouts = [s for s in samples if s.kind == "rollout"]
    if o.rl:
        found["advantage_square"] = fmean((s.advantage or 0.0) ** 2 for s in rollouts)
    if o.only:
        found["distilled"] = fmean(float("distill" in (s.weights or {})) for s in rollouts)
    return found
