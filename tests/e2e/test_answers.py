"""Runs whose loss is on the data's answers, with the student of the last epoch as teacher."""

from tests.e2e.runs import columns, make_models, megaopd

TASK = ["data.source=task:addition1", "rollout.max_new_tokens=4", "report.every=50"]
PSKD = [
    "objective.preset=pskd", "objective.target_steps=8", "mix.student_share=0",
    "teacher.kind=previous_epoch", "data.num_prompts=64", "rollout.prompts_per_step=32",
    "trainer.micro_batch_size=32", "optim.lr=8e-3",
]  # fmt: skip


def test_the_past_self_softens_the_answers(tmp_path):
    """It learns without sampling; an interrupted run goes on as the whole one."""
    student, _ = make_models(tmp_path)

    def run(name, steps):
        done = megaopd(
            "train", f"student.path={student}", f"run.dir={tmp_path / name}", *TASK, *PSKD,
            f"run.steps={steps}", timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr

    run("whole", 8)
    run("parts", 3)
    run("parts", 8)
    names = ("step", "loss", "grad_norm", "target_weight", "distill", "log_ratio")
    whole = columns(tmp_path / "whole", *names)
    assert columns(tmp_path / "parts", *names) == whole
    shares = [float(row[3]) for row in whole]
    assert shares == sorted(shares) and shares[0] == 0.1 and shares[-1] == 0.8
    # The teacher is the initial student in the first epoch of two steps, and then a newer one.
    assert float(whole[-1][1]) < 0.5 * float(whole[0][1])
