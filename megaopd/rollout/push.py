"""One push of weights to all servers at once.

For each: pause, mark the weights as unfinished, open an update session, send bucket by bucket,
close the session, verify, name the version, go on. The caller's thread gathers a bucket from the
training ranks while the event loop sends the one before: no more than two of them exist, and the
tensor that begins a third.
"""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from megaopd.models.stream import exhaust
from megaopd.rollout import verify
from megaopd.rollout.base import Probe
from megaopd.rollout.checksum import Checksums
from megaopd.rollout.encode import Bucket
from megaopd.rollout.http import ServerError
from megaopd.rollout.target import Checklist
from megaopd.rollout.transfer import DiskTransport, export

if TYPE_CHECKING:
    from megaopd.rollout.member import Server
    from megaopd.rollout.sync import WeightSync

CONTROL_S = 120.0  # for a command that carries no weights
GIVE_UP_S = 10.0  # for each command to a server that has failed already


@dataclass
class SyncReport:
    """What a push did."""

    bytes: int = 0  # of the weights, as one server gets them
    tensors: int = 0
    # open (a connection), pause, transfer, verify, resume: of the slowest server. paused: while it
    # generated nothing. gather: for the training ranks to hand tensors over, most of it while
    # others are being sent. export: to disk, gathering included. total.
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # server name -> why
    unreachable: set[str] = field(default_factory=set)  # those of them that did not answer
    gap: float = 0.0  # mean difference from the probe's log-probs, of the worst server

    def metrics(self) -> dict[str, float]:
        """To log."""
        return {
            "sync/bytes": float(self.bytes),
            "sync/tensors": float(self.tensors),
            "sync/failed_servers": float(len(self.failed)),
            "sync/probe_gap": self.gap,
            **{f"sync/{phase}_s": value for phase, value in self.seconds.items()},
        }


@dataclass(eq=False)
class Turn:
    """One server during one push."""

    server: "Server"
    incarnation: int
    old_version: int
    since: float = 0.0  # when it was paused
    paused: bool = False
    marked: bool = False  # its version says "unfinished"
    session: bool = False  # an update session is open
    touched: bool = False  # it was sent weights
    before: Any = None  # checksums of its old weights, where they can be kept (disk)

    @property
    def same(self) -> bool:
        """Whether it has not been restarted, or found to be gone, meanwhile."""
        return self.server.incarnation == self.incarnation and self.server.state == "syncing"


Step = Callable[[Turn], Awaitable[None]]


