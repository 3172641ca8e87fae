"""The Triton kernels in Triton's interpreter, in one process of their own: interpreter_cases.py."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megaopd.losses.kernels as package
from megaopd.losses.kernels import launch
from tests.kernels.interpreter_cases import CASES

ROOT = Path(__file__).parents[2]


def interpreted(module):
    """What a module prints as JSON. Triton reads TRITON_INTERPRET when it is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    run = subprocess.run(
        [sys.executable, "-m", module],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results():
    """case -> None or the traceback."""
    return interpreted("tests.kernels.interpreter_cases")


def test_the_engine_on_the_kernels():
    """Losses and gradients from logits and from hidden states, against the dense fp64 reference."""
    found = interpreted("tests.kernels.engine_cases")
    assert len(found) == 37
    bad = {
        case: error
        for case, error in found.items()
        if not error < (1e-2 if "bfloat16" in case else 2e-6)
    }
    assert not bad


@pytest.mark.parametrize("case", CASES)
def test_equals_fp64(results, case):
    assert results[case] is None, results[case]


def test_imports_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megaopd.losses.kernels.triton_shard", raising=False)
    monkeypatch.delattr(package, "triton_shard", raising=False)
    for cached in (launch.available, launch._kernels):
        cached.cache_clear()
    assert not launch.available()
    launch.available.cache_clear()
