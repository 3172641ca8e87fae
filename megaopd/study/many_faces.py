"""The questions of "The Many Faces of On-Policy Distillation" (arXiv 2605.11182) at laptop scale.

One factor at a time around a centre: reverse KL on the student's top k, gradient stopped, from a
larger teacher. What is run is in CASES; what counts as the paper's finding is in FINDINGS, written
before any run. Everything is done by ordinary runs (study/stages.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from megaopd.recipes import merged

KS = (1, 2, 5)  # of 18 tokens
TRUNCATED = ("unnorm", "sg", "renorm", "tail", "intersect")


@dataclass(frozen=True)
class Case:
    """One run of each seed: its name, which question it belongs to, and its values."""

    name: str
    question: int
    values: Mapping[str, Any] = field(default_factory=dict)


def _truncated(variant: str, k: int) -> dict[str, Any]:
    chosen = {"loss": "rkl", "support": "student_topk", "k": k, "variant": variant}
    if variant == "intersect":
        chosen["support"] = "intersection"
    return {"objective": {**chosen, "i_know_biased": variant == "unnorm"}}


def _loss(**values: Any) -> dict[str, Any]:
    return {"objective": {"stats_k": 2, **values}}


CENTRE = _truncated("sg", 2)
TOLD = "{pi}?{prompt}"
SEES = {"data": {"teacher_sees": "answer", "teacher_text": TOLD}}
SELF = {"teacher": {"path": "", "kind": "periodic", "sync_every": 40}}

# Question 4: the teacher is the student as it began, and sees a key (data/tasks/keyed.py).
KEYS = 3


def _keyed(source: str, loss: str) -> dict[str, Any]:
    return {
        "student": {"path": "{keyed_student}"},
        "teacher": {"path": "{keyed_student}"},
        "data": {"source": f"task:{source}", "teacher_sees": "solution", "teacher_text": TOLD},
        "rollout": {"max_new_tokens": 2},
        "objective": {"loss": loss},
    }


def _reader(sight: str) -> dict[str, Any]:
    values = merged(_loss(loss="jsd"), {"student": {"path": "{told_student}"}})
    seen = {"data": {"teacher_sees": sight, "teacher_text": TOLD}}
    return values if sight == "nothing" else merged(values, seen)


# The block of question 3: where the student comes from x the teacher x what the teacher sees.
STUDENTS = {"raw": "{raw_student}", "SFT": "{student}"}
TEACHERS = {
    "larger": "{told_teacher}",
    "RL": "{grpo_teacher}",
    "RL told": "{told_grpo_teacher}",
}
SIGHTS = ("nothing", "answer", "solution")
BLOCK_LOSSES: dict[str, dict[str, Any]] = {"sg": CENTRE, "full": _loss(loss="rkl")}


def block_name(student: str, teacher: str, sight: str, loss: str) -> str:
    return f"{student} student, {teacher} teacher, sees {sight}, {loss}"


def _block() -> Iterator["Case"]:
    for student, start in STUDENTS.items():
        for teacher, path in TEACHERS.items():
            for sight in SIGHTS:
                for loss, objective in BLOCK_LOSSES.items():
                    values = merged(
                        objective, {"student": {"path": start}, "teacher": {"path": path}}
                    )
                    if sight != "nothing":
                        seen = {"teacher_sees": sight, "teacher_text": TOLD}
                        values = merged(values, {"data": seen})
                    yield Case(block_name(student, teacher, sight, loss), 3, values)


CASES: tuple[Case, ...] = (
    # 1: the loss, over k; the sampled estimators are question 6 too
    Case("full", 1, _loss(loss="rkl")),
    *(Case(f"{v}, k={k}", 1, _truncated(v, k)) for v in TRUNCATED for k in KS),
    Case("sampled, k2", 6, _loss(loss="k2")),
    Case("sampled, pg", 6, _loss(loss="pg")),
    Case("vopd", 6, {"objective": {"loss": "vopd", "baseline": "topk", "baseline_k": 5}}),
    # 1: the teacher
    Case("same-size RL teacher", 2, merged(CENTRE, {"teacher": {"path": "{grpo_teacher}"}})),
    Case(
        "same-size RL teacher that sees the answer",
        2,
        merged(merged(CENTRE, SEES), {"teacher": {"path": "{grpo_teacher}"}}),
    ),
    Case("larger teacher that sees the answer", 2, merged(CENTRE, SEES)),
    # 4: the student as its own teacher
    Case("self, sees the answer", 4, merged(merged(_loss(loss="jsd"), SEES), SELF)),
    Case("self, sees nothing", 4, merged(_loss(loss="jsd"), SELF)),
    # One that has learnt to read what it is shown.
    *(
        Case(f"self that can read, sees {sight}", 4, merged(_reader(sight), SELF))
        for sight in ("nothing", "answer", "solution")
    ),
    Case("key of its own", 4, _keyed(f"hidden{KEYS}", "rkl")),
    Case("key of its own, forward KL", 4, _keyed(f"hidden{KEYS}", "fkl")),
    Case("shared rule", 4, _keyed(f"rule{KEYS}", "rkl")),
    Case("shared rule, forward KL", 4, _keyed(f"rule{KEYS}", "fkl")),
    # 5: where the student comes from
    Case("raw student", 5, merged(CENTRE, {"student": {"path": "{raw_student}"}})),
    Case("raw student, full", 5, merged(_loss(loss="rkl"), {"student": {"path": "{raw_student}"}})),
    *_block(),
)
CENTRE_NAME = "sg, k=2"

# Of a case and seed: accuracy, before, kl (exact, to the case's teacher), entropy, mass (the last
# on the support), mass_first.
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
        "A stabilised student ends above a raw one, mean over the block of 18",
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
        "A student that supervised fine-tuning stabilised ends above a raw one",
        (CENTRE_NAME, "raw student"),
        lambda f: f[CENTRE_NAME]["accuracy"] > f["raw student"]["accuracy"],
        ("before", "accuracy"),
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
)

PREFIX_FINDING = (
    "The teacher's accuracy falls as it continues longer prefixes of the student "
    "(shortest against longest, every seed)"
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


def prefix_verdict(by_seed: Mapping[int, Sequence[float]]) -> str:
    """Question 2: by_seed holds accuracies from no prefix to the longest."""
    return _verdict([values[-1] < values[0] for values in by_seed.values()])


def _verdict(found: Sequence[bool]) -> str:
    """Of a finding, by whether it shows with each seed."""
    if not found:
        return "not testable"
    if all(found):
        return "reproduced"
    return f"mixed ({sum(found)} of {len(found)} seeds)" if any(found) else "not reproduced"
