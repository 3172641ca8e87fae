"""A run whose teacher has a rank of its own, from the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from megaopd.errors import EXIT_STOPPED
from megaopd.rollout.process import free_port
from tests.e2e.runs import columns, end_all, make_models, megaopd, opd_arguments


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


def test_a_signal_to_the_teachers_node_alone_stops_the_run(tmp_path):
    """Every rank ends with exit code 75, and the step is saved."""
    student, teacher = make_models(tmp_path)
    own = ["teacher.placement=separate", "teacher_parallel.ranks=1", "run.steps=400"]
    run_dir = tmp_path / "run"
    command = opd_arguments(student, teacher, run_dir, *own)
    env = {**os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megaopd", *command],
            env=env | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        metrics, end = run_dir / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert time.monotonic() < end and all(rank.poll() is None for rank in ranks)
            time.sleep(0.02)
        ranks[1].send_signal(signal.SIGUSR1)
        ended = [(rank.communicate(timeout=60)[1], rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            end_all(rank)
    assert [code for _, code in ended] == [EXIT_STOPPED, EXIT_STOPPED], ended
    done = len(columns(run_dir, "step"))
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [f"step_{done:08d}"]
