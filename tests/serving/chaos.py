"""A training run on two SGLang servers to which bad things happen at planned steps.

`train` runs in a process of its own and returns an Outcome. Nothing is replaced
by a stand-in: servers are killed and stopped by signals, and given foreign weights by their own
HTTP interface; a sync is broken off by breaking the connection or the server that it goes to.
"""

import asyncio
import os
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import psutil
import torch

from megaopd.build import build_parts
from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.parts import Parts
from megaopd.rollout.base import SamplingParams
from megaopd.rollout.command import server_command
from megaopd.rollout.member import Server
from megaopd.rollout.process import ServerProcess
from megaopd.run import one_step
from megaopd.schema import Config

# Smaller than any server.bucket_mb: the student of 100 kB then goes in some 15 buckets, and a sync
# that is hit breaks at this one.
BUCKET_BYTES, HALF_WAY = 8_000, 6
UNDER_WAY = 3  # requests that a server must be at work on when it is hit
BACK_S, HIT_S = 300.0, 60.0  # for servers to come back; for a planned moment to come
FILLER = "filler"  # the file that fills the disk
AFTERWARDS = 4  # samples that are taken where a run has ended in an error

Act = Callable[[Server], Awaitable[None]]


@dataclass
class Outcome:
    """What a run did, as it was seen from inside."""

    trained: dict[int, list[Sample]] = field(default_factory=dict)  # by step, from 0; in order
    weights: dict[int, dict[str, Any]] = field(default_factory=dict)  # the trainer's, by version
    error: str = ""  # of the UserError that ended it
    states: list[tuple[str, int]] = field(default_factory=list)  # of the servers, after the error
    version: int = -1  # of the engine then
    afterwards: list[Sample] = field(default_factory=list)  # taken after the error
    hit: dict[int, int] = field(default_factory=dict)  # step -> requests under way when it was hit
    starts: list[int] = field(default_factory=list)  # of each server's processes
    left: list[str] = field(default_factory=list)  # processes that outlived the run


def on_cpu() -> None:
    """Prepare a process for `train`, on a GPU machine too."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)


def train(
    config: Config, plan: Mapping[int, str] | None = None, wrong: Path | None = None
) -> Outcome:
    """Run `config`, with the disturbances of `plan` (step -> name of a method of Chaos)."""
    outcome, groups = Outcome(), set()
    start = ServerProcess.__init__

    def starting(self: ServerProcess, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        groups.add(self.group)

    with mock.patch.object(ServerProcess, "__init__", starting):
        try:
            with build_parts(config) as parts:
                chaos = Chaos(parts, outcome, wrong)
                try:
                    for step in range(parts.first_step, config.run.steps):
                        chaos.step(step, (plan or {}).get(step, ""))
                    parts.finish()
                except UserError as err:
                    outcome.error = str(err)
                    chaos.look_around()
                finally:
                    chaos.close()
        except UserError as err:
            outcome.error = outcome.error or str(err)
    outcome.left = [p.name() for p in psutil.Process().children(recursive=True)]
    outcome.left += [p.name() for p in psutil.process_iter() if group_of(p.pid) in groups]
    return outcome


def group_of(pid: int) -> int:
    """The process group of a process; -1: it has gone."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


