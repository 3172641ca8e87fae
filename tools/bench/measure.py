"""Instruments: live bytes, collectives, interleaved pairs, medians with an interval.

They know torch and no loss.
"""

import functools
import gc
import inspect
import os
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = Callable[[], Any]

RESAMPLES = 2000

# function -> its parameter that holds what a rank contributes: a tensor or a list of tensors
COLLECTIVES = {
    "all_reduce": "tensor",
    "reduce": "tensor",
    "broadcast": "tensor",
    "gather": "tensor",
    "scatter": "scatter_list",
    "send": "tensor",
    "all_gather": "tensor",
    "all_gather_into_tensor": "input_tensor",
    "all_gather_single": "input_tensor",
    "reduce_scatter": "input_list",
    "reduce_scatter_tensor": "input",
    "reduce_scatter_single": "input",
    "all_to_all": "input_tensor_list",
    "all_to_all_single": "input",
}


class LiveBytes(AbstractContextManager["LiveBytes"]):
    """Bytes that torch's CPU allocator hands out inside the block and has not yet got back.

    Every storage is one allocation: counted once, whatever the number of its views, and released
    when it is freed. Temporaries inside torch's operators and buffers of compiled code count too;
    the workspace of the BLAS library and gloo's buffers do not come from this allocator. A block
    that was allocated before is not seen, neither alive nor freed.

    After the block: `peak`, `end`, and `at[name]` for each mark(name), all relative to its start.
    """

    def __init__(self) -> None:
        self.peak = self.end = 0
        self.at: dict[str, int] = {}
        self._profile = profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
        )
        self._marks: list[str] = []

    def __enter__(self) -> "LiveBytes":
        self._profile.__enter__()
        return self

    def mark(self, name: str) -> None:
        """Keep the number of live bytes at this point as at[name]."""
        self._marks.append(name)
        with record_function(_mark_label(name)):
            pass

    def __exit__(self, *exc: object) -> None:
        self._profile.__exit__(None, None, None)
        profiler: Any = self._profile.profiler
        marks = {_mark_label(name): name for name in self._marks}
        events = [
            (event.start_ns(), event.name(), event.nbytes())
            for event in profiler.kineto_results.events()
            if event.name() == "[memory]" or event.name() in marks
        ]
        events.sort(key=lambda event: event[0])
        for _, name, nbytes in events:
            if name in marks:
                self.at[marks[name]] = self.end
            else:
                self.end += nbytes
                self.peak = max(self.peak, self.end)


def _mark_label(name: str) -> str:
    return f"LiveBytes:{name}"


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operators have handed out inside the block and that are alive.

    Unlike LiveBytes it follows a storage to its end in whatever thread that is (gloo's threads let
    go of the tensors of a collective), and does not see what operators allocate for themselves: the
    copies that gloo makes, casts inside an addition. Those are the CPU's; on a GPU there are none.

    After a mark(name), `at[name]` is what was alive there and `peaks[name]` the highest until the
    next mark.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._since = ""
        self._sizes: dict[int, int] = {}  # bytes by the storage's address, while it lives

    def mark(self, name: str) -> None:
        """Keep the number of live bytes at this point as at[name]."""
        self._since = name
        self.at[name] = self.peaks[name] = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        if self._since:
            self.peaks[self._since] = max(self.peaks[self._since], self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind these tensors, each storage once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@dataclass(frozen=True)
class Call:
    """One collective: its name, shape and bytes of what this rank contributes."""

    name: str
    shape: tuple[int, ...]
    nbytes: int


class Collectives(AbstractContextManager["Collectives"]):
    """Records the calls into torch.distributed of this process while the block runs.

    The functions of the module are replaced, so a caller that bound one by `from ... import` before
    the block is not seen. A collective that calls another is counted once.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._originals: dict[str, Callable[..., Any]] = {}
        self._inside = False

    def __enter__(self) -> "Collectives":
        for name, parameter in COLLECTIVES.items():
            if hasattr(dist, name):  # some are newer than others
                self._originals[name] = getattr(dist, name)
                setattr(dist, name, self._counted(name, parameter))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counted(self, name: str, parameter: str) -> Callable[..., Any]:
        original = self._originals[name]
        signature = inspect.signature(original)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            payload = signature.bind(*args, **kwargs).arguments.get(parameter)
            parts = [payload] if isinstance(payload, Tensor) else list(payload or [])
            nbytes = sum(part.numel() * part.element_size() for part in parts)
            self.calls.append(Call(name, tuple(parts[0].shape) if parts else (), nbytes))
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        return call

    def split(self, hidden: int, rows: int) -> tuple[list[Call], list[Call]]:
        """(scalars a token, hidden states): the latter are [at least `rows`, ..., hidden]."""
        scalars, states = [], []
        for call in self.calls:
            wide = len(call.shape) > 1 and call.shape[-1] == hidden and call.shape[0] >= rows
            (states if wide else scalars).append(call)
        return scalars, states


def pin(core: int) -> None:
    """Keep every thread of this process on one core."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


@dataclass(frozen=True)
class Interval:
    """A median and its 95% bootstrap interval."""

    median: float
    low: float
    high: float


def bootstrap_median(values: Sequence[float], seed: int = 0) -> Interval:
    """Median of the values, with the 2.5% and 97.5% quantiles of the medians of resamples."""
    generator = random.Random(seed)
    size = len(values)
    medians = sorted(statistics.median(generator.choices(values, k=size)) for _ in range(RESAMPLES))
    edge = round(0.025 * (RESAMPLES - 1))
    return Interval(statistics.median(values), medians[edge], medians[-1 - edge])


@dataclass
class Pairs:
    """Seconds of a step and of the yardstick that ran right before or after it, pair by pair."""

    step: list[float]
    yardstick: list[float]

    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.step, self.yardstick, strict=True)]


def visited(wanted: int, rounds: int) -> list[int]:
    """The rounds in which a step is timed that is wanted so often: spread over all of them."""
    wanted = min(wanted, rounds)
    return [i for i in range(rounds) if i * wanted // rounds != (i + 1) * wanted // rounds]


def time_pairs(
    steps: dict[str, Step],
    yardstick: Step,
    rounds: int,
    *,
    fewer: Mapping[str, int] | None = None,
    before: Step = lambda: None,
    advance: Step = lambda: None,
    seed: int = 0,
) -> dict[str, Pairs]:
    """Each round visits all steps in a new random order and times each beside the yardstick.

    fewer: steps that are visited in so many rounds only.

    Which of the two goes first is drawn as well, the same on every rank that uses the same seed.
    `before` (a barrier, the removal of old gradients) runs ahead of every measurement, garbage is
    collected there and not during it; `advance` is called after every pair.
    """
    generator = random.Random(seed)
    names = list(steps)
    result = {name: Pairs([], []) for name in names}
    when = {name: set(visited((fewer or {}).get(name, rounds), rounds)) for name in names}
    gc.freeze()  # what libraries hold is not searched again at each collection
    try:
        for number in range(rounds):
            generator.shuffle(names)
            for name in names:
                if number not in when[name]:
                    continue
                pair = [(result[name].step, steps[name]), (result[name].yardstick, yardstick)]
                generator.shuffle(pair)
                for seconds, step in pair:
                    seconds.append(_seconds(step, before))
                advance()
    finally:
        gc.unfreeze()
    return result


def _seconds(step: Step, before: Step) -> float:
    gc.collect()
    gc.disable()
    try:
        before()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    finally:
        gc.enable()
