"""Several optimizer steps per rollout, from the command line."""

from tests.e2e.runs import columns, make_models, megaopd, opd_arguments

SEVERAL = [
    "trainer.mini_batches=2", "trainer.epochs=2", "rollout.samples_per_prompt=2",
    "objective.loss=pg", "objective.clip_low=0.1", "objective.clip_high=0.1", "optim.lr=1e-2",
]  # fmt: skip


def test_a_run_that_is_taken_up_goes_on_as_the_whole_one(tmp_path):
    student, teacher = make_models(tmp_path)

    def run(name, steps):
        arguments = opd_arguments(student, teacher, tmp_path / name, *SEVERAL)
        done = megaopd(*arguments, f"run.steps={steps}", timeout=240)
        assert done.returncode == 0, done.stderr

    run("whole", 4)
    run("parts", 2)
    run("parts", 4)
    names = ("step", "loss", "grad_norm", "lr", "updates", "ratio/clipped", "ratio/k3")
    whole = columns(tmp_path / "whole", *names)
    assert columns(tmp_path / "parts", *names) == whole
    assert [row[4] for row in whole] == ["4.0"] * 4
    assert any(float(row[5]) > 0 for row in whole), "nothing is ever clipped"
