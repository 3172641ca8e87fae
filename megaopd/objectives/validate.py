"""Which objectives are refused, which are warned of, and what each one needs.

METHODS 20 by item. Refused here: 2 k1 as a loss; 4 unnorm without i_know_biased; 8 importance
weights without rollout log-probs; 9 a temperature with sampled tokens; 10 payloads that do not hold
enough of the teacher; 15 RLAD. Warned of here: 3 k3, 14 truncated rollouts.

What no configuration can say: 1 a divergence in the advantage: divergences are always explicit
terms, and an estimator's reward is made of sampled tokens only; 5 sg[p] * rho, 6 a clamped
truncated KL, 7 a live head with a detached tail: losses/lists.py has one form for each variant.
Checked elsewhere: 11 token ids are never made again from text (data/types.Sample, trainer/batch);
13 tokenizers (data/tokenizer.check_same_tokenizer).
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from megaopd.errors import UserError
from megaopd.objectives.names import (
    CAPPED,
    CLIPPED,
    COUPLED,
    DEFAULT_K,
    DIVERGENCES,
    ESTIMATORS,
    LOSSES,
    PARAMETER,
    REFUSED,
    SUPPORTS,
    variants,
)
from megaopd.objectives.presets import check_preset
from megaopd.objectives.sequences import check_sequences

if TYPE_CHECKING:
    from megaopd.objectives.spec import ObjectiveConfig

# What of the teacher reaches the trainer: hidden states (the whole law), log-probs of a list of
# tokens, or the sampled token's log-prob. METHODS 18's modes A, B and C.
PAYLOADS = ("hidden", "topk", "sampled")


@dataclass(frozen=True)
class Needs:
    """What an objective needs beside the student's forward pass."""

    teacher: bool
    labels: bool  # the sampled (sft: the data's) token of each row
    old_log_prob_pass: bool  # the trainer's log-probs of the sampled tokens before the update
    ratio: bool  # the same, where several optimizer steps are taken per rollout
    statistics_pass: bool  # token weights that depend on all tokens of the step
    rewards: bool  # rewards of a group of samples
    payloads: tuple[str, ...]  # the PAYLOADS that suffice


def needs(objective: "ObjectiveConfig") -> Needs:
    """What `objective` needs."""
    o = objective
    labels = o.is_sampled or o.loss == "sft" or o.sft_coef > 0 or bool(o.rl or o.replay)
    labels |= o.variant == "sampled_tail" or o.target == "one_hot" or bool(o.returns)
    return Needs(
        teacher=o.needs_teacher,
        labels=labels,
        old_log_prob_pass=o.tis != "off" or o.needs_sequences,
        ratio=o.is_sampled or bool(o.rl) or bool(o.returns) or o.variant == "sampled_tail",
        statistics_pass=o.tis in ("mask", "reject"),
        rewards=o.needs_rewards,
        payloads=_payloads(o),
    )


def _payloads(o: "ObjectiveConfig") -> tuple[str, ...]:
    if not o.needs_teacher:
        return PAYLOADS
    whole_laws = o.target in ("tempered", "geometric", "linear") or o.loss == "rapo"
    if whole_laws or o.stats_k or o.sinkd_coef:
        return ("hidden",)
    if o.rl == "dpg":  # a token that servers leave out would leave a hole in its sequence
        return ("hidden",)
    if o.is_divergence:
        return ("hidden",) if o.resolved_support == "full" else ("hidden", "topk")
    if o.loss == "vopd":
        return ("hidden", "topk") if o.resolved_baseline_k else ("hidden",)
    return ("hidden", "sampled")


def check(objective: "ObjectiveConfig") -> None:
    """Refuse what cannot be right whatever the rest of the run.

    Raises:
        UserError: what was given, what was expected, and why.
    """
    check_preset(objective.preset)
    _check_loss(objective.loss)
    _check_numbers(objective)
    _check_unused(objective)
    if objective.is_divergence:
        _check_support(objective)
        _check_parameters(objective)
        _check_target(objective)
    _check_sampled(objective)
    _check_rewards(objective)
    check_sequences(objective)
    _check_statistics(objective)
    if objective.second_loss:
        objective.at(objective.second_from)  # checks itself


