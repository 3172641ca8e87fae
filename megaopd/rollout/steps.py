"""Threads in which environments take their steps, so that one that hangs hangs nothing else."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any


@dataclass(eq=False)
class Call:
    """A function on its way through a thread."""

    function: Callable[[], Any]
    done: "SimpleQueue[Call]"  # it is put here when it has finished, unless it was given up
    began: float | None = None  # time.monotonic(); None: it waits for a thread
    result: Any = None
    error: Exception | None = None
    finished: bool = False
    given_up: bool = False


class StepPool:
    """Up to `threads` daemon threads, started as they are needed.

    A call that was given up goes on, for a thread cannot be ended; another one takes its place. A
    step that never returns therefore costs a thread, and what time it takes from the others.
    """

    def __init__(self, threads: int) -> None:
        self._most, self._threads = threads, 0
        self._open = 0  # calls that are neither finished nor given up
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._lock = threading.Lock()

    def submit(self, function: Callable[[], Any], done: "SimpleQueue[Call]") -> Call:
        """Run `function` in a thread; its Call appears in `done`."""
        call = Call(function, done)
        with self._lock:
            self._open += 1
            self._calls.put(call)
            self._start_missing()
        return call

    def give_up(self, call: Call) -> None:
        """Do not wait for `call` any longer: it never appears in its queue, unless it has."""
        with self._lock:
            if call.finished or call.given_up:
                return
            call.given_up = True
            self._open -= 1
            if call.began is not None:
                self._threads -= 1  # as good as lost
                self._start_missing()

    def close(self) -> None:
        """Let the threads end that have nothing to do."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _start_missing(self) -> None:
        if self._threads < min(self._open, self._most):
            self._threads += 1
            threading.Thread(target=self._work, name="environment", daemon=True).start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            with self._lock:
                if call.given_up:
                    continue
                call.began = time.monotonic()
            try:
                call.result = call.function()
            except Exception as err:  # an environment raises what its author chose
                call.error = err
            with self._lock:
                if call.given_up:
                    return  # another thread has taken this one's place
                call.finished = True
                self._open -= 1
                call.done.put(call)
        with self._lock:
            self._threads -= 1
