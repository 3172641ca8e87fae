"""More than one layout in a job: a second grid on the same ranks, or ranks of a teacher's own.

The models and schedules get their process groups passed, but nothing here relies on
megatron-core never asking its global parallel_state for them. So a second grid on the same ranks
brings a parallel_state of its own, which stands in for the first one while `active`. Ranks of the
teacher's own form a world of their own: torch.distributed and megatron-core see two jobs, each
whole, and only the bridge between them knows of both.
"""

import pickle
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from megaopd import platform
from megaopd.errors import UserError
from megaopd.parallel import Grid, ParallelConfig, make_grid

# A request waits for as long as the student samples, evaluates or saves; a dead student ends the
# job by the launcher's hand.
CONTROL_TIMEOUT = timedelta(days=7)
STOP_KEY = "megaopd/stop"
MANY = 256  # requests and credits that may be on their way from one rank
REQUEST, CREDIT, HIDDEN = 1, 2, 3  # tags; NCCL has none and needs none, by the order of calls


@dataclass(frozen=True)
class Layout:
    """A grid, and megatron-core's global state that belongs to it (None: the job's own)."""

    grid: Grid
    state: dict[str, Any] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """While this lasts, megatron-core's parallel_state is this layout's."""
        if self.state is None:
            yield
            return
        before = _snapshot()
        _restore(self.state)
        try:
            yield
        finally:
            _restore(before)


def second_layout(config: ParallelConfig) -> Layout:
    """The same ranks once more, laid out by `config`; the job's own grid stays as it is.

    A collective over the world. Random number streams are left alone: nothing draws from the
    second layout's.

    Raises:
        UserError: the world size is no multiple of the layout.
    """
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    before = _snapshot()
    tracker: Any = get_cuda_rng_tracker()
    streams, generator = tracker.get_states(), torch.get_rng_state()
    try:
        grid = make_grid(config)  # forgets the first layout, whose groups live on in `before`
        return Layout(grid, _snapshot())
    finally:
        _restore(before)
        tracker.set_states(streams)
        torch.set_rng_state(generator)


def _snapshot() -> dict[str, Any]:
    """Every global of parallel_state that a layout sets."""
    from megatron.core import parallel_state

    keep = "_global_process_group_list"
    state = {k: v for k, v in vars(parallel_state).items() if re.fullmatch(r"_[A-Z][A-Z0-9_]*", k)}
    return {k: v for k, v in state.items() if k != keep and not isinstance(v, type)}


def _restore(state: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    for name, value in state.items():
        setattr(parallel_state, name, value)


@dataclass
class Bridge:
    """Between the student's world and the teacher's: ranks of the whole job, students first."""

    control: Any  # gloo: requests and credits
    data: Any  # gloo or NCCL: hidden states
    rank: int  # of the whole job
    students: int
    teachers: int
    store: Any = None  # kept: rank 0 may hold the server
    sent: dict[str, int] = field(default_factory=dict)  # bytes by kind, counted where they are sent
    senders: Any = None  # of the teacher (trainer/teachers/ranks.py), once they are known
    inbox: Any = None  # likewise, on the student's last stage
    closed: bool = False
    _sending: deque[Any] = field(default_factory=deque)  # alive until they have been received

    @property
    def is_teacher(self) -> bool:
        return self.rank >= self.students

    def ask_to_stop(self) -> None:
        """Hand the wish to stop, which reached this world, to the other one."""
        self.store.set(STOP_KEY, "1")

    def asked_to_stop(self) -> bool:
        """Whether the other world was asked to stop."""
        return self.store is not None and self.store.check([STOP_KEY])

    def count(self, kind: str, size: int) -> None:
        self.sent[kind] = self.sent.get(kind, 0) + size

    def send_object(self, obj: Any, rank: int) -> None:
        """A small host object to one rank; nobody waits until it listens."""
        import torch

        body = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        for tensor in (torch.tensor([body.numel()]), body):
            self._send_control(tensor, rank, REQUEST)
        self.count("requests", body.numel() + 8)

    def _send_control(self, tensor: Any, rank: int, tag: int) -> None:
        self._sending.append((tensor, self.control.send([tensor], rank, tag)))
        while len(self._sending) > MANY:  # gloo does not tell; the oldest are long gone
            self._sending.popleft()[1].wait()

    def flush(self) -> None:
        """Wait until every request and credit has been received."""
        while self._sending:
            self._sending.popleft()[1].wait()

    def tell_teachers(self, obj: Any) -> None:
        """A small host object to every rank of the teacher's."""
        for rank in range(self.students, self.students + self.teachers):
            self.send_object(obj, rank)

    def recv_object(self, rank: int) -> Any:
        """What `send_object` sent from `rank`."""
        import torch

        size = torch.zeros(1, dtype=torch.int64)
        self.control.recv([size], rank, REQUEST).wait()
        body = torch.empty(int(size), dtype=torch.uint8)
        self.control.recv([body], rank, REQUEST).wait()
        return pickle.loads(body.numpy().tobytes())

    def send_credit(self, rank: int) -> None:
        """Tell a sender that one of its tensors has been used; nobody waits until it listens."""
        import torch

        self._send_control(torch.ones(1, dtype=torch.int64), rank, CREDIT)
        self.count("credits", 8)

    def wait_credit(self, rank: int) -> None:
        import torch

        self.control.recv([torch.zeros(1, dtype=torch.int64)], rank, CREDIT).wait()

    def isend(self, tensor: Any, rank: int) -> Any:
        """Begin to send hidden states; the tensor must live until `wait` on what this returns."""
        self.count("hidden", tensor.numel() * tensor.element_size())
        return self.data.send([tensor], rank, HIDDEN)

    def irecv(self, tensor: Any, rank: int) -> Any:
        return self.data.recv([tensor], rank, HIDDEN)


def join_worlds(teacher_ranks: int, *, timeout_minutes: int = 30) -> Bridge:
    """Split the job: its last `teacher_ranks` ranks become the teacher's world.

    The default process group of a rank is then its own world, numbered from 0.

    Raises:
        UserError: no rank is left for the student.
    """
    import torch.distributed as dist

    platform.install()
    assert not dist.is_initialized(), "the job is one world already"
    timeout = timedelta(minutes=timeout_minutes)
    c10d: Any = dist
    store, rank, world = next(c10d.rendezvous("env://", timeout=timeout))
    students = world - teacher_ranks
    if students < 1:
        raise UserError(
            f"{world} ranks with teacher_parallel.ranks = {teacher_ranks}",
            expected="ranks for the student besides the teacher's",
            fix=f"start {teacher_ranks} ranks more than the student needs",
        )
    teaches = rank >= students
    dist.init_process_group(
        platform.backend(),
        store=c10d.PrefixStore("megaopd/teacher" if teaches else "megaopd/student", store),
        rank=rank - students if teaches else rank,
        world_size=teacher_ranks if teaches else students,
        timeout=timeout,
    )

    def group(name: str, backend: str, limit: timedelta) -> Any:
        return platform.raw_group(
            backend, c10d.PrefixStore(f"megaopd/{name}", store), rank, world, limit
        )

    return Bridge(
        control=group("control", "gloo", CONTROL_TIMEOUT),
        data=group("data", platform.backend(), CONTROL_TIMEOUT),
        rank=rank,
        students=students,
        teachers=teacher_ranks,
        store=store,
    )
