"""A run whose teacher has a rank of its own, from the command line."""

import json

import pytest

from tests.e2e.runs import columns, make_models, megaopd, opd_arguments


def test_a_run_on_three_processes(tmp_path):
    """Student on two ranks, teacher on the third: the metrics of a run with both on two."""
    student, teacher = make_models(tmp_path)
    common = ["run.steps=4", "parallel.tensor=2", "eval.prompts=8", "checkpoint.every=2"]
    runs = {
        "same": [],
        "separate": ["teacher.placement=separate", "teacher_parallel.ranks=1"],
    }
    for name, more in runs.items():
        done = megaopd(*opd_arguments(student, teacher, tmp_path / name, *common, *more))
        assert done.returncode == 0, done.stderr
    names = ("loss", "grad_norm", "kl", "teacher_entropy")
    same, separate = (columns(tmp_path / name, *names) for name in runs)
    assert len(same) == len(separate) == 4
    for one, other in zip(same, separate, strict=True):
        assert list(map(float, other)) == pytest.approx(list(map(float, one)), rel=1e-4)
    received = columns(tmp_path / "separate", "teacher/received_bytes")
    assert all(float(size) > 0 for (size,) in received)
    summary = json.loads((tmp_path / "separate" / "summary.json").read_text())
    assert summary["kl_after"] < summary["kl_before"]
    # Another start finds the run finished; the teacher's rank is told so and ends too.
    again = megaopd(
        *opd_arguments(student, teacher, tmp_path / "separate", *common, *runs["separate"])
    )
    assert again.returncode == 0, again.stderr
