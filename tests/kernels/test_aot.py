"""Every kernel variant compiles for an H100 without one: no spills, 16-byte accesses."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reports():
    """name -> what the variant uses. In a process of its own: it must not interpret kernels."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    run = subprocess.run(
        [sys.executable, "-m", "megaopd.losses.kernels.aot"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


def test_nothing_spills(reports):
    assert len(reports) > 30
    for name, r in reports.items():
        assert r["stack"] == r["spill_stores"] == r["spill_loads"] == 0, name


def test_loads_are_16_bytes_wide(reports):
    """Also where the width is odd, except in the last block of a row."""
    for name, r in reports.items():
        assert r["wide_loads"] > 0, name
        assert (r["half_loads"] == 0) != ("odd width" in name), name


def test_gradients_are_stored_16_bytes_wide(reports):
    gradients = {n: r for n, r in reports.items() if n.startswith("gradient")}
    assert gradients
    assert all(r["wide_stores"] > 0 for r in gradients.values())


def test_the_documented_table_lists_these_variants(reports):
    """docs/kernels.md is written by tools/kernel_report.py."""
    rows = re.findall(
        r"^\| (.+?) \| (\d+) \| (\d+) \|", (ROOT / "docs/kernels.md").read_text(), re.M
    )
    assert rows == [(n, str(r["block"]), str(r["warps"])) for n, r in reports.items()]
