"""Tiny variants really run, shortened: few steps, short stages, one-digit sums."""

import json

import pytest

from megaopd.recipes import method, methods
from tests.e2e.runs import columns, megaopd

QUICK = ("full_rkl", "grpo")  # the others are slow, together
SHORT = [
    "run.steps=3", "optim.warmup_steps=1", "eval.prompts=32", "data.source=task:addition1",
    "rollout.prompts_per_step=16", "trainer.micro_batch_size=16", "report.every=3",
]  # fmt: skip
# Models that get some of the answers right, and files with both kinds of responses.
STAGES = [
    "run.steps=50", "optim.lr=8e-3", "optim.warmup_steps=5", "data.source=task:addition1",
    "rollout.prompts_per_step=128", "eval.prompts=0", "eval.every=0", "eval.stop_at=0.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of one folder share their stages."""
    return tmp_path_factory.mktemp("recipes")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in methods()]
)
def test_the_tiny_variant_runs(root, name):
    stages = [word for one in STAGES for word in ("--stages", one)]
    done = megaopd("recipe", name, "--dir", root, *stages, *SHORT, timeout=280)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (root / "seed_0").glob(f"{name}-????????")
    assert len(columns(run_dir, "loss")) == 3
    summary = json.loads((run_dir / "summary.json").read_text())
    metric = method(name).metric
    assert {f"{metric}_before", f"{metric}_after"} <= summary.keys()
    assert f"{name}: {metric} {summary[f'{metric}_before']:.4f} -> " in done.stdout
