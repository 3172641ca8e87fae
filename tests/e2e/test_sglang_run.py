"""Runs on real SGLang servers: kill and resume, one step ahead, turn-taking, what is refused."""

import json
import subprocess

import pytest

from tests.e2e.runs import make_models, megaopd, opd_arguments

pytest.importorskip("sglang", reason="SGLang is not installed")

SERVER = ["rollout.engine=sglang", "server.max_tokens=8000", "objective.loss=rkl"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def servers_of(run_dir):
    """Processes whose command line names this run's student."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listing.stdout.splitlines() if str(run_dir.parent) in line]


def test_killed_and_resumed_one_step_ahead(models, tmp_path):
    """With weights of TP=2 x PP=2 shards; the steps' accounting has no gap and nothing twice."""
    run_dir = tmp_path / "run"
    arguments = opd_arguments(
        *models,
        run_dir,
        *SERVER,
        "run.steps=5",
        "checkpoint.every=1",
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "rollout.staleness=1",
        "server.sync=broadcast",
    )
    killed = megaopd(*arguments, env={"MEGAOPD_KILL_AT": "optimizer:3"}, timeout=400)
    assert killed.returncode != 0
    assert [row["step"] for row in rows(run_dir)] == [1, 2]
    done = megaopd(*arguments, timeout=400)
    assert done.returncode == 0, done.stderr
    found = rows(run_dir)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    for row in found:
        assert row["sync/failed_servers"] == 0 and row["sync/probe_gap"] < 1e-4
        assert 0 <= row["rollout/staleness"] <= 1
        assert row["rollout_ess"] > 0.9
    assert found[1]["rollout/staleness"] > 0  # sampled while step 1 was training
    assert not servers_of(tmp_path / "run")


def test_servers_on_the_trainers_own_devices(models, tmp_path):
    """Turn-taking, checked by checksums; what is sampled is of the trainer's own weights."""
    run_dir = tmp_path / "run"
    done = megaopd(
        *opd_arguments(*models, run_dir, *SERVER, "run.steps=3", "server.placement=colocated"),
        "eval.prompts=8",
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    found = rows(run_dir)
    assert [row["step"] for row in found] == [1, 2, 3]
    assert all(row["rollout_k3"] < 1e-8 for row in found)
    assert json.loads((run_dir / "summary.json").read_text())["kl_after"] > 0


def test_what_does_not_go_together_is_refused(models, tmp_path):
    for overrides, said in (
        (["rollout.staleness=1"], "rollout.staleness = 1"),
        (["server.count=2"], "[server] is set"),
        ([*SERVER, "server.placement=colocated", "rollout.staleness=1"], "take turns"),
        ([*SERVER, "server.host=0.0.0.0"], "server.api_key_env"),
    ):
        refused = megaopd(*opd_arguments(*models, tmp_path / "run", *overrides))
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
