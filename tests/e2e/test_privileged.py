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
