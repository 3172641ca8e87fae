"""Two nodes on one machine: two agents on two loopback addresses, one is lost and comes back.

bash launch/test.sh tests/e2e/test_two_nodes.py -rP
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
SCRIPT = ROOT / "launch" / "torchrun_multinode.sh"
NAMES = ("step", "loss", "grad_norm", "kl", "reward")
STEPS, EVERY, LOST_AT = 60, 10, 15
ADDRESSES = ("127.0.0.1", "127.0.0.2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """The undisturbed run of both nodes."""
    root = tmp_path_factory.mktemp("whole")
    with Nodes(root, arguments(models, root / "run")) as nodes:
        nodes.start(0)
        nodes.start(1)
        assert [nodes.wait(0), nodes.wait(1)] == [0, 0], nodes.said()
    return columns(root / "run", *NAMES)


def arguments(models, run_dir):
    """Data parallel over the nodes, the optimizer's state split between them."""
    overrides = [f"run.steps={STEPS}", f"checkpoint.every={EVERY}", "optim.distributed=true"]
    return opd_arguments(*models, run_dir, *overrides)


class Nodes:
    """Agents of one rank each, started as the launch script is on every node of a cluster."""

    def __init__(self, root: Path, run: list[str], nodes: str = "2") -> None:
        self.root, self.run, self.nodes = root, run, nodes
        self.metrics = Path(next(a for a in run if a.startswith("run.dir=")).partition("=")[2])
        self.agents: dict[int, subprocess.Popen] = {}
        with socket.socket() as probe:
            probe.bind((ADDRESSES[0], 0))
            self.port = probe.getsockname()[1]

    def start(self, node: int) -> None:
        env = {**os.environ, "NNODES": self.nodes, "HEAD": ADDRESSES[0], "PORT": str(self.port)}
        env |= {"ADDR": ADDRESSES[node], "GPUS": "1", "RESTARTS": "2", "RDZV_ID": self.root.name}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        with (self.root / f"node{node}.log").open("a") as log:
            self.agents[node] = subprocess.Popen(
                ["bash", str(SCRIPT), *self.run], env=env, stdout=log, stderr=log
            )
        if node == 0:  # it holds the rendezvous store, which would be lost with node 1
            until(self.store_is_up, 60)

    def store_is_up(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((ADDRESSES[0], self.port)) == 0

    def steps(self) -> int:
        path = self.metrics / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait(self, node: int) -> int:
        return self.agents[node].wait(timeout=240)

    def said(self) -> str:
        return "\n".join(p.read_text() for p in sorted(self.root.glob("node*.log")))

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *error: object) -> None:
        for agent in self.agents.values():
            end_all(agent)


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_node_is_lost_and_comes_back(models, whole, tmp_path):
    """The agent that is left waits for it, and both go on from the checkpoint, bit for bit."""
    with Nodes(tmp_path, arguments(models, tmp_path / "run")) as nodes:
        nodes.start(0)
        nodes.start(1)
        until(lambda: nodes.steps() >= LOST_AT, 120)
        end_all(nodes.agents[1])
        lost = time.monotonic()
        reached = nodes.steps()
        assert reached < STEPS
        nodes.start(1)
        until(lambda: nodes.steps() <= reached - reached % EVERY, 120)  # later lines are dropped
        back = time.monotonic() - lost
        assert [nodes.wait(0), nodes.wait(1)] == [0, 0], nodes.said()
        again = time.monotonic() - lost
    assert columns(tmp_path / "run", *NAMES) == whole
    print(
        f"lost at step {reached}, taken up at step {reached - reached % EVERY} after {back:.0f} s,"
        f" done {again:.0f} s after the loss; {len(whole)} steps equal byte for byte"
    )


def test_a_smaller_job_goes_on_alone(models, whole, tmp_path):
    """NNODES=1:2: without the other node the run goes on with one data-parallel rank."""
    with Nodes(tmp_path, arguments(models, tmp_path / "run"), nodes="1:2") as nodes:
        nodes.start(0)
        nodes.start(1)
        until(lambda: nodes.steps() >= LOST_AT, 180)
        end_all(nodes.agents[1])
        assert nodes.wait(0) == 0, nodes.said()
    mine = columns(tmp_path / "run", "step", "loss")
    assert [step for step, _ in mine] == [row[0] for row in whole]
    apart = max(abs(float(a[1]) - float(b[1])) for a, b in zip(mine, whole, strict=True))
    print(f"largest difference of a loss from the run of two nodes: {apart:.1e}")
    assert apart < 1e-3


def test_one_node_is_asked_to_stop(models, whole, tmp_path):
    """A signal on one node: both save the same step and exit with 75, and start again from it."""
    with Nodes(tmp_path, arguments(models, tmp_path / "run")) as nodes:
        nodes.start(0)
        nodes.start(1)
        until(lambda: nodes.steps() >= LOST_AT, 120)
        nodes.agents[1].send_signal(signal.SIGTERM)
        assert [nodes.wait(0), nodes.wait(1)] == [EXIT_STOPPED] * 2, nodes.said()
        stopped = nodes.steps()
        assert (tmp_path / "run" / "checkpoints" / f"step_{stopped:08d}").is_dir()
        nodes.start(0)
        nodes.start(1)
        assert [nodes.wait(0), nodes.wait(1)] == [0, 0], nodes.said()
    assert columns(tmp_path / "run", *NAMES) == whole
    print(f"stopped after step {stopped}, saved there and taken up")