class Push:
    """See WeightSync.push. Made and driven in the caller's thread; steps run on the loop."""

    def __init__(
        self,
        sync: "WeightSync",
        servers: Sequence["Server"],
        version: int,
        probe: Probe | None,
        weights: Iterable[tuple[str, Any]],
    ) -> None:
        self.sync, self.version, self.probe = sync, version, probe
        self.stream = iter(weights)
        self.turns = [Turn(s, s.incarnation, s.version) for s in servers]
        self.live = list(self.turns)
        self.report = SyncReport()
        self.job: Future[None] | None = None
        self._paused = False
        self.by_disk = isinstance(sync.transport, DiskTransport)
        self._unfinished = f"{sync.tag(version)}-unfinished"

    def go(self) -> SyncReport:
        """The whole of it; raises UserError as WeightSync.push does."""
        started = monotonic()
        sync = self.sync
        sync.probe, sync.checksums = self.probe, {}
        if sync.needs_checksums(self.probe):
            for turn in self.turns:
                info = turn.server.info
                ranks = int(info.get("tp_size", 1))
                on_gpu = info.get("device") == "cuda"
                sync.checksums[ranks] = Checksums(sync.target.arch, ranks, on_gpu)
        if self.by_disk:
            self._from_disk()
        else:
            self._in_buckets()
        self._each("transfer", self._close_session)
        if sync.checksums:
            self._each("verify", self._verify_checksums)
        self._each("resume", self._resume)
        if self.probe is not None and sync.config.verify == "probe":
            self._each("verify", self._verify_probe)
        self._each("resume", self._settle)
        self.report.seconds["total"] = monotonic() - started
        return self.report

    def refuse(self, why: str) -> None:
        """Bring the stream to its end, and leave the servers as they were where that can be."""
        exhaust(self.stream)
        if self.job is not None:
            wait([self.job])

        async def all_of_them() -> None:
            await asyncio.gather(*(self._give_up(turn, why) for turn in self.live))

        self.sync.run(all_of_them())

    # In the caller's thread.

    def _in_buckets(self) -> None:
        transport = self.sync.transport
        self._start("open", self._open)
        for bucket, size in self._buckets():
            self._join()
            if not self._paused:  # not before there is something to send
                self._each("pause", self._begin)
                self._paused = True
            if not self.live:
                bucket.clear()
                continue
            packed = transport.pack(bucket)
            self._start("transfer", partial(self._send, packed=packed, nbytes=size))
            del packed
        self._join()

    def _from_disk(self) -> None:
        """Written while the servers go on, which wait only while they read it."""
        sync = self.sync
        directory = sync.work_dir / f"weights-{self.version}"
        try:
            with self._timed("export"):
                export(self._tensors(), directory, model_dir=sync.model_dir, file_bytes=sync.limit)
            self._each("open", self._open)
            self._each("pause", self._begin)
            size = self.report.bytes
            self._each("transfer", partial(self._send, packed=directory, nbytes=size))
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _buckets(self) -> Iterator[tuple[Bucket, int]]:
        """(bucket, bytes), at most server.bucket_mb each; a larger tensor goes alone."""
        bucket: Bucket = []
        size = 0
        for name, tensor in self._tensors():
            if bucket and size + tensor.nbytes > self.sync.limit:
                yield bucket, size
                bucket, size = [], 0
            bucket.append((name, tensor))
            size += tensor.nbytes
            del tensor
        if bucket:
            yield bucket, size

    def _tensors(self) -> Iterator[tuple[str, Any]]:
        """The stream as servers take it, checked and counted; raises UserError."""
        sync, report = self.sync, self.report
        checklist = Checklist(sync.target)
        while True:
            with self._timed("gather"):
                item = next(self.stream, None)
            if item is None:
                break
            name, tensor = item
            checklist.take(name, tensor.shape)
            if not report.tensors:
                sync.note_dtype(tensor.dtype)
            for part in sync.target.prepare(name, tensor):
                report.tensors += 1
                report.bytes += part[1].nbytes
                for checksums in sync.checksums.values():
                    checksums.add(*part)
                yield part
            del item, tensor
        checklist.finish()

    def _start(self, phase: str, step: Step) -> None:
        """Begin a step on every live server; `_join` waits for it."""
        self.job = self.sync.sender.submit(self._each, phase, step)

    def _join(self) -> None:
        if self.job is not None:
            self.job.result()
            self.job = None

    def _each(self, phase: str, step: Step) -> None:
        """Take a step on every live server at once; those that fail are live no more."""

        async def one(turn: Turn) -> None:
            try:
                await step(turn)
            except ServerError as err:
                if err.unreachable:
                    self.report.unreachable.add(turn.server.name)
                await self._give_up(turn, str(err))

        async def all_of_them() -> None:
            await asyncio.gather(*(one(turn) for turn in self.live))

        with self._timed(phase):
            self.sync.run(all_of_them())
        failed = self.report.failed
        self.live = [turn for turn in self.live if turn.server.name not in failed]

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = monotonic()
        try:
            yield
        finally:
            seconds = self.report.seconds
            seconds[phase] = seconds.get(phase, 0.0) + monotonic() - started

    # On the loop, for one server.

    async def _open(self, turn: Turn) -> None:
        turn.server.state = "syncing"
        await self.sync.transport.open(turn.server)

    async def _begin(self, turn: Turn) -> None:
        server, config = turn.server, self.sync.config
        turn.since = monotonic()
        if server.capabilities.pause:
            turn.paused = True  # it may be, though it does not say so
            await self._command(turn, "/pause_generation", {"mode": config.pause})
        if self.by_disk:
            if server.capabilities.checksum:
                turn.before = await self._held(turn)
            return
        turn.marked = True
        await self._name(turn, self._unfinished)
        if server.capabilities.update_session:
            await self._command(turn, "/begin_weight_update")
            turn.session = True

    async def _send(self, turn: Turn, *, packed: Any, nbytes: int) -> None:
        turn.touched = True
        await self.sync.transport.send(turn.server, packed, nbytes)

    async def _close_session(self, turn: Turn) -> None:
        if turn.session:
            await self._command(turn, "/end_weight_update")
            turn.session = False
        if self.sync.config.pause == "in_place":
            # The buckets did not flush: a server refuses to while requests hold a part of its
            # cache. Where none does, nothing of the old weights is to be found by new ones.
            with suppress(ServerError):
                await turn.server.client.post("/flush_cache", {}, timeout=CONTROL_S)

    async def _verify_checksums(self, turn: Turn) -> None:
        why = await self.sync.verify_checksums(turn.server)
        if why:
            raise ServerError(turn.server.url, "/weights_checker", 200, why)

    async def _resume(self, turn: Turn) -> None:
        await self._name(turn, self.sync.tag(self.version))
        turn.marked = False
        if turn.paused:
            await self._command(turn, "/continue_generation")
            turn.paused = False
        seconds = self.report.seconds
        seconds["paused"] = max(seconds.get("paused", 0.0), monotonic() - turn.since)

    async def _verify_probe(self, turn: Turn) -> None:
        assert self.probe is not None
        gap = await verify.verify_log_probs(turn.server, self.probe, self.sync.tolerance)
        self.report.gap = max(self.report.gap, gap.mean)
        if gap.why:
            raise ServerError(turn.server.url, "/generate", 200, gap.why)

    async def _settle(self, turn: Turn) -> None:
        server = turn.server
        if not turn.same:
            raise ServerError(server.url, "", 0, "restarted during the sync")
        server.state, server.version = "serving", self.version

    async def _give_up(self, turn: Turn, why: str) -> None:
        """Let a server go that failed, or that nothing more is sent to: as it was if it certainly
        holds its old weights, else "unsynced" and under a name that nobody trusts.
        """
        server = turn.server
        self.report.failed[server.name] = why
        self.sync.transport.drop(server)
        kept = not turn.touched
        try:
            if turn.touched and turn.before is not None:
                kept = await self._held(turn, GIVE_UP_S) == turn.before
            if turn.session:
                await self._command(turn, "/end_weight_update", wait=GIVE_UP_S)
            if not kept:
                await self._name(turn, self._unfinished, wait=GIVE_UP_S)
                await self._command(turn, "/abort_request", {"abort_all": True}, wait=GIVE_UP_S)
            elif turn.marked and turn.old_version >= 0:
                await self._name(turn, self.sync.tag(turn.old_version), wait=GIVE_UP_S)
            if turn.paused:
                await self._command(turn, "/continue_generation", wait=GIVE_UP_S)
        except ServerError:
            kept = False  # it is for the supervisor to see what has become of it
        if not turn.same:
            return
        kept = kept and turn.old_version >= 0
        server.state = "serving" if kept else "unsynced"
        server.version = turn.old_version if kept else -1

    async def _held(self, turn: Turn, wait: float = CONTROL_S) -> Any:
        """Something that changes with any bit of the server's weights."""
        answer = await self._command(turn, "/weights_checker", {"action": "checksum"}, wait=wait)
        return [rank["checksums"] for rank in answer["ranks"]]

    async def _name(self, turn: Turn, name: str, wait: float = CONTROL_S) -> None:
        if turn.server.capabilities.weight_version:
            body = {"new_version": name, "abort_all_requests": False}
            await self._command(turn, "/update_weight_version", body, wait=wait)

    async def _command(
        self, turn: Turn, path: str, body: Any = None, wait: float = CONTROL_S
    ) -> Any:
        return await turn.server.client.control(path, body, timeout=wait)
