"""The main job, whole: two models are made, distillation moves the student, it is exported."""

import json
import re

import pytest

from tests.e2e.runs import columns, megaopd


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("steps", [300, pytest.param(700, marks=pytest.mark.slow)])
def test_quickstart(tmp_path, steps):
    """As a user runs it (700 steps), and cut short."""
    run_dir = tmp_path / "quickstart"
    first = megaopd("quickstart", "--dir", run_dir, f"run.steps={steps}", timeout=1000)
    assert first.returncode == 0, first.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["accuracy_before"] < 0.5
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.2
    assert summary["kl_after"] < summary["kl_before"] / 3
    # Plain transformers scores the exported checkpoint on the same prompts.
    assert summary["transformers_accuracy"] == pytest.approx(summary["accuracy_after"], abs=2e-3)
    for said in ("greedy accuracy", "KL(student || teacher)", "tokens/s", "report:", "next:"):
        assert said in first.stdout

    for name in ("metrics.jsonl", "config.toml", "events.jsonl", "samples.jsonl"):
        assert (run_dir / name).stat().st_size
    page = (run_dir / "report.html").read_text()
    assert len(re.findall(r"<svg|<img", page)) >= 4
    assert not re.search(r"""(src|href)=["']https?:""", page)
    assert (run_dir / "export" / "model.safetensors").is_file()

    before = columns(run_dir, "step", "loss", "grad_norm")
    again = megaopd("quickstart", "--dir", run_dir, f"run.steps={steps}")
    assert again.returncode == 0, again.stderr
    assert "is there already" in again.stdout
    assert columns(run_dir, "step", "loss", "grad_norm") == before
    assert json.loads((run_dir / "summary.json").read_text())["kl_after"] == summary["kl_after"]

    evaluated = megaopd(
        "eval",
        "--config",
        run_dir / "config.toml",
        f"student.path={run_dir / 'export'}",
        f"run.dir={tmp_path / 'eval'}",
        "eval.samples=4",
        "eval.pass_k=[1,4]",
        "eval.control=task:addition3",
    )
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["figures"]
    accuracy = found["accuracy"]
    assert accuracy["value"] == pytest.approx(summary["accuracy_after"], abs=2e-3)
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert found["control_accuracy"] == accuracy, "the same prompts"
    once, any_of_4 = found["pass@1"]["value"], found["pass@4"]["value"]
    assert once == pytest.approx(found["sampled_accuracy"]["value"])
    assert any_of_4 >= once and found["kl"] > 0 and found["entropy"] > 0
    assert "pass@4" in evaluated.stdout
