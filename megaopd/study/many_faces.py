"""The questions of "The Many Faces of On-Policy Distillation" (arXiv 2605.11182) at laptop scale.

What is run is in cases.py; what counts as the paper's finding is in FINDINGS, written before any
run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megaopd.study.cases import (
    BLOCK_LOSSES,
    CENTRE_NAME,
    KEYS,
    SEEN,
    SIGHTS,
    STUDENTS,
    TEACHERS,
    block_name,
)

# Of a case and seed: accuracy, before, kl (exact, to the case's teacher), entropy, mass (the last
# on the support), mass_first, length_first and length (tokens of a response).
Figures = Mapping[str, float]
Table = Mapping[str, Mapping[int, Figures]]


@dataclass(frozen=True)
class Finding:
    """A line of the paper: what it says, the cases that it is about, and the rule of a verdict.

    holds: of one seed, by case name: whether the finding shows there.
    """

    says: str
    cases: tuple[str, ...]
    holds: Callable[[Mapping[str, Figures]], bool]
    shows: tuple[str, ...] = ("accuracy",)  # the figures that are printed as evidence

    def verdict(self, table: Table) -> str:
        """reproduced: with every seed; not reproduced: with none; mixed; not testable: no run."""
        seeds = set.intersection(*(set(table.get(name, {})) for name in self.cases))
        return _verdict([self.holds({n: table[n][s] for n in self.cases}) for s in sorted(seeds)])

    def evidence(self, table: Table) -> str:
        """Means over the seeds of what it is about; of a whole block, by the first word."""
        if len(self.cases) > 4:
            return self._by_first_word(table)
        parts = []
        for name in self.cases:
            rows = list(table.get(name, {}).values())
            means = [f"{key} {fmean(r[key] for r in rows):.3f}" for key in self.shows if rows]
            parts.append(f"{name}: {', '.join(means) or 'no run'}")
        return "; ".join(parts)

    def _by_first_word(self, table: Table) -> str:
        rows: dict[str, list[float]] = {}
        for name in self.cases:
            values = [r["accuracy"] for r in table.get(name, {}).values()]
            rows.setdefault(name.split()[0], []).extend(values)
        return "; ".join(f"{word}: accuracy {fmean(v):.3f}" for word, v in rows.items() if v)


def _mass_falls(k: int) -> Callable[[Mapping[str, Figures]], bool]:
    def holds(f: Mapping[str, Figures]) -> bool:
        biased, fixed = f[f"unnorm, k={k}"], f[f"sg, k={k}"]
        return biased["mass"] < biased["mass_first"] - 0.15 and biased["mass"] < fixed["mass"]

    return holds


def _less(f: Mapping[str, Figures], name: str, than: str) -> bool:
    """Whether a case of the block ends below the one whose teacher sees something else."""
    seen = next(sight for sight in SIGHTS if f"sees {sight}" in name)
    return f[name]["accuracy"] < f[name.replace(f"sees {seen}", f"sees {than}")]["accuracy"]


def _mean_of(f: Mapping[str, Figures], start: str) -> float:
    return fmean(figures["accuracy"] for name, figures in f.items() if name.startswith(start))


def _gain(figures: Figures) -> float:
    return figures["accuracy"] - figures["before"]


def _of_its_own(seen: str) -> str:
    return f"each question's {seen}" if seen != "half of the solution" else f"{seen} of each"


def _gains_nothing(name: str) -> Callable[[Mapping[str, Figures]], bool]:
    return lambda f: _gain(f[name]) <= 0.02


def _no_harm(name: str) -> Callable[[Mapping[str, Figures]], bool]:
    return lambda f: f[name]["accuracy"] >= f["GRPO"]["accuracy"] - 0.02


FINDINGS: tuple[Finding, ...] = (
    *(
        Finding(
            f"The plain top-{k} gradient drives the student's mass out of the support "
            "(it falls by more than 0.15, and below that of the stopped gradient)",
            (f"unnorm, k={k}", f"sg, k={k}"),
            _mass_falls(k),
            ("mass_first", "mass"),
        )
        for k in (1, 2)
    ),
    Finding(
        "Its exact KL to the teacher ends above that of the stopped gradient (k = 2)",
        ("unnorm, k=2", "sg, k=2"),
        lambda f: f["unnorm, k=2"]["kl"] > f["sg, k=2"]["kl"],
        ("kl", "accuracy"),
    ),
    Finding(
        "Its accuracy ends below (k = 2)",
        ("unnorm, k=2", "sg, k=2"),
        lambda f: f["unnorm, k=2"]["accuracy"] < f["sg, k=2"]["accuracy"],
    ),
    Finding(
        "The fixes (stopped gradient, tail) come within 0.05 of the full divergence (k = 5)",
        ("sg, k=5", "tail, k=5", "full"),
        lambda f: (
            min(f["sg, k=5"]["accuracy"], f["tail, k=5"]["accuracy"]) > f["full"]["accuracy"] - 0.05
        ),
    ),
    Finding(
        "A teacher of the student's size that RL adapted beats a larger one",
        ("same-size RL teacher", CENTRE_NAME),
        lambda f: f["same-size RL teacher"]["accuracy"] > f[CENTRE_NAME]["accuracy"],
    ),
    Finding(
        "So it does with the full divergence",
        (block_name("SFT", "RL", "nothing", "full"), "full"),
        lambda f: f[block_name("SFT", "RL", "nothing", "full")]["accuracy"] > f["full"]["accuracy"],
    ),
    Finding(
        "Showing the answer to the teacher hurts (larger teacher, which has learnt to read it)",
        tuple(block_name("SFT", "larger", sight, "sg") for sight in ("answer", "nothing")),
        lambda f: _less(f, block_name("SFT", "larger", "answer", "sg"), "nothing"),
    ),
    Finding(
        "So does the solution",
        tuple(block_name("SFT", "larger", sight, "sg") for sight in ("solution", "nothing")),
        lambda f: _less(f, block_name("SFT", "larger", "solution", "sg"), "nothing"),
    ),
    Finding(
        "A student that knows more to begin with ends above a raw one, mean over the block of 18",
        tuple(
            block_name(s, t, sight, loss)
            for s in STUDENTS
            for t in TEACHERS
            for sight in SIGHTS
            for loss in BLOCK_LOSSES
        ),
        lambda f: _mean_of(f, "SFT student") > _mean_of(f, "raw student"),
    ),
    Finding(
        "Self-distillation with the answer as privileged information gains nothing (at most 0.02), "
        "of a student that has learnt to read it",
        ("self that can read, sees answer", "self that can read, sees nothing"),
        lambda f: _gain(f["self that can read, sees answer"]) <= 0.02,
        ("before", "accuracy"),
    ),
    Finding(
        "So it does with the solution",
        ("self that can read, sees solution", "self that can read, sees nothing"),
        lambda f: _gain(f["self that can read, sees solution"]) <= 0.02,
        ("before", "accuracy"),
    ),
    Finding(
        "What the teacher cannot read destroys the student (a loss of more than 0.1)",
        ("self, sees the answer", "self, sees nothing"),
        lambda f: _gain(f["self, sees the answer"]) < -0.1,
        ("before", "accuracy"),
    ),
    Finding(
        f"A key of each instance's own as privileged information teaches nothing "
        f"(at most 1/{KEYS} + 0.05)",
        ("key of its own",),
        lambda f: f["key of its own"]["accuracy"] <= 1 / KEYS + 0.05,
        ("before", "accuracy"),
    ),
    Finding(
        "A shared rule as privileged information is learnt (0.9 and more)",
        ("shared rule",),
        lambda f: f["shared rule"]["accuracy"] >= 0.9,
        ("before", "accuracy"),
    ),
    Finding(
        "With keys of their own, reverse KL leads to the geometric mean of the teacher's laws: "
        "the student ends nearer to it than to the arithmetic one, and than it began",
        ("key of its own",),
        lambda f: (
            f["key of its own"]["to_geometric"]
            < min(f["key of its own"]["to_arithmetic"], f["key of its own"]["before_to_geometric"])
        ),
        ("before_to_geometric", "to_geometric", "to_arithmetic", "apart"),
    ),
    Finding(
        "Forward KL leads to the arithmetic one",
        ("key of its own, forward KL",),
        lambda f: (
            f["key of its own, forward KL"]["to_arithmetic"]
            < f["key of its own, forward KL"]["to_geometric"]
        ),
        ("to_geometric", "to_arithmetic"),
    ),
    Finding(
        "More supervised fine-tuning before makes distillation gain more (it ends higher, and "
        "began higher)",
        (CENTRE_NAME, "raw student"),
        lambda f: _gain(f[CENTRE_NAME]) > _gain(f["raw student"]),
        ("before", "accuracy"),
    ),
    *(
        Finding(
            f"{way} the student: it ends above the same distillation without ({what})",
            (f"{case}{suffix}", without),
            lambda f, with_it=f"{case}{suffix}", without=without: (
                f[with_it]["accuracy"] > f[without]["accuracy"]
            ),
            ("before", "accuracy"),
        )
        for way, case in (
            ("A cold start on the teacher's responses stabilises", "cold start"),
            ("The teacher's responses in every step stabilise", "teacher's responses beside"),
        )
        for suffix, without, what in (
            ("", CENTRE_NAME, "top 2, stopped gradient"),
            (", full", "full", "full divergence"),
        )
    ),
    Finding(
        "The full divergence ends above the sampled-token policy gradient",
        ("full", "sampled, pg"),
        lambda f: f["full"]["accuracy"] > f["sampled, pg"]["accuracy"],
    ),
    Finding(
        "A baseline helps the sampled-token policy gradient (vOPD)",
        ("vopd", "sampled, pg"),
        lambda f: f["vopd"]["accuracy"] > f["sampled, pg"]["accuracy"],
    ),
    *(
        Finding(
            "Self-distillation gains nothing (at most 0.02) from the student as it began, "
            f"which sees {_of_its_own(seen)}",
            (f"own teacher, sees {seen}",),
            _gains_nothing(f"own teacher, sees {seen}"),
            ("before", "accuracy", "kl"),
        )
        for seen in SEEN
        if seen != "nothing"
    ),
    Finding(
        "A self-teacher that follows the student ends below the one that stays as it began "
        "(sees the answer)",
        ("own teacher that follows, sees answer", "own teacher, sees answer"),
        lambda f: (
            f["own teacher that follows, sees answer"]["accuracy"]
            < f["own teacher, sees answer"]["accuracy"]
        ),
    ),
    Finding(
        "A conciseness instruction is learnt: responses become a fourth shorter and accuracy loses "
        "at most 0.05",
        ("own teacher, asked to be brief",),
        lambda f: (
            f["own teacher, asked to be brief"]["length"]
            <= 0.75 * f["own teacher, asked to be brief"]["length_first"]
            and _gain(f["own teacher, asked to be brief"]) >= -0.05
        ),
        ("length_first", "length", "before", "accuracy"),
    ),
    *(
        Finding(
            f"As a reweighting of GRPO, a teacher that sees {_of_its_own(seen)} does no harm "
            "(at most 0.02 below GRPO alone)",
            (f"GRPO reweighed, sees {seen}", "GRPO"),
            _no_harm(f"GRPO reweighed, sees {seen}"),
        )
        for seen in SEEN
        if seen != "nothing"
    ),
)

PREFIX_FINDING = (
    "The teacher's accuracy falls as it continues longer prefixes of the student, which do not "
    "decide the answer (shortest against longest, every seed)"
)


NOISE_FINDING = (
    "A baseline lowers the variance of the sampled-token policy gradient and leaves it unbiased "
    "(vOPD's top 5 against none; bias below 1e-6)"
)


def noise_verdict(by_seed: Mapping[int, Mapping[str, Figures]]) -> str:
    """Question 6: by_seed holds study/laws.py estimator_noise."""
    return _verdict(
        [
            found["vopd, top 5"]["noise"] < found["pg"]["noise"]
            and max(found[name]["bias"] for name in ("vopd, top 5", "pg")) < 1e-6
            for found in by_seed.values()
        ]
    )


SYSTEM_FINDING = (
    "A system prompt that all prompts share is learnt by a real model: its KL to itself with that "
    "prompt falls by half, on questions of other topics"
)


def system_verdict(by_seed: Mapping[int, Mapping[str, Any]]) -> str:
    """Question 9: by_seed holds study/system_prompt.py internalise."""
    return _verdict([s["after"]["kl"] <= 0.5 * s["before"]["kl"] for s in by_seed.values()])


def prefix_verdict(by_seed: Mapping[int, Mapping[str, Sequence[float]]]) -> str:
    """Question 2: by_seed holds study/prefixes.py continuations."""
    return _verdict([found["all"][-1] < found["all"][0] for found in by_seed.values()])


def _verdict(found: Sequence[bool]) -> str:
    """Of a finding, by whether it shows with each seed."""
    if not found:
        return "not testable"
    if all(found):
        return "reproduced"
    return f"mixed ({sum(found)} of {len(found)} seeds)" if any(found) else "not reproduced"
