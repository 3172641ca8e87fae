"""A run from the command line whose teacher has a GPU of its own, or gives its memory back."""

import json

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


def require_gpus(count):
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, found {torch.cuda.device_count()}")


def losses(root, name, *more):
    """[(loss, grad_norm)] of a short bf16 run."""
    from tests.e2e.runs import columns, make_models, megaopd, opd_arguments

    if not (root / "student").exists():
        make_models(root)
    overrides = ["run.steps=4", "student.dtype=bfloat16", "teacher.dtype=bfloat16", *more]
    done = megaopd(
        *opd_arguments(root / "student", root / "teacher", root / name, *overrides), timeout=900
    )
    assert done.returncode == 0, done.stderr
    return [tuple(map(float, row)) for row in columns(root / name, "loss", "grad_norm")]


def test_an_offloaded_teacher_on_one_gpu(tmp_path):
    """Weights that come back from the host are the same bit for bit."""
    require_gpus(1)
    assert losses(tmp_path, "here") == losses(tmp_path, "away", "teacher.offload=true")


def test_a_teacher_on_a_gpu_of_its_own(tmp_path):
    """Hidden states over NCCL: the same law, and samples that may part ways by bf16 rounding."""
    require_gpus(2)
    more = ["teacher.placement=separate", "teacher_parallel.ranks=1"]
    (first, _), *_ = losses(tmp_path, "here")
    (other, _), *_ = losses(tmp_path, "separate", *more)
    assert other == pytest.approx(first, rel=2e-2)
    lines = (tmp_path / "separate" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["teacher/received_bytes"] > 0 for line in lines)
