"""Packed rows and context parallelism through Transformer Engine's own attention."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
# bf16 keeps 8 bits; the layouts sum in other orders.
LOSS, NORM = 2e-2, 5e-2


def table(tmp_path, *names):
    """{layout: row} of tools/layout_table.py on this machine's GPUs."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    command = [sys.executable, "tools/layout_table.py", "--cuda", "--dtype", "bfloat16"]
    command += ["--steps", "3", "--out", str(tmp_path / "layouts"), "--only", *names]
    run = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=1800
    )
    assert run.returncode == 0, run.stderr[-4000:]
    rows = json.loads((tmp_path / "layouts.json").read_text())["rows"]
    return {row["layout"]: row for row in rows}


def require_gpus(count):
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, found {torch.cuda.device_count()}")


def test_packed_rows_on_one_gpu(tmp_path):
    row = table(tmp_path, "packed")["packed"]
    assert row["loss"] < LOSS and row["grad_norm"] < NORM, row


@pytest.mark.parametrize("name", ["cp2", "packed-cp2", "packed-tp2-sp", "pp2-vpp2", "packed-dp2"])
def test_layouts_of_two_gpus(tmp_path, name):
    require_gpus(2)
    row = table(tmp_path, name)[name]
    assert row["loss"] < LOSS and row["grad_norm"] < NORM, row
