"""Two real SGLang servers and weight syncs to them, for the tests of both."""

import os

import pytest
import torch

from megaopd.rollout.config import ServerConfig
from megaopd.rollout.loop import LoopThread
from tests.dist.models import save_tiny, tiny
from tests.often import often

pytest.importorskip("sglang", reason="SGLang is not installed: want=sglang bash launch/env.sh")

from megaopd.rollout.server import Fleet
from megaopd.rollout.sync import WeightSync
from megaopd.rollout.verify import score

METHODS = ("tensor", "broadcast", "disk")
# For what costs a server's start a method: one of them is in every run of the tests.
OFTEN = often(METHODS, METHODS[:1])
TEXT = (5, 9, 3, 7, 7, 50, 20, 30, 40, 1, 2)
SMALL = 0.1  # MB a bucket: the tiny model then takes nine
NOISE = 2e-5  # of log-probs in float32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sync")


@pytest.fixture(scope="module")
def base(root):
    """What the servers start with."""
    return save_tiny(root / "base", "qwen3", tied=False, seed=1)


@pytest.fixture(scope="module")
def loop():
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def fleet(base, loop, root):
    fleet = Fleet(
        ServerConfig(count=2), base, device="cpu", dtype="float32", log_dir=root / "servers"
    )
    loop.run(fleet.start())
    yield fleet
    loop.run(fleet.stop())


@pytest.fixture
def make_sync(base, loop, root):
    """A WeightSync by some method."""
    made = []

    def make(method, *, work_dir=None, **config):
        config = ServerConfig(sync=method, **{"bucket_mb": SMALL, **config})
        sync = WeightSync(
            config,
            model_dir=base,
            work_dir=work_dir or root / "weights",
            nonce=f"n{len(made)}{os.urandom(2).hex()}",
            run=loop.run,
            device="cpu",
            dtype="float32",
        )
        made.append(sync)
        return sync

    yield make
    for sync in made:
        sync.close()


def model(seed):
    return tiny("qwen3", tied=False, seed=seed)


def weights_of(of):
    return [(name, tensor.clone()) for name, tensor in of.state_dict().items()]


@torch.no_grad()
def log_probs(of):
    """transformers' log-probs of TEXT[1:]."""
    rows = of(torch.tensor([TEXT])).logits[0].log_softmax(-1)
    return [float(rows[t, token]) for t, token in enumerate(TEXT[1:])]


def holds(loop, server, of):
    """Largest difference of a server's log-probs of TEXT from a model's."""
    got = loop.run(score(server.client, TEXT))
    return max(abs(a - b) for a, b in zip(got, log_probs(of), strict=True))


def sums(loop, server):
    answer = loop.run(server.client.control("/weights_checker", {"action": "checksum"}))
    return answer["per_engine_checksum"]


def named(loop, server):
    return loop.run(server.client.get("/model_info"))["weight_version"]
