"""Self-distillation with privileged information, from the command line."""

import json

from tests.e2e.runs import columns, make_models, megaopd, opd_arguments


def test_the_student_as_its_own_teacher_that_knows_the_answer(tmp_path):
    student, _ = make_models(tmp_path)
    run_dir = tmp_path / "run"
    arguments = [a for a in opd_arguments(student, student, run_dir) if "teacher.path" not in a]
    seen = ["teacher.kind=live", "data.teacher_sees=answer", "data.teacher_text={pi}?{prompt}"]
    done = megaopd(*arguments, *seen, "run.steps=2", timeout=240)
    assert done.returncode == 0, done.stderr
    divergences = [float(kl) for (kl,) in columns(run_dir, "kl")]
    assert all(kl > 1e-4 for kl in divergences), "the teacher knows no more than the student"

    evaluated = megaopd(
        "eval", "--config", run_dir / "config.toml", "eval.prompts=8", f"run.dir={tmp_path / 'e'}",
        timeout=240,
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads((tmp_path / "e" / "evaluation.json").read_text())["figures"]
    assert found["pi_gap"] != 0 and abs(found["pi_gap"]) < 5


def test_a_teacher_that_follows_is_evaluated_as_it_was(tmp_path):
    """Not as another copy of the student, whose divergence from it is 0."""
    student, _ = make_models(tmp_path)
    run_dir, follows = tmp_path / "run", ["teacher.kind=ema", "teacher.ema_decay=0.9"]
    arguments = [a for a in opd_arguments(student, student, run_dir) if "teacher.path" not in a]
    seen = ["data.teacher_sees=answer", "data.teacher_text={pi}?{prompt}"]
    done = megaopd(*arguments, *follows, *seen, "run.steps=3", timeout=240)
    assert done.returncode == 0, done.stderr

    def evaluate(path):
        return megaopd(
            "eval", "--config", run_dir / "config.toml", "eval.prompts=8",
            f"student.path={path}", "data.teacher_sees=", "data.teacher_text=",
            f"run.dir={tmp_path / 'e'}", timeout=240,
        )  # fmt: skip

    kept = evaluate(run_dir / "checkpoints" / "step_00000003")
    assert kept.returncode == 0, kept.stderr
    record = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert record["teacher"] == "ema" and record["figures"]["kl"] > 1e-6
    lost = evaluate(student)
    assert lost.returncode == 2 and "teacher.kind = ema" in lost.stderr, lost.stderr
