"""Skill-SD from the command line: a bank that fills, and that an interrupted run takes up."""

from pathlib import Path

import pytest

from megaopd.data.tokenizer import TOY_SYMBOLS, char_tokenizer
from tests.e2e.runs import columns, make_models, megaopd, opd_arguments

SKILLS = [
    "objective.preset=skill_sd", "objective.coef=1.0", "rollout.samples_per_prompt=8",
    "teacher.kind=periodic", "teacher.sync_every=1", "data.teacher_sees=skill",
    "data.teacher_text={pi}?{prompt}", "data.source=task:addition1", "trainer.micro_batch_size=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """One that gets most one-digit sums right."""
    root = tmp_path_factory.mktemp("student")
    made, _ = make_models(root)
    # A line break, which stands around observations, in place of the space, which no sum here has.
    char_tokenizer(TOY_SYMBOLS.replace(" ", "\n")).save_pretrained(made)
    sft = [
        "train", f"student.path={made}", f"run.dir={root / 'sft'}",
        "data.source=task:addition1", "objective.loss=sft", "rollout.prompts_per_step=128",
        "trainer.micro_batch_size=128", "optim.lr=8e-3", "run.steps=40",
        "rollout.max_new_tokens=4",
    ]  # fmt: skip
    done = megaopd(*sft, timeout=280)
    assert done.returncode == 0, done.stderr
    return root / "sft" / "checkpoints" / "step_00000040"


def arguments(student, run_dir, *overrides):
    """The student of the last step is the teacher."""
    made = opd_arguments(student, student, run_dir, *SKILLS, *overrides)
    return [one for one in made if "teacher.path" not in one]


def test_skills_from_earlier_steps(student, tmp_path):
    def run(name, steps):
        done = megaopd(*arguments(student, tmp_path / name), f"run.steps={steps}", timeout=280)
        assert done.returncode == 0, done.stderr

    run("whole", 4)
    run("parts", 2)
    run("parts", 4)
    names = ("step", "loss", "grad_norm", "distill", "log_ratio", "skills", "reward")
    whole = columns(tmp_path / "whole", *names)
    assert columns(tmp_path / "parts", *names) == whole
    skills = [float(row[5]) for row in whole]
    assert skills[0] == 0 < skills[1] and skills == sorted(skills), "nothing comes into the bank"
    # Without a skill the teacher is the student itself; with one it says something else.
    assert abs(float(whole[0][4])) < 1e-6 < abs(float(whole[-1][4]))


def test_skills_of_episodes_with_an_environment(student, tmp_path):
    """Several turns: only the student's tokens count, and a skill is a whole trajectory."""
    plugin = Path(__file__).with_name("two_turns.py")
    done = megaopd(
        *arguments(student, tmp_path / "run"), "data.source=task:two_turns_of_addition1",
        f"run.plugins=['{plugin}']", "run.steps=4", "checkpoint.every=1", timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = columns(
        tmp_path / "run",
        "skills",
        "reward",
        "log_ratio",
        "agent/turns",
        "agent/tokens",
        "agent/sampled_tokens",
    )
    numbers = [[float(x) for x in row] for row in rows]
    assert numbers[0][0] == 0 < numbers[1][0], "nothing comes into the bank"
    for _, reward, _, turns, tokens, sampled in numbers:
        assert reward > 0.1 and turns == 2 and tokens == sampled + 3  # the question
    assert abs(numbers[0][2]) < 1e-6 < abs(numbers[-1][2])