def check_run(
    objective: "ObjectiveConfig", *, log_probs: bool, payload: str = "hidden", group: int = 0
) -> None:
    """Refuse an objective that the rest of the run cannot serve.

    Args:
        log_probs: whether the samples carry the log-probs that they were drawn with.
        group: samples of a prompt; 0: not known.
        payload: one of PAYLOADS; for a teacher on servers, objectives/remote.py says which.
    """
    if objective.tis != "off" and not log_probs:
        raise UserError(
            f"objective.tis = {objective.tis} without rollout log-probs",
            expected="samples with the log-probs of the law that they were drawn from: the weights "
            "are ratios to them",
            fix="set objective.tis=off"
            + (": the data's answers were not sampled" if objective.loss == "sft" else ""),
        )
    if objective.needs_groups and group == 1:
        what = "rl" if objective.rl else "weigh" if objective.weigh else "only"
        raise UserError(
            f"objective.{what} = {getattr(objective, what)} with rollout.samples_per_prompt = 1",
            expected="groups of samples, whose rewards are compared",
            fix="set rollout.samples_per_prompt=8"
            + (", or objective.advantage=reward" if objective.rl else ""),
        )
    enough = needs(objective).payloads
    if payload not in enough:
        raise UserError(
            f"objective.loss = {objective.loss} with the teacher's {payload!r} payload",
            expected=f"payload {' or '.join(map(repr, enough))}: "
            f"{'a divergence over the vocabulary' if enough == ('hidden',) else 'this loss'} "
            f"needs more of the teacher's law",
            fix="have the teacher hand over its hidden states, or take a loss on less of its law",
        )


def _check_loss(loss: str) -> None:
    if loss in LOSSES:
        return
    reason, fix = REFUSED.get(loss, ("", ""))
    near = difflib.get_close_matches(loss, LOSSES, 1)
    raise UserError(
        f"objective.loss = {loss!r}" + (f": {reason}" if reason else ""),
        expected="one of " + ", ".join(map(repr, LOSSES)),
        fix=fix or (f"did you mean {near[0]!r}?" if near else ""),
    )


def _check_numbers(o: "ObjectiveConfig") -> None:
    if not o.temperature > 0:
        raise UserError(f"objective.temperature = {o.temperature}", expected="a number above 0")
    for name in (
        "k", "baseline_k", "stats_k", "chunk_size", "alpha", "beta", "clip_low", "clip_high",
        "cap", "sft_coef", "entropy_coef", "target_weight", "coef", "coef_end", "coef_steps",
        "target_steps", "second_from", "low_power", "rl_coef", "rl_clip_low", "rl_clip_high",
        "dual_clip", "mix", "replay_coef", "reward_scale", "sinkd_coef",
    ):  # fmt: skip
        value = getattr(o, name)
        if not 0 <= value < float("inf"):
            raise UserError(f"objective.{name} = {value}", expected="0 or more, and finite")


def _takes(losses: Sequence[str]) -> Callable[["ObjectiveConfig"], bool]:
    return lambda o: o.loss in losses  # when it is asked: plugins add to the lists


