"""Real SGLang servers on a CPU obey the contract of every engine, and mix up no weights."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.rollout.base import NeedsWeights, SamplingParams
from megaopd.rollout.config import ServerConfig
from tests.serving.conformance import EOS, Conformance, requests, weights_of
from tests.serving.reference import LONG, check_samples, many, model
from tests.serving.sessions import collect

pytest.importorskip("sglang", reason="SGLang is not installed")

from megaopd.rollout.sglang import SGLangEngine

# SGLang keeps some positions back, and the suite fills all of the model's.
MEDIUM = SamplingParams(300, temperature=0.5)


def start(
    hf_dir: Path, run_dir: Path, *, rank: int = 0, world_size: int = 1, **config: Any
) -> SGLangEngine:
    config = {"health_interval_s": 1.0, "concurrency": 64, **config}
    return SGLangEngine(
        ServerConfig(**config),
        hf_dir,
        eos_ids=[EOS],
        dtype="float32",
        device="cpu",
        run_dir=run_dir,
        rank=rank,
        world_size=world_size,
    )


def server_of(engine: SGLangEngine) -> Any:
    assert engine._tier is not None
    return engine._tier.fleet.servers[0]


def command(engine: SGLangEngine, path: str, body: dict[str, Any]) -> Any:
    """Something done to the server behind the engine's back."""
    assert engine._tier is not None
    return engine._tier.loop.run(server_of(engine).client.post(path, body))


