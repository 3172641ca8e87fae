"""Alarms on the metrics of a run: signs that it does something other than it should, in words.

A rule compares means over a few steps: the first ones of the run and the last ones so far. What
changed counts only beyond two standard errors, so that small batches do not raise alarms by chance.
Each is raised once a run. tools/diagnosis_trial.py holds the thresholds against failures that are
provoked and against healthy runs.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

Metrics = Mapping[str, float]
# (means of the first steps, of the last ones) -> what is wrong, or "".
Rule = Callable[[Metrics, Metrics], str]

FIRST, LAST = 3, 10  # steps that the means are over: before much has happened, and now
ERRORS = 2.0  # standard errors of a difference that are taken off it
# What says how far student and teacher are apart, in order of preference.
DISTANCES = ("kl", "bucket_kl", "log_ratio")

MASS_FALL = 0.15
LEAST_ESS = 0.5
MOST_K3 = 0.05  # bf16 engines measure below 1e-3
LEAST_ENTROPY = 0.05  # nats
MOST_REPETITION = 0.3
ENTROPY_RISE = 2.0  # times the first
LENGTH_RISE = 1.5  # times the first
REWARD_FALL = 0.1  # or, where that is less,
REWARD_SHARE = 0.3  # of the first
DISTANCE_RISE = 1.25  # times the first, and
LEAST_RISE = 0.05  # nats more
LEAST_MIXED = 0.05  # groups of a prompt whose rewards differ
SOLVED = 0.9  # a mean reward from which on little is left to learn


def distance(metrics: Metrics) -> tuple[str, float] | None:
    """The name and value of the distance to the teacher, where one is logged."""
    return next(((n, metrics[n]) for n in DISTANCES if n in metrics), None)


def _mass(first: Metrics, now: Metrics) -> str:
    name = "mass_student"
    if name not in first or name not in now or first[name] - now[name] <= MASS_FALL:
        return ""
    return f"the student's mass on the support fell from {first[name]:.2f} to {now[name]:.2f}"


def _ess(first: Metrics, now: Metrics) -> str:
    ess = min(now.get("tis/ess", 1.0), now.get("rollout_ess", 1.0))
    return "" if ess >= LEAST_ESS else f"importance weights leave {ess:.2f} of the samples' worth"


def _k3(first: Metrics, now: Metrics) -> str:
    k3 = now.get("rollout_k3", 0.0)
    if k3 <= MOST_K3:
        return ""
    return f"k3 between the engine's and the trainer's log-probs is {k3:.3g}"


def _collapse(first: Metrics, now: Metrics) -> str:
    """A student that is as decided as its teacher, or right, may be."""
    entropy, teacher = now.get("entropy", 1.0), now.get("teacher_entropy")
    if entropy >= LEAST_ENTROPY or entropy > first.get("entropy", 0.0) / 2:
        return ""
    if "reward" not in now and teacher is None and distance(now) is None:
        return ""  # supervised: nothing is sampled, and examples that are learnt are certain
    if now.get("reward", 0.0) >= SOLVED or (teacher is not None and entropy > teacher / 2):
        return ""
    return f"the student's entropy fell from {first['entropy']:.2f} to {entropy:.3f} nats a token"


def _noise(first: Metrics, now: Metrics) -> str:
    if "entropy" not in first or "entropy" not in now:
        return ""
    before, entropy, teacher = first["entropy"], now["entropy"], now.get("teacher_entropy", 0.0)
    if entropy <= max(ENTROPY_RISE * before, 1.5 * teacher, 2 * LEAST_ENTROPY):
        return ""
    return f"the student's entropy rose from {before:.2f} to {entropy:.2f} nats a token"


def _repetition(first: Metrics, now: Metrics) -> str:
    share, before = now.get("repetition", 0.0), first.get("repetition", 0.0)
    if share <= MOST_REPETITION or share <= before + 0.1:
        return ""
    return f"{share:.0%} of the responses' 3-grams stood in them before (at first {before:.0%})"


def _length(first: Metrics, now: Metrics) -> str:
    """With rewards that fall; where there are none, by twice the length."""
    if "response_length" not in first or "response_length" not in now:
        return ""
    before, length = first["response_length"], now["response_length"]
    lost = first.get("reward", 0.0) - now.get("reward", 0.0)
    worse = lost > REWARD_FALL / 2 if "reward" in first else length > 2 * before
    if length <= LENGTH_RISE * before or not worse:
        return ""
    text = f"responses grew from {before:.1f} to {length:.1f} tokens"
    if "reward" in first:
        text += f" while the reward fell from {first['reward']:.2f} to {now['reward']:.2f}"
    return text


def _distance(first: Metrics, now: Metrics) -> str:
    found, before = distance(now), distance(first)
    if found is None or before is None or found[0] != before[0]:
        return ""
    (name, value), (_, was) = found, before
    # A loss other than reverse KL may fall while the log-ratio rises.
    other = name == "log_ratio" and now.get("distill", was) < first.get("distill", -math.inf)
    if other or value <= max(DISTANCE_RISE * was, was + LEAST_RISE):
        return ""
    return f"the distance to the teacher ({name}) rose from {was:.3f} to {value:.3f} nats a token"


def _reward(first: Metrics, now: Metrics) -> str:
    """Worse than at the beginning: a good spell that ends is no failure."""
    if "reward" not in first or "reward" not in now:
        return ""
    most = min(REWARD_FALL, max(REWARD_SHARE * first["reward"], 0.03))
    if first["reward"] - now["reward"] <= most:
        return ""
    text = f"the reward fell from {first['reward']:.2f} to {now['reward']:.2f}"
    far, was = distance(now), distance(first)
    if far and was and far[0] == was[0] and far[1] < was[1]:
        text += f" while the distance to the teacher ({far[0]}) fell"
        text += f" from {was[1]:.3f} to {far[1]:.3f} nats a token"
    return text


def _no_signal(first: Metrics, now: Metrics) -> str:
    mixed, reward = now.get("groups/mixed", 1.0), now.get("reward", 0.0)
    if mixed >= LEAST_MIXED or reward >= SOLVED:
        return ""
    return f"{mixed:.0%} of the prompts have samples of different rewards (mean {reward:.2f})"


def _not_finite(first: Metrics, now: Metrics) -> str:
    wrong = [n for n in ("loss", "grad_norm", "entropy") if not math.isfinite(now.get(n, 0.0))]
    return f"{' and '.join(wrong)} no longer finite" if wrong else ""


@dataclass(frozen=True)
class Alarm:
    """A rule, what its firing is the sign of, and what to do about it.

    at_once: it compares with nothing that came before.
    general: many causes end in it, so that others say more of the cause.
    """

    rule: Rule
    means: str
    fix: str
    at_once: bool = False
    general: bool = False


ALARMS: dict[str, Alarm] = {
    "mass_student": Alarm(
        _mass,
        "the signature of a biased top-k gradient: the student moves to tokens that the loss does "
        "not see",
        "objective.variant=tail or sg",
    ),
    "ess": Alarm(
        _ess,
        "engine and trainer disagree on the sampled tokens: they hold different weights, or the "
        "samples are of much older ones",
        "a smaller rollout.staleness or optim.lr; check `megaopd doctor` for the engine's dtype",
        at_once=True,
    ),
    "rollout_k3": Alarm(
        _k3,
        "tokens were sampled by much older weights, or by weights that are not this run's",
        "a smaller rollout.staleness or optim.lr; check that nobody else updates the servers",
        at_once=True,
    ),
    "entropy_collapse": Alarm(
        _collapse,
        "the student has decided, and samples the same responses over and over, right or wrong",
        "a smaller optim.lr, objective.entropy_coef, or a term that keeps it near a reference",
    ),
    "entropy_rise": Alarm(
        _noise,
        "the student becomes noise: its update is larger than what the loss can correct, or an "
        "entropy bonus outweighs it",
        "a smaller optim.lr or objective.entropy_coef",
    ),
    "repetition": Alarm(
        _repetition,
        "degenerate responses: the teacher scores the student's loops as likely",
        "a shorter rollout.max_new_tokens, a warm start by objective.loss=sft, or sft_coef with "
        "[mix]",
    ),
    "response_length": Alarm(
        _length,
        "the student no longer ends its responses in time: the teacher does not end them there "
        "(another format, another end token) or an objective that pays for length",
        "compare `megaopd eval` of the teacher on the same prompts; objective.loss_agg",
    ),
    "distance": Alarm(
        _distance,
        "the optimisation runs away from what it should approach: steps that are too large, or a "
        "gradient that is not this divergence's",
        "a smaller optim.lr, a full or `tail` support",
        general=True,
    ),
    "reward": Alarm(
        _reward,
        "the update makes the student worse at its task: a teacher that is worse on the student's "
        "own prefixes than its benchmark says, or sees what the student cannot know; with rewards "
        "alone, steps that are too large",
        "another teacher, objective.sft_coef with [mix], rewards beside the teacher (objective.rl) "
        "or a smaller optim.lr; as privileged information a rule that holds for all prompts",
        general=True,
    ),
    "groups": Alarm(
        _no_signal,
        "advantages within a group are zero: the policy gradient has nothing to learn from",
        "prompts that the student solves sometimes, or more rollout.samples_per_prompt",
    ),
    "not_finite": Alarm(
        _not_finite,
        "an overflow: nothing after it is worth anything",
        "a smaller optim.lr, a higher precision, and the last checkpoint before it",
        at_once=True,
    ),
}


@dataclass
class Watch:
    """Looks at the metrics of a run step by step."""

    raised: set[str] = field(default_factory=set)
    _first: list[Metrics] = field(default_factory=list)
    _last: deque[Metrics] = field(default_factory=lambda: deque(maxlen=LAST))
    _steps: int = 0

    def see(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """The next step's metrics; the alarms that it raises and no step before it did."""
        values = numbers(metrics)
        self._steps += 1
        self._last.append(values)
        if len(self._first) < FIRST:
            self._first.append(values)
        ready = self._steps >= FIRST + LAST  # before, the two windows overlap
        wanted = [n for n, a in ALARMS.items() if (ready or a.at_once) and n not in self.raised]
        said = judged(self._first, self._last, wanted)
        self.raised |= said.keys()
        return said