# field -> (which losses take it, in words). Where another one sets it, it would be ignored.
_USERS: dict[str, tuple[Callable[["ObjectiveConfig"], bool], str]] = {
    "support": (_takes(DIVERGENCES), "a divergence"),
    "k": (_takes(DIVERGENCES), "a divergence"),
    "variant": (_takes(DIVERGENCES), "a divergence"),
    "target": (lambda o: o.is_divergence or o.loss in COUPLED, "a divergence"),
    "target_weight": (lambda o: o.target != "teacher", "a target other than 'teacher'"),
    "target_steps": (lambda o: o.target != "teacher", "a target other than 'teacher'"),
    "alpha": (lambda o: _parameter(o) == "alpha", "skew_fkl, skew_rkl, alpha and bdkd hard"),
    "beta": (lambda o: _parameter(o) == "beta", "jsd, bdkd soft and sinkd"),
    "f_kind": (_takes(["f_pg"]), "f_pg"),
    "baseline": (_takes(["vopd"]), "vopd"),
    "baseline_k": (lambda o: o.resolved_baseline_k > 0, "vopd's baselines topk and unnorm"),
    "clip_low": (_takes(CLIPPED), " and ".join(CLIPPED)),
    "clip_high": (_takes(CLIPPED), " and ".join(CLIPPED)),
    "cap": (_takes(CAPPED), ", ".join(CAPPED)),
    "coef": (lambda o: o.distils, "a loss that compares with a teacher"),
    "coef_steps": (lambda o: o.distils, "a loss that compares with a teacher"),
    "coef_end": (lambda o: o.coef_steps > 0, "objective.coef_steps, the length of its way"),
    "second_loss": (lambda o: o.distils, "a loss that compares with a teacher"),
    "second_from": (lambda o: bool(o.second_loss), "objective.second_loss"),
    "only": (lambda o: o.distils, "a loss that compares with a teacher"),
    "weigh": (lambda o: o.distils, "a loss that compares with a teacher"),
    "low_power": (_takes(["rapo"]), "rapo"),
    "sinkd_coef": (lambda o: o.distils and o.loss not in COUPLED, "a loss other than sinkd"),
    "returns": (lambda o: o.distils, "a loss that compares with a teacher"),
    "rl_coef": (lambda o: bool(o.rl), "objective.rl"),
    "advantage": (lambda o: o.rl in ("ppo", "trrd"), "objective.rl = ppo and trrd"),
    "rl_clip_low": (lambda o: o.rl in ("ppo", "trrd"), "objective.rl = ppo and trrd"),
    "rl_clip_high": (lambda o: o.rl in ("ppo", "trrd"), "objective.rl = ppo and trrd"),
    "dual_clip": (lambda o: o.rl in ("ppo", "trrd"), "objective.rl = ppo and trrd"),
    "rl_weigh": (lambda o: o.rl in ("ppo", "trrd"), "objective.rl = ppo and trrd"),
    "rl_weigh_clip": (lambda o: bool(o.rl_weigh), "objective.rl_weigh"),
    "mix": (lambda o: o.rl == "trrd", "objective.rl = trrd"),
    "reward_scale": (lambda o: o.rl == "dpg", "objective.rl = dpg"),
    "replay_coef": (lambda o: bool(o.replay), "objective.replay"),
    "sft_coef": (
        lambda o: o.loss != "sft" and o.passes_labels,
        "losses other than sft, and pld, which is given no labels",
    ),
}


def _check_unused(o: "ObjectiveConfig") -> None:
    defaults: dict[str, Any] = {f.name: f.default for f in fields(o)}
    for name, (uses, who) in _USERS.items():
        value = getattr(o, name)
        if value != defaults[name] and not uses(o):
            raise UserError(
                f"objective.{name} = {value} with objective.loss = {o.loss}",
                expected=f"no {name}: it belongs to {who}, and would be ignored here",
                fix=f"remove objective.{name}, or change objective.loss",
            )


def _check_support(o: "ObjectiveConfig") -> None:
    support = o.resolved_support
    allowed = variants(o.loss, support)
    if not allowed:
        good = [s for s in SUPPORTS if variants(o.loss, s)]
        raise UserError(
            f"objective.support = {support} with objective.loss = {o.loss}",
            expected="support " + " or ".join(map(repr, good)),
            fix="remove objective.support",
        )
    if support == "full" and o.k:
        raise UserError(
            f"objective.k = {o.k} with the full support",
            expected="no k: a full divergence looks at every token",
            fix="set objective.support=student_topk (rkl) or teacher_topk (fkl), or remove "
            "objective.k; for statistics on a list set objective.stats_k",
        )
    if support != "full" and not (o.k or o.loss in DEFAULT_K):
        raise UserError(
            f"objective.support = {support} without objective.k",
            expected="the number of tokens in the support",
            fix="set objective.k=20",
        )
    if o.variant and (o.variant not in allowed or o.variant == "none"):
        raise UserError(
            f"objective.variant = {o.variant} with loss = {o.loss}, support = {support}",
            expected="no variant" if allowed == ("none",) else f"one of {', '.join(allowed)}",
            fix=_why_not(o),
        )
    if o.variant == "unnorm" and not o.i_know_biased:
        raise UserError(
            "objective.variant = unnorm",
            expected="a variant whose minimum is the teacher: the gradient of the plain partial "
            "sum also pushes the student's mass out of the support, to p = q/e on it",
            fix="set objective.variant=sg or tail; to study the failure, set "
            "objective.i_know_biased=true",
        )


def _why_not(o: "ObjectiveConfig") -> str:
    if o.variant in ("sg", "sampled_tail") and o.loss != "rkl":
        return f"{o.variant} is defined for rkl; set objective.variant=tail or renorm"
    if o.variant == "intersect":
        return "set objective.support=intersection"
    if o.resolved_support == "full" and o.loss in ("rkl", "fkl"):
        return "set objective.support and objective.k, or remove objective.variant"
    return "remove objective.variant"