class OnSGLang(Conformance):
    """The suite, on a server of the engine's own."""

    deterministic = False
    can_abort_running = True
    sync: ClassVar[str]

    @pytest.fixture(scope="class")
    def engine(
        self, hf_dir: Path, reference: Any, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[SGLangEngine]:
        with start(hf_dir, tmp_path_factory.mktemp("run"), sync=self.sync) as engine:
            with pytest.raises(NeedsWeights):
                engine.generate(requests(), SamplingParams(4))
            engine.update_weights(weights_of(reference), 3)
            yield engine


@pytest.mark.slow  # tests/serving/test_sync.py has every way of syncing
class TestDisk(OnSGLang):
    sync = "disk"


@pytest.mark.slow
class TestBroadcast(OnSGLang):
    sync = "broadcast"


class TestTensor(OnSGLang):
    """And what goes wrong, most of it through a second engine that is attached to the server."""

    sync = "tensor"

    @pytest.fixture
    def attach(
        self, engine: SGLangEngine, hf_dir: Path, reference: Any, tmp_path: Path
    ) -> Iterator[Any]:
        made: list[SGLangEngine] = []

        def attach(**config: Any) -> SGLangEngine:
            config["addresses"] = (server_of(engine).url,)
            made.append(start(hf_dir, tmp_path, **config))
            made[-1].update_weights(weights_of(reference), 3)
            return made[-1]

        yield attach
        for other in made:
            other.close()
        engine.update_weights(weights_of(reference), 3)

    def test_metrics(self, engine: SGLangEngine) -> None:
        engine.metrics()
        samples = engine.generate(many(20), SamplingParams(6))
        measured = engine.metrics()
        assert measured["server/requests"] == 20 and measured["server/serving"] == 1
        assert measured["server/tokens"] == sum(len(s.response_ids) for s in samples)
        assert measured["server/queue_s"] > 0
        assert measured["server/retries"] == measured["server/resampled"] == 0
        assert engine.metrics()["server/requests"] == 0

    def test_weights_of_an_unknown_name_are_not_handed_out(
        self, engine: SGLangEngine, reference: Any
    ) -> None:
        """As after a restart that nobody noticed."""
        command(engine, "/update_weight_version", {"new_version": "default"})
        session = engine.session()
        tickets = {session.submit(request, SamplingParams(6)) for request in many(8)}
        with pytest.raises(NeedsWeights):
            collect(session)
        assert session.pending == 8 and server_of(engine).state == "unsynced"
        engine.update_weights(weights_of(reference), 3)
        done = collect(session)
        assert {ticket for ticket, _ in done} == tickets
        check_samples({3: reference}, [s for _, s in done], SamplingParams(6), self.tolerance)
        assert engine.metrics()["server/resampled"] >= 1

    def test_weights_that_changed_under_way_are_not_handed_out(
        self, engine: SGLangEngine, reference: Any
    ) -> None:
        session = engine.session()
        for request in many(4):
            session.submit(request, LONG)
        done = session.wait(0.7)
        name = {"new_version": "someone-4", "abort_all_requests": False}
        command(engine, "/update_weight_version", name)
        with pytest.raises(NeedsWeights):
            while session.pending:
                done += session.wait()
        engine.update_weights(weights_of(reference), 3)
        done += collect(session)
        assert len(done) == 4
        check_samples({3: reference}, [s for _, s in done], LONG, self.tolerance)

    def test_another_run_takes_the_server(
        self, engine: SGLangEngine, attach: Any, reference: Any
    ) -> None:
        """Both call their weights version 3."""
        other = attach()
        assert {s.weight_version for s in other.generate(requests(), SamplingParams(4))} == {3}
        with pytest.raises(NeedsWeights):
            engine.generate(requests(), SamplingParams(4))

    @pytest.mark.parametrize("pause", ["abort", "retract"])
    def test_responses_go_on_after_a_sync(
        self, attach: Any, reference: Any, other: Any, pause: str
    ) -> None:
        """Whether the server keeps them or hands them back, each is whole, in two spans."""
        engine = attach(pause=pause, concurrency=8)
        for delay in (0.5, 1.0, 3.0, 8.0):
            session = engine.session()
            for request in many(16):  # half of them wait here
                session.submit(request, MEDIUM)
            time.sleep(delay)
            engine.update_weights(weights_of(other), 4)
            samples = [sample for _, sample in collect(session)]
            engine.update_weights(weights_of(reference), 3)
            assert len(samples) == 16
            check_samples({3: reference, 4: other}, samples, MEDIUM, self.tolerance)
            for sample in samples:
                stopped = sample.response_ids[-1] == EOS
                assert stopped or len(sample.response_ids) == MEDIUM.max_new_tokens
            assert (engine.metrics()["server/resumed"] > 0) == (pause == "abort")
            if any([s.version for s in sample.spans] == [3, 4] for sample in samples):
                return
        raise AssertionError("no response was under way while the weights changed")

    def test_a_slow_response_is_cut_and_goes_on(self, attach: Any, reference: Any) -> None:
        engine = attach(request_timeout_s=0.5, retries=50)
        samples = engine.generate(many(4), MEDIUM)
        check_samples({3: reference}, samples, MEDIUM, self.tolerance)
        measured = engine.metrics()
        assert measured["server/resumed"] >= 1 and measured["server/retries"] >= 1

    def test_all_ranks_learn_what_came_of_it(
        self, engine: SGLangEngine, attach: Any, ranks: Any, hf_dir: Path, tmp_path: Path
    ) -> None:
        first, second = ranks.run(on_two_ranks, 2, server_of(engine).url, hf_dir, tmp_path)
        assert first["versions"] == second["versions"] == [7, 7]
        assert "missing" in first["error"] and first["error"] == second["error"]
        assert first["sampled"] == 4 and second["sampled"] == 0
        attach()  # takes the server back

    def test_a_killed_server_comes_back(self, engine: SGLangEngine, reference: Any) -> None:
        """Its requests wait for it; what it serves after its restart is not taken for ours."""
        session = engine.session()
        tickets = {session.submit(request, MEDIUM) for request in many(12)}
        done = session.wait(1.0)
        os.killpg(server_of(engine).process.group, signal.SIGKILL)
        with pytest.raises(NeedsWeights):
            while session.pending:
                done += session.wait()
        engine.update_weights(weights_of(reference), 3)
        done += collect(session)
        assert sorted(ticket for ticket, _ in done) == sorted(tickets)
        check_samples({3: reference}, [s for _, s in done], MEDIUM, self.tolerance)


def on_two_ranks(url: str, hf_dir: Path, run_dir: Path) -> dict[str, Any]:
    """Rank 0 speaks to the server; rank 1 learns what came of it."""
    import torch.distributed as dist

    rank, weights = dist.get_rank(), weights_of(model())

    def stream(count: int) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights[:count]:
            dist.all_reduce(torch.ones(1))  # as the stream of a sharded model
            yield name, tensor

    seen: dict[str, Any] = {"versions": []}
    with start(hf_dir, run_dir, rank=rank, world_size=2, addresses=(url,)) as engine:
        engine.update_weights(stream(len(weights)), 7)
        seen["versions"].append(engine.weight_version)
        try:
            engine.update_weights(stream(len(weights) - 1), 8)
        except UserError as err:
            seen["error"] = str(err)
        seen["versions"].append(engine.weight_version)
        samples: list[Sample] = []
        engine.update_weights(stream(len(weights)), 7)
        if rank == 0:
            samples = engine.generate(requests(), SamplingParams(4))
        else:
            with pytest.raises(AssertionError, match="rank 0"):
                engine.session()
        seen["sampled"] = len(samples)
    return seen
