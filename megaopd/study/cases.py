"""What the study runs: one factor at a time around a centre, blocks of factors, and the full grid.

The centre is reverse KL on the student's top k, gradient stopped, from a larger teacher. Every case
is an ordinary run (study/stages.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from megaopd.data.tasks.coached import BRIEF, FRONT, MASKED, THOUGHTS
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
SEES = {"data": {"teacher_sees": "answer", "teacher_text": FRONT}}
SELF = {"teacher": {"path": "", "kind": "periodic", "sync_every": 40}}

# Question 4: the teacher is the student as it began, and sees a key (data/tasks/keyed.py).
KEYS = 3


def _keyed(source: str, loss: str) -> dict[str, Any]:
    return {
        "student": {"path": "{keyed_student}"},
        "teacher": {"path": "{keyed_student}"},
        "data": {"source": f"task:{source}", "teacher_sees": "solution", "teacher_text": FRONT},
        "rollout": {"max_new_tokens": 2},
        "objective": {"loss": loss},
    }


def _reader(sight: str) -> dict[str, Any]:
    values = merged(_loss(loss="jsd"), {"student": {"path": "{told_student}"}})
    seen = {"data": {"teacher_sees": sight, "teacher_text": FRONT}}
    return values if sight == "nothing" else merged(values, seen)


# Question 7: what the teacher sees, for a student that can read all of it (data/tasks/coached.py).
SEEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "answer": {"teacher_sees": "answer", "teacher_text": FRONT},
    "solution": {"teacher_sees": "solution", "teacher_text": FRONT},
    "half of the solution": {**MASKED, "teacher_text": FRONT},
    "thoughts": {"teacher_sees": "think", "teacher_text": THOUGHTS},
}
BRIEFLY = {
    "source": "task:worked_addition2",
    "teacher_sees": "instruction",
    "teacher_text": BRIEF,
}
ALONE = _loss(loss="jsd")
GROUPS: dict[str, Any] = {
    "rollout": {"prompts_per_step": 48, "samples_per_prompt": 8},
    "trainer": {"micro_batch_size": 128},
    "optim": {"lr": 1e-3},
}
REWEIGHED = {"objective": {"preset": "opsd_grpo", "stats_k": 2}, **GROUPS}
PLAIN_GRPO = {"objective": {"preset": "grpo"}, "teacher": {"path": ""}, **GROUPS}


def _own(start: str, data: Mapping[str, Any], objective: Mapping[str, Any]) -> dict[str, Any]:
    """The student as it began is its teacher."""
    values = {"student": {"path": start}, "teacher": {"path": start}, "data": dict(data)}
    return merged(values, objective)


def _sights() -> Iterator["Case"]:
    coached, brief = "{coached_student}", "{brief_student}"
    for seen, data in SEEN.items():
        yield Case(f"own teacher, sees {seen}", 7, _own(coached, data, ALONE))
    yield Case(
        "own teacher that follows, sees answer",
        7,
        merged(_own(coached, SEEN["answer"], ALONE), SELF),
    )
    yield Case("GRPO", 7, _own(coached, {}, PLAIN_GRPO))
    for seen, data in SEEN.items():
        if data:
            yield Case(f"GRPO reweighed, sees {seen}", 7, _own(coached, data, REWEIGHED))
    long = {"rollout": {"max_new_tokens": 6}}
    task = {"source": BRIEFLY["source"]}
    yield Case("own teacher, asked to be brief", 7, merged(_own(brief, BRIEFLY, ALONE), long))
    yield Case("GRPO, two steps", 7, merged(_own(brief, task, PLAIN_GRPO), long))
    yield Case(
        "GRPO reweighed, asked to be brief", 7, merged(_own(brief, BRIEFLY, REWEIGHED), long)
    )


def _stabilised() -> Iterator["Case"]:
    """The paper's two ways: fine-tuning on the teacher's responses before, and beside it."""
    beside = {
        "objective": {"sft_coef": 1.0},
        "mix": {"source": "{teacher_responses}", "least_reward": 1.0, "per_step": 32},
    }
    for name, loss in (("", CENTRE), (", full", _loss(loss="rkl"))):
        yield Case(f"cold start{name}", 5, merged(loss, {"student": {"path": "{cold_student}"}}))
        yield Case(f"teacher's responses beside{name}", 5, merged(loss, beside))


# The block of question 3: where the student comes from x the teacher x what the teacher sees.
STUDENTS = {"raw": "{raw_student}", "SFT": "{student}"}
TEACHERS = {
    "larger": "{told_teacher}",
    "RL": "{grpo_teacher}",
    "RL told": "{told_grpo_teacher}",
}
SIGHTS = ("nothing", "answer", "solution")
# And the grid, an option: the block at every other loss. In the block "sg" has the centre's k.
GRID_LOSSES: dict[str, dict[str, Any]] = {
    **{f"{v}, k={k}": _truncated(v, k) for v in TRUNCATED for k in KS if (v, k) != ("sg", 2)},
    "sampled": _loss(loss="pg"),
}
BLOCK_LOSSES: dict[str, dict[str, Any]] = {"sg": CENTRE, "full": _loss(loss="rkl")}


def block_name(student: str, teacher: str, sight: str, loss: str) -> str:
    return f"{student} student, {teacher} teacher, sees {sight}, {loss}"


def _block(losses: Mapping[str, Mapping[str, Any]], question: int) -> Iterator["Case"]:
    for (student, start), (teacher, path), sight, loss in product(
        STUDENTS.items(), TEACHERS.items(), SIGHTS, losses
    ):
        values = merged(losses[loss], {"student": {"path": start}, "teacher": {"path": path}})
        if sight != "nothing":
            values = merged(values, {"data": {"teacher_sees": sight, "teacher_text": FRONT}})
        yield Case(block_name(student, teacher, sight, loss), question, values)


CASES: tuple[Case, ...] = (
    # 1: the loss, over k; the sampled estimators are question 6 too
    Case("full", 1, _loss(loss="rkl")),
    *(Case(f"{v}, k={k}", 1, _truncated(v, k)) for v in TRUNCATED for k in KS),
    Case("sampled, k2", 6, _loss(loss="k2")),
    Case("sampled, pg", 6, _loss(loss="pg")),
    Case("vopd", 6, {"objective": {"loss": "vopd", "baseline": "topk", "baseline_k": 5}}),
    # 2: the teacher
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
    *_stabilised(),
    *_block(BLOCK_LOSSES, 3),
    *_sights(),
)
GRID: tuple[Case, ...] = tuple(_block(GRID_LOSSES, 8))
BY_NAME = {case.name: case for case in (*CASES, *GRID)}
CENTRE_NAME = "sg, k=2"

# Question 2: the first two tokens do not decide whether a response is right (tasks/coached.py).
PREFIXES = (0, 1, 2)
WORKED: dict[str, Any] = {
    "data": {"source": "task:worked_addition2"},
    "rollout": {"max_new_tokens": 6},
}


@dataclass(frozen=True)
class Extra:
    """What is found of a seed in another way than by a run of its own."""

    question: int
    stages: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)


EXTRAS: dict[str, Extra] = {
    "prefixes": Extra(
        2, ("worked_responses", "worked_teacher"), {"lengths": list(PREFIXES), **WORKED}
    ),
    "system": Extra(9),
    "noise": Extra(6, ("student_responses", "student", "teacher")),
}