def _parameter(o: "ObjectiveConfig") -> str:
    if o.loss in COUPLED:
        return "beta"
    if o.loss == "bdkd":
        return "alpha" if o.variant == "hard" else "beta"
    return PARAMETER.get(o.loss, "")


def _check_parameters(o: "ObjectiveConfig") -> None:
    name = _parameter(o)
    if name and o.loss not in ("bdkd", *COUPLED) and getattr(o, name) >= 1:
        raise UserError(
            f"objective.{name} = {getattr(o, name)} with objective.loss = {o.loss}",
            expected=f"0 < {name} < 1 (0: its default)",
            fix="the limits are losses of their own: jsd at beta 0 is fkl, at beta 1 rkl"
            if o.loss == "jsd"
            else f"remove objective.{name} for its default",
        )


def _check_target(o: "ObjectiveConfig") -> None:
    mixture = o.target in ("one_hot", "linear")
    if mixture and not 0 < o.target_weight < 1:
        raise UserError(
            f"objective.target = {o.target} with target_weight = {o.target_weight}",
            expected="0 < target_weight < 1: the teacher's share of the target",
            fix="set objective.target_weight=0.8",
        )
    if o.target == "one_hot" and not o.passes_labels:
        raise UserError(
            f"objective.target = one_hot with objective.loss = {o.loss}",
            expected="a loss that is given the sampled tokens: pld is given the teacher's order "
            "only",
            fix="set objective.target=teacher",
        )


def _check_sampled(o: "ObjectiveConfig") -> None:
    if o.temperature != 1.0 and o.loss == "sft":
        raise UserError(
            f"objective.temperature = {o.temperature} with loss = sft",
            expected="1.0: cross-entropy is the likelihood of the data",
            fix="set objective.temperature=1.0",
        )
    if o.temperature != 1.0 and (o.loss in ESTIMATORS or o.variant == "sampled_tail"):
        raise UserError(
            f"objective.temperature = {o.temperature} with "
            + (f"loss = {o.loss}" if o.loss in ESTIMATORS else "variant = sampled_tail"),
            expected="1.0: the log-probs of sampled tokens must be those of the law that sampled "
            "them",
            fix="set objective.temperature=1.0, or take a full or top-k divergence",
        )
    if o.loss == "f_pg" and not o.f_kind:
        raise UserError(
            "objective.loss = f_pg without objective.f_kind",
            expected="the f-divergence that it estimates",
            fix="set objective.f_kind=js",
        )


def _check_rewards(o: "ObjectiveConfig") -> None:
    if o.loss == "none" and not o.rl:
        raise UserError(
            "objective.loss = none without objective.rl",
            expected="something to minimise",
            fix="set objective.rl=ppo, or a loss",
        )
    if o.loss == "sft" and (o.rl or o.replay):
        raise UserError(
            f"objective.loss = sft with objective.rl = {o.rl!r}, objective.replay = {o.replay!r}",
            expected="neither: sft trains on the data's answers, which nobody samples",
            fix="set objective.loss=none or rkl, and objective.sft_coef with [mix] for answers",
        )
    if o.rl and not (o.dual_clip > 1 and 0 < o.rl_clip_low < 1 and o.rl_clip_high > 0):
        raise UserError(
            f"objective.rl_clip_low = {o.rl_clip_low}, rl_clip_high = {o.rl_clip_high}, "
            f"dual_clip = {o.dual_clip}",
            expected="0 < rl_clip_low < 1, rl_clip_high > 0 and dual_clip > 1",
        )
    if o.mix > 1 or o.low_power > 1:
        raise UserError(
            f"objective.mix = {o.mix}, objective.low_power = {o.low_power}",
            expected="each from 0 to 1",
        )
    if o.rl and not o.passes_labels:
        raise UserError(
            f"objective.rl = {o.rl} with objective.loss = {o.loss}",
            expected="a loss that is given the sampled tokens",
            fix="take objective.loss=kl_top or fkl",
        )


def _check_statistics(o: "ObjectiveConfig") -> None:
    if o.stats_k and o.own_k:
        raise UserError(
            f"objective.stats_k = {o.stats_k} with a loss on a list of {o.own_k} tokens",
            expected="no stats_k: the statistics are those of the loss's own list",
            fix="remove objective.stats_k",
        )
    if o.stats_k and not o.needs_teacher:
        raise UserError(
            f"objective.stats_k = {o.stats_k} with objective.loss = {o.loss}",
            expected="no stats_k: the list's statistics compare with a teacher",
            fix="remove objective.stats_k",
        )
