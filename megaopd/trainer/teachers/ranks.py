"""A frozen teacher on ranks of its own, beside the student's in the same job.

The student asks: its rank 0 sends what every rank wants. The teacher's ranks score at once and run
ahead of the student, who takes the hidden rows one micro-batch at a time, when its loss needs them.
They run ahead by a window only: a tensor counts as under way until its receiver has used it and
sent a credit, and nobody sends more than `window` tensors to one receiver without credits.

Shapes: R rows of one receiver, T rows of a micro-batch, Ht the teacher's hidden size.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from megaopd import platform, stop, watchdog
from megaopd.models.arch import Architecture
from megaopd.models.config import ModelConfig
from megaopd.parallel import Grid, ParallelConfig, broadcast_object, gather_objects, make_grid
from megaopd.trainer.batch import MicroBatch
from megaopd.trainer.teachers.base import BaseTeacher, load_output_layer
from megaopd.trainer.teachers.exchange import Turn, build_scorer, part_or_empty
from megaopd.trainer.teachers.scoring import run_jobs, sender_of
from megaopd.trainer.teachers.wants import (
    Job,
    Wants,
    local_wants,
    make_jobs,
    share_of_replica,
    teacher_sequences,
)
from megaopd.worlds import Bridge, Layout


@dataclass(frozen=True)
class Request:
    """The student wants a step's rows; a message without a teacher's name ends the service."""

    teacher: str | None
    wants: list[Wants | None]
    sequences: dict[int, tuple[int, ...]]  # those that the wants speak of
    window: int
    stopped: bool = False  # the service ends because the run was asked to


class SeparateTeacher(BaseTeacher):
    """The student's side. Making it is a collective over the student's ranks.

    Args:
        name: of the teacher, where its ranks hold several.
        vocab_rows: the student's padded vocabulary.
        window: micro-batches that may be under way to one rank from one of the teacher's replicas.
    """

    def __init__(
        self,
        config: ModelConfig,
        arch: Architecture,
        grid: Grid,
        bridge: Bridge,
        *,
        vocab_rows: int,
        window: int,
        name: str = "",
    ) -> None:
        import torch

        self.arch, self.grid, self.bridge = arch, grid, bridge
        self.name, self.window = name, window
        self.width, self.torch_dtype = arch.hidden, getattr(torch, config.dtype)
        self.head = load_output_layer(config, arch, grid, vocab_rows=vocab_rows)
        self.senders = senders(bridge)
        self.received_bytes = 0

    def hidden_states(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        """As BaseTeacher's: functions on the last stage, and nothing has arrived yet."""
        samples = micro_batches[0].samples
        wants = gather_objects(local_wants(micro_batches, self.grid))
        jobs = make_jobs(wants)
        sequences = teacher_sequences(samples, self.arch.max_positions)
        if self.grid.rank == 0:
            needed = sorted({i for job in jobs for i in job.samples})
            asked = Request(self.name, wants, {i: sequences[i] for i in needed}, self.window)
            self.bridge.tell_teachers(asked)
        if not self.grid.is_last_stage:
            return [None] * len(micro_batches)
        inbox = shared_inbox(self.bridge, self.window)
        taken = inbox.expect(self, jobs)
        return [partial(taken, number, micro) for number, micro in enumerate(micro_batches)]

    def output_weight(self, micro: MicroBatch | None = None) -> Any:
        return self.head

    def parameters(self) -> Iterable[Any]:
        return () if self.head is None else (self.head,)

    def metrics(self) -> dict[str, float]:
        """Bytes of hidden states that the student's ranks received."""
        received, self.received_bytes = self.received_bytes, 0
        return {"teacher/received_bytes": float(sum(gather_objects(received)))}

    def asked_to_stop(self) -> bool:
        return self.grid.rank == 0 and self.bridge.asked_to_stop()

    def close(self, *, stopped: bool = False) -> None:
        """The teacher's ranks end their service (once, whichever of several teachers closes)."""
        if self.grid.rank == 0 and not self.bridge.closed:
            self.bridge.tell_teachers(Request(None, [], {}, 0, stopped=stopped))
        self.bridge.flush()
        self.bridge.closed = True


def shared_inbox(bridge: Bridge, window: int) -> "Inbox":
    """One a rank: what the teacher's ranks send comes in one order, whichever teacher made it."""
    if bridge.inbox is None:
        bridge.inbox = Inbox(bridge, window)
    return bridge.inbox


@dataclass
class Incoming:
    """Rows that are to come."""

    teacher: SeparateTeacher
    micro: int
    rows: int
    sender: int
    part: Any = None
    work: Any = None


class Inbox:
    """Rows on one of the student's ranks, in the order they were asked for, `window` ahead."""

    def __init__(self, bridge: Bridge, window: int) -> None:
        self.bridge, self.window = bridge, window
        self.coming: deque[Incoming] = deque()
        self.posted: deque[Incoming] = deque()

    def expect(self, teacher: SeparateTeacher, jobs: Sequence[Job]) -> Callable[..., Any]:
        """Receive one request's rows; take(number, micro) then gives them, once each, in order."""
        numbers = set()
        for job in jobs:
            for receiver, rows in job.receivers:
                if receiver == teacher.grid.rank:
                    sender = teacher.senders.rank_of(job, receiver)
                    self.coming.append(Incoming(teacher, job.micro, len(rows), sender))
                    numbers.add(job.micro)
        self._post()

        def take(number: int, micro: MicroBatch) -> Any:
            part = self._next(teacher, number) if number in numbers else None
            dtype = teacher.torch_dtype
            return part_or_empty(part, micro, teacher.width, dtype, teacher.grid)

        return take

    def _post(self) -> None:
        import torch

        while self.coming and len(self.posted) < self.window:
            item = self.coming.popleft()
            shape, dtype = (item.rows, item.teacher.width), item.teacher.torch_dtype
            item.part = torch.empty(shape, dtype=dtype, device=platform.device())
            item.teacher.received_bytes += item.part.numel() * item.part.element_size()
            item.work = self.bridge.irecv(item.part, item.sender)
            self.posted.append(item)

    def _next(self, teacher: SeparateTeacher, number: int) -> Any:
        item = self.posted.popleft()
        assert (item.teacher, item.micro) == (teacher, number), "taken out of order"
        item.work.wait()
        self.bridge.send_credit(item.sender)
        self._post()
        return item.part


