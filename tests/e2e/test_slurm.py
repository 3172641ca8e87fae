"""launch/slurm/run.sbatch as Slurm would run it, on two "nodes" of this machine.

Slurm's own two commands are stood in for by a few lines: srun starts a task a node and hands
signals on, scontrol lists the nodes and notes a requeue. All that they start is the real thing.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaopd.errors import EXIT_STOPPED
from tests.e2e.runs import columns, end_all, make_models, opd_arguments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NODES = ("127.0.0.1", "127.0.0.2")
SRUN = """
import os, signal, subprocess, sys

argv = sys.argv[1:]
start = argv.index("bash")
def option(name):
    return argv[argv.index(name) + 1]

tasks = []
for node in option("--nodelist").split(","):
    log = open(option("--output").replace("%N", node), "a")
    env = {**os.environ, "SLURMD_NODENAME": node}
    tasks.append(subprocess.Popen(argv[start:], env=env, stdout=log, stderr=log))
assert len(tasks) == int(option("--nodes")) == int(option("--ntasks"))
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda n, frame: [task.send_signal(n) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
import os, sys

if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
else:
    open(os.environ["REQUEUED"], "a").write(" ".join(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((NODES[0], 0))
        return probe.getsockname()[1]


@pytest.fixture
def batch(tmp_path):
    """Starts the batch script with the given variables; ends what is left of it."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(f"#!{sys.executable}{text}")
        (commands / name).chmod(0o755)
    started: list[subprocess.Popen] = []

    def start(run: list[str], **variables: object) -> subprocess.Popen:
        env = {**os.environ, "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": ",".join(NODES)}
        env |= {"SLURM_SUBMIT_DIR": str(ROOT), "REQUEUED": str(tmp_path / "requeued"), "GPUS": "1"}
        env |= {"LOGS": str(tmp_path / "logs"), "PORT": str(free_port()), "SKIP_ENV": "1"}
        env["PATH"] = f"{commands}:{Path(sys.executable).parent}:{env['PATH']}"
        env |= {name: str(value) for name, value in variables.items()}
        # Slurm copies the script, so that it must not look for its neighbours beside itself.
        copy = tmp_path / "slurm_script"
        copy.write_bytes((ROOT / "launch/slurm/run.sbatch").read_bytes())
        out = (tmp_path / "out").open("a")
        started.append(subprocess.Popen(["bash", copy, *run], env=env, stdout=out, stderr=out))
        return started[-1]

    yield start
    for process in started:
        end_all(process)


def said(tmp_path: Path) -> str:
    logs = [tmp_path / "out", *sorted((tmp_path / "logs").rglob("*.log"))]
    return "\n".join(f"== {path}\n{path.read_text()}" for path in logs)


def steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_the_time_limit_comes_near(models, batch, tmp_path):
    """SIGUSR1 to the batch shell: both nodes save, the job is requeued, and goes on to its end."""
    run_dir = tmp_path / "run"
    run = opd_arguments(*models, run_dir, "run.steps=60")[1:]
    job = batch(run)
    end = time.monotonic() + 180
    while steps(run_dir) < 5:
        assert job.poll() is None and time.monotonic() < end, said(tmp_path)
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) == EXIT_STOPPED, said(tmp_path)
    assert (tmp_path / "requeued").read_text() == "requeue 4711"
    stopped = steps(run_dir)
    assert 5 <= stopped < 60 and (run_dir / "checkpoints" / f"step_{stopped:08d}").is_dir()
    assert batch(run, SLURM_RESTART_COUNT=1).wait(timeout=240) == 0, said(tmp_path)
    assert [int(row[0]) for row in columns(run_dir, "step")] == list(range(1, 61))
    for node in NODES:
        for attempt in (0, 1):
            assert (tmp_path / "logs" / f"attempt-{attempt}" / f"train-{node}.log").is_file()


def test_a_node_trains_and_a_node_serves(models, batch, tmp_path):
    """The servers' node runs a real SGLang server with a key; the trainer is given its address."""
    pytest.importorskip("sglang")
    run_dir = tmp_path / "run"
    run = opd_arguments(*models, run_dir, "run.steps=3", "server.sync=tensor")[1:]
    arguments = f"server.count=1 server.dtype=float32 server.port={free_port()}"
    job = batch(run, ROLLOUT_NODES=1, STUDENT=models[0], ROLLOUT_ARGS=arguments)
    assert job.wait(timeout=400) == 0, said(tmp_path)
    assert steps(run_dir) == 3
    assert "stopping the servers" in said(tmp_path)
    assert "MEGAOPD_KEY" in (run_dir / "config.toml").read_text()


def test_nodes_that_do_not_add_up(models, batch, tmp_path):
    run = opd_arguments(*models, tmp_path / "run")[1:]
    assert batch(run, TRAIN_NODES=1).wait(timeout=20) == 2
    assert "on 2 nodes: they must add up" in said(tmp_path)