def judged(
    first: Sequence[Metrics], last: Sequence[Metrics], wanted: Iterable[str] = tuple(ALARMS)
) -> dict[str, str]:
    """The alarms (of `wanted`, in that order) that the last steps raise against the first ones."""
    start, now = means(first), means(last)
    finite = {name: value for name, value in now.items() if math.isfinite(value)}
    careful = {n: _towards(start.get(n, v), v, _error(first, last, n)) for n, v in finite.items()}
    found = {}
    for name in wanted:
        rule = ALARMS[name].rule
        if rule is _not_finite:
            found[name] = rule(start, now)
        elif ALARMS[name].at_once or rule(start, careful):
            found[name] = rule(start, finite)
    return {name: text for name, text in found.items() if text}


def _error(first: Sequence[Metrics], last: Sequence[Metrics], name: str) -> float:
    """The standard error of the difference of a metric's two means: steps as independent draws with
    the variance of the last ones (what went wrong within the first ones is no noise)."""
    values = [row[name] for row in last if name in row]
    count = sum(name in row for row in first)
    if len(values) < 2 or not count:
        return 0.0
    return (variance(values) * (1 / count + 1 / len(values))) ** 0.5


def _towards(start: float, now: float, error: float) -> float:
    """`now`, nearer to `start` by ERRORS errors, at most there."""
    less = max(0.0, abs(now - start) - ERRORS * error)
    return start + math.copysign(less, now - start)


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a line of metrics.jsonl is a number."""
    return {k: float(v) for k, v in line.items() if isinstance(v, int | float)}


def means(rows: Iterable[Metrics]) -> dict[str, float]:
    """Of each metric over the steps that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in found.items()}
