"""The other commands, as a user calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.runs import columns, make_models, megaopd, opd_arguments

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def test_doctor():
    said = megaopd("doctor")
    assert said.returncode == 0, said.stderr
    for text in ("megatron-core", "layer spec", "collectives"):
        assert text in said.stdout


def test_convert_there_and_back_by_the_tools(models, tmp_path):
    """Two tensor ranks there, two pipeline ranks back: every bit, config and tokenizer return."""
    import torch

    def tool(name, *arguments):
        command = [sys.executable, ROOT / "tools" / name, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    student = models[0]
    tool("convert_hf_to_megatron.py", "--hf", student, "--out", tmp_path / "megatron", "--tp", 2)
    tool(
        "convert_megatron_to_hf.py",
        "--megatron", tmp_path / "megatron", "--out", tmp_path / "back", "--pp", 2,
    )  # fmt: skip
    before = load_file(student / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).is_file()
    again = megaopd("convert", "hf-to-megatron", "--hf", student, "--out", tmp_path / "back")
    assert again.returncode == 2 and "not empty" in again.stderr


def test_multinode_script_and_report(models, tmp_path):
    """One node of two ranks under torchrun, then the report of what it left."""
    run_dir = tmp_path / "run"
    arguments = opd_arguments(*models, run_dir, "run.steps=2", "parallel.pipeline=2")
    settings = {**os.environ, "GPUS": "2", "PORT": "0", "RDZV_ID": tmp_path.name}
    settings["PATH"] = f"{Path(sys.executable).parent}:{settings['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / "launch" / "torchrun_multinode.sh", *arguments],
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in columns(run_dir, "step")] == ["1", "2"]
    said = megaopd("report", run_dir)
    assert said.returncode == 0, said.stderr
    assert "<svg" in (run_dir / "report.html").read_text()


def test_a_longer_run_follows_its_own_schedule(models, tmp_path):
    """Resumed with more steps, the learning rate is that of the longer cosine."""
    run = opd_arguments(*models, tmp_path / "run", "optim.decay=cosine")
    assert megaopd(*run, "run.steps=2").returncode == 0
    assert megaopd(*run, "run.steps=4").returncode == 0
    whole = opd_arguments(*models, tmp_path / "whole", "optim.decay=cosine", "run.steps=4")
    assert megaopd(*whole).returncode == 0
    resumed, straight = (columns(tmp_path / name, "lr") for name in ("run", "whole"))
    assert resumed[2:] == straight[2:]
