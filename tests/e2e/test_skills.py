"""Skill-SD from the command line: a bank that fills, and that an interrupted run takes up."""

from tests.e2e.runs import columns, make_models, megaopd, opd_arguments

SKILLS = [
    "objective.preset=skill_sd", "objective.coef=1.0", "rollout.samples_per_prompt=8",
    "teacher.kind=periodic", "teacher.sync_every=1", "data.teacher_sees=skill",
    "data.teacher_text={pi}?{prompt}", "data.source=task:addition1", "trainer.micro_batch_size=64",
]  # fmt: skip


def test_skills_from_earlier_steps(tmp_path):
    made, _ = make_models(tmp_path)
    sft = [
        "train", f"student.path={made}", f"run.dir={tmp_path / 'sft'}",
        "data.source=task:addition1", "objective.loss=sft", "rollout.prompts_per_step=128",
        "trainer.micro_batch_size=128", "optim.lr=8e-3", "run.steps=40",
        "rollout.max_new_tokens=4",
    ]  # fmt: skip
    done = megaopd(*sft, timeout=280)
    assert done.returncode == 0, done.stderr
    student = tmp_path / "sft" / "checkpoints" / "step_00000040"

    def run(name, steps):
        arguments = opd_arguments(student, student, tmp_path / name, *SKILLS)
        arguments = [a for a in arguments if "teacher.path" not in a]
        done = megaopd(*arguments, f"run.steps={steps}", timeout=280)
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