class Chaos:
    """Takes the steps of a run, and disturbs them.

    Args:
        wrong: a checkpoint of the student's shape with other weights.
    """

    def __init__(self, parts: Parts, outcome: Outcome, wrong: Path | None) -> None:
        self.parts, self.outcome, self.wrong = parts, outcome, wrong
        self.engine: Any = parts.sampler.engine
        self.engine = self.engine.engine
        self.tier = self.engine._tier
        self.tier.sync.limit = min(self.tier.sync.limit, BUCKET_BYTES)
        self.hits: list[Future[None]] = []
        self.replaced: list[ServerProcess] = []
        self.undo: list[Callable[[], None]] = []
        self.at = -1
        self._watch()

    def _watch(self) -> None:
        """Write down what the trainer trains on, and which weights it names."""
        parts, outcome = self.parts, self.outcome
        update, sync = parts.update, parts.sync_weights

        def watched_update(samples: Any, step: int = 0) -> dict[str, float]:
            outcome.trained[self.at] = list(samples)
            return update(samples, step)

        def watched_sync(version: int) -> None:
            held = {name: tensor.clone() for name, tensor in parts.student.weights()}
            outcome.weights[version] = held
            sync(version)

        parts.update, parts.sync_weights = watched_update, watched_sync  # type: ignore[method-assign]

    def step(self, step: int, what: str) -> None:
        """One step of the run; with a disturbance, it begins with all servers there."""
        self.at = step
        if what:
            self.wait_for_all()
            getattr(self, what)()
        try:
            one_step(self.parts, step)
        finally:
            while self.undo:
                self.undo.pop()()
        for hit in self.hits:
            hit.result(HIT_S)
        self.hits.clear()

    def wait_for_all(self) -> None:
        """Healthy, and not doubted."""
        end = time.monotonic() + BACK_S
        there = ("serving", "unsynced")
        while not all(s.alive() and s.state in there and not s.why for s in self.servers):
            assert time.monotonic() < end, [(s.name, s.state, s.why) for s in self.servers]
            time.sleep(0.1)

    @property
    def servers(self) -> list[Server]:
        return self.tier.fleet.servers

    def _start_wrong(self, server: Server) -> None:
        """What takes the place of an attached server that was killed, at the same address."""
        config = self.parts.config
        assert self.wrong is not None
        command = server_command(
            config.server,
            self.wrong,
            device="cpu",
            dtype=config.student.dtype,
            port=urlsplit(server.url).port or 0,
            environ=os.environ,
        )
        log = Path(config.run.dir) / "wrong.log"
        self.replaced.append(ServerProcess(command, log, title="wrong weights"))

    def look_around(self) -> None:
        """After an error: what the servers hold, and whether they go on sampling."""
        outcome, parts = self.outcome, self.parts
        outcome.states = [(s.state, s.version) for s in self.servers]
        outcome.version = self.engine.weight_version
        prompts = [sample.prompt for sample in outcome.trained[self.at - 1][:AFTERWARDS]]
        params = SamplingParams.from_config(parts.config.rollout)
        outcome.afterwards = parts.sampler.generate(prompts, -1, 1, params)

    def close(self) -> None:
        self.outcome.starts = [server.starts for server in self.servers]
        for process in self.replaced:
            process.kill()
            process.wait(10.0)

    # Moments.

    def _in_rollout(self, act: Act, *servers: Server) -> None:
        """Act on servers once all of them are at work on requests."""
        for server in servers:
            done: Future[None] = Future()
            self.hits.append(done)
            self.tier.loop.start(self._when_busy(server, servers, act, done))

    async def _when_busy(
        self, server: Server, servers: tuple[Server, ...], act: Act, done: Future[None]
    ) -> None:
        lives = self.tier.dispatcher._lives
        while any(len(lives[s.name].attempts) < UNDER_WAY for s in servers):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)  # it is generating by now
        step = self.at
        self.outcome.hit[step] = self.outcome.hit.get(step, 0) + len(lives[server.name].attempts)
        try:
            await act(server)
            done.set_result(None)
        except BaseException as err:
            done.set_exception(err)
            raise

    def _in_sync(self, act: Callable[..., Awaitable[None]], *servers: Server) -> None:
        """Act on servers where they are sent bucket number HALF_WAY."""
        transport, counts = self.tier.sync.transport, Counter[str]()
        send, hits = transport.send, {server.name: Future[None]() for server in servers}
        self.hits += hits.values()

        async def sending(to: Server, packed: Any, nbytes: int) -> None:
            counts[to.name] += 1
            if to.name not in hits or counts[to.name] != HALF_WAY:
                return await send(to, packed, nbytes)
            hits[to.name].set_result(None)
            await act(to, send(to, packed, nbytes))

        transport.send = sending
        self.undo.append(lambda: setattr(transport, "send", send))

    # Disturbances.

    def kill(self) -> None:
        """SIGKILL in the rollout; what the server starts again with has been replaced meanwhile."""
        student = self.parts.config.student.hf_dir
        assert self.wrong is not None
        shutil.copy(self.wrong / "model.safetensors", student / "new")
        os.replace(student / "new", student / "model.safetensors")
        self._in_rollout(send_signal(signal.SIGKILL), self.servers[0])

    def kill_both(self) -> None:
        """No server is left that holds the weights of this step."""
        self._in_rollout(send_signal(signal.SIGKILL), *self.servers)

    def stop(self) -> None:
        """The server hangs: its processes are there, and do nothing."""
        self._in_rollout(send_signal(signal.SIGSTOP), self.servers[1])

    def half_sync(self) -> None:
        """The server dies in the middle of a sync."""
        self._in_sync(kill_before, self.servers[0])

    def no_sync(self) -> None:
        """All servers die in the middle of a sync."""
        self._in_sync(kill_before, *self.servers)

    def dropped_sync(self) -> None:
        """The connection breaks in the middle of a sync; the server takes the bucket later."""

        async def act(server: Server, sending: Awaitable[None]) -> None:
            await break_off(server, sending)

        self._in_sync(act, self.servers[1])

    def missed_sync(self) -> None:
        """The connection breaks before the first bucket: a server keeps its old weights."""
        server, transport = self.servers[1], self.tier.sync.transport
        control, opened = server.client.control, transport.open

        async def first_command(*args: Any, **kwargs: Any) -> Any:
            server.client.control = control
            return await break_off(server, control(*args, **kwargs))

        async def opening(to: Server) -> None:
            await opened(to)
            if to is server:
                to.client.control = first_command

        transport.open = opening
        self.undo.append(lambda: setattr(transport, "open", opened))

    def foreign(self, version: str | None = "7") -> None:
        """Somebody else gives a server weights, while it is at work."""

        async def act(server: Server) -> None:
            client = server.client
            weights = {"model_path": str(self.wrong), "weight_version": version}
            await client.control("/pause_generation", {"mode": "retract"})
            await client.control("/update_weights_from_disk", weights)
            await client.control("/continue_generation")

        self._in_rollout(act, self.servers[0])

    def unnamed(self) -> None:
        """And they keep the name of ours."""
        self.foreign(None)

    def restart_wrong(self) -> None:
        """An attached server dies, and whoever owns it starts it with another checkpoint."""

        async def act(server: Server) -> None:
            at = ("127.0.0.1", urlsplit(server.url).port)
            found = psutil.net_connections("tcp")
            owner = next(c.pid for c in found if c.status == "LISTEN" and tuple(c.laddr) == at)
            group = group_of(owner or -1)
            os.killpg(group, signal.SIGKILL)
            while any(group_of(p.pid) == group for p in psutil.process_iter()):
                await asyncio.sleep(0.05)
            self._start_wrong(server)

        self._in_rollout(act, self.servers[0])

    def full_disk(self) -> None:
        """The file system of the weights is full; where it is not a small one of its own, no file
        may be large.
        """
        weights = Path(self.parts.config.run.dir) / "weights"
        if not os.path.ismount(weights):
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (BUCKET_BYTES // 2, limit[1]))
            self.undo.append(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
            return
        with (weights / FILLER).open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(BUCKET_BYTES))
        os.truncate(weights / FILLER, (weights / FILLER).stat().st_size - 3 * BUCKET_BYTES)


async def kill_before(server: Server, sending: Awaitable[None]) -> None:
    """Nobody is there any more to be sent anything."""
    assert server.process is not None
    server.process.kill()
    await sending


async def break_off(server: Server, request: Awaitable[Any]) -> Any:
    """Break the connection while a request is under way, which the server hears all the same."""
    assert server.process is not None
    os.killpg(server.process.group, signal.SIGSTOP)
    task = asyncio.ensure_future(request)
    await asyncio.sleep(0.3)
    assert not task.done(), "there is nothing left to break off"
    await server.client.close()
    os.killpg(server.process.group, signal.SIGCONT)
    return await task


def send_signal(number: int) -> Act:
    """To all processes of a server."""

    async def act(server: Server) -> None:
        assert server.process is not None
        os.killpg(server.process.group, number)

    return act