@dataclass(frozen=True)
class Senders:
    """Which of the teacher's ranks sends what; known on both sides."""

    ranks: dict[tuple[int, int], int]  # (data-parallel rank, tensor rank) -> rank of the job
    replicas: int
    tensor: int

    def rank_of(self, job: Job, receiver: int) -> int:
        return self.ranks[job.replica(self.replicas), sender_of(receiver, self.tensor)]


def senders(bridge: Bridge) -> Senders:
    """The teacher's last stages: its ranks say so when they are up. Once, before any request.

    A collective over the student's ranks on their side and over the teacher's on theirs.
    """
    if bridge.senders is None:
        first = bridge.recv_object(bridge.students) if bridge.rank == 0 else None
        bridge.senders = broadcast_object(first)
    return bridge.senders


def serve(
    teachers: Mapping[str, tuple[ModelConfig, Architecture]],
    parallel: ParallelConfig,
    bridge: Bridge,
    *,
    offload: bool = False,
    make: "Callable[[Bridge, Grid], Service] | None" = None,
    watch: AbstractContextManager[Any] | None = None,
) -> "Service":
    """The teacher's side: build every teacher on these ranks and score until the student closes.

    Args:
        teachers: by name; all of them on all of these ranks.
        offload: keep each one's weights on the host between its turns.
        make: another Service.
        watch: entered at the first request, when the student watches too (watchdog.py).
    """
    grid = make_grid(parallel)
    layout = Layout(grid)
    place = (grid.dp_rank, grid.tp_rank) if grid.is_last_stage else None
    places = gather_objects(place)
    if grid.rank == 0:
        ranks = {where: bridge.students + r for r, where in enumerate(places) if where is not None}
        bridge.send_object(Senders(ranks, grid.dp_size, grid.tp_size), 0)
        bridge.flush()
    service = (make or Service)(bridge, grid)
    for name, (config, arch) in teachers.items():
        model = build_scorer(config, arch, layout)
        service.models[name] = model, Turn(model.parameters, enabled=offload)
    service.run(watch)
    return service


class Service:
    """One of the teacher's ranks at work."""

    def __init__(self, bridge: Bridge, grid: Grid) -> None:
        self.bridge, self.grid = bridge, grid
        self.models: dict[str, tuple[Any, Turn]] = {}
        self.most_under_way = 0  # tensors to one receiver, ever
        self.stopped = False  # the run was asked to end

    def run(self, watch: AbstractContextManager[Any] | None = None) -> None:
        """Answer requests until one ends the service."""
        watchdog.enter(watchdog.TEACHING)
        with ExitStack() as watched:
            while True:
                request: Request = self.bridge.recv_object(0)
                if request.teacher is None:
                    self.stopped = request.stopped
                    return
                if stop.asked():  # a signal may have reached this node alone
                    self.bridge.ask_to_stop()
                watchdog.beat()
                if watch is not None:
                    watched.enter_context(watch)
                    watch = None
                self.answer(request)

    def payload(self, teacher: str, rows: Any) -> Any:
        """[R, Ht] -> what is sent of them: the rows themselves."""
        return rows

    def answer(self, request: Request) -> None:
        name = request.teacher
        assert name is not None
        model, turn = self.models[name]
        grid, outbox = self.grid, Outbox(self.bridge, request.window)
        jobs = share_of_replica(make_jobs(request.wants), grid.dp_rank, grid.dp_size)
        longest = max(request.sequences)
        sequences = [request.sequences.get(i, ()) for i in range(longest + 1)]

        def deliver(job: Job, mine: list[tuple[int, Any]]) -> None:
            outbox.deliver(job, [(rank, self.payload(name, rows)) for rank, rows in mine])

        with turn:
            run_jobs(model, grid, jobs, sequences, deliver)
        outbox.drain()
        self.most_under_way = max(self.most_under_way, outbox.most_under_way)


class Outbox:
    """Sends rows as they are scored, and waits where a receiver has not used the earlier ones."""

    def __init__(self, bridge: Bridge, window: int) -> None:
        self.bridge, self.window, self.most_under_way = bridge, window, 0
        self.under_way: dict[int, deque[tuple[Any, Any]]] = {}

    def deliver(self, job: Job, mine: list[tuple[int, Any]]) -> None:
        for rank, rows in mine:
            queue = self.under_way.setdefault(rank, deque())
            if len(queue) == self.window:
                self._retire(rank)
            rows = rows.contiguous()
            queue.append((rows, self.bridge.isend(rows, rank)))
            self.most_under_way = max(self.most_under_way, len(queue))

    def drain(self) -> None:
        """Wait until everything has been used."""
        for rank, queue in self.under_way.items():
            while queue:
                self._retire(rank)

    def _retire(self, rank: int) -> None:
        """The oldest tensor to `rank` has been used."""
        self.bridge.wait_credit(rank)
        _, work = self.under_way[rank].popleft()
        work.wait()
