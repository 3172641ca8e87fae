"""Ranks that outlive a test: spawned once, given a fresh process group for every case.

Importing torch and megatron-core takes some 25 s on a busy machine, so workers are started when a
case first needs them and kept. A failing or hanging case costs the pool: the other ranks may be
stuck in a collective, so all are killed and the next case starts new ones.
"""

import contextlib
import faulthandler
import gc
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

START_TIMEOUT = 300


class Ranks:
    """`run(fn, world, ...)` calls fn on ranks 0..world-1 with torch.distributed over gloo."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._workers: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._case = 0

    def run(
        self, fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120, **kwargs: Any
    ) -> list[Any]:
        """fn(*args, **kwargs) on each rank; the list of what they return, by rank.

        fn is a module-level function. Its arguments and results travel by value (pickle). An
        exception, a dead rank or a time-out raises AssertionError with the rank and its traceback.
        """
        assert 1 <= world <= self.size, f"world {world}, pool of {self.size}"
        self._start(world)
        self._case += 1
        store = Path(self._folder.name, f"store-{self._case}")
        task = pickle.dumps((fn, args, kwargs))
        port = _free_port()
        for rank in range(world):
            self._pipes[rank].send((rank, world, port, str(store), task))
        try:
            return self._collect(world, timeout, getattr(fn, "__name__", str(fn)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kills the workers. The next run starts new ones."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        self._workers, self._pipes = [], []

    def _start(self, world: int) -> None:
        context = get_context("spawn")
        first = len(self._workers)
        for rank in range(first, world):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_worker, args=(theirs, self._stack_file(rank)), daemon=True
            )
            with _no_gpu():
                worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)
        try:
            self._collect(world, START_TIMEOUT, "starting the ranks", first)
        except BaseException:
            self.close()
            raise

    def _collect(self, world: int, timeout: float, what: str, first: int = 0) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < world - first:
            waiting = {self._pipes[r]: r for r in range(first, world) if r not in results}
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(waiting.values())
                raise AssertionError(
                    f"{what}: no answer from ranks {late} in {timeout} s\n{self._stacks(late)}"
                )
            for pipe in ready:
                rank = waiting[pipe]  # pyright: ignore
                try:
                    ok, payload = pipe.recv()  # pyright: ignore
                except (EOFError, OSError):
                    self._workers[rank].join(5)
                    code = self._workers[rank].exitcode
                    raise AssertionError(f"{what}: rank {rank} died (exit {code})") from None
                if not ok:
                    raise AssertionError(f"{what}: rank {rank} of {world} failed\n{payload}")
                results[rank] = pickle.loads(payload)
        return [results[rank] for rank in range(first, world)]

    def _stack_file(self, rank: int) -> str:
        return str(Path(self._folder.name, f"stack-{rank}"))

    def _stacks(self, ranks: list[int]) -> str:
        """Where the ranks that did not answer are."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._workers[rank].pid, signal.SIGUSR1)
        time.sleep(1)
        parts = []
        for rank in ranks:
            path = Path(self._stack_file(rank))
            parts.append(f"rank {rank}:\n{path.read_text() if path.exists() else '(no stack)'}")
        return "\n".join(parts)


@contextlib.contextmanager
def _no_gpu() -> Any:
    """Ranks of the pool run on the CPU over gloo, on a GPU machine too."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(pipe: connection.Connection, stack_file: str) -> None:
    """Serves cases until the parent closes the pipe."""
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        try:
            import torch

            torch.set_num_threads(1)
            from megaopd import platform

            platform.install()
            torch.set_num_threads(1)
        except Exception:
            pipe.send((False, traceback.format_exc()))
            return
        pipe.send((True, pickle.dumps(None)))
        while True:
            try:
                rank, world, port, store, task = pipe.recv()
            except EOFError:
                return
            try:
                answer = (True, pickle.dumps(_one_case(rank, world, port, store, task)))
            except Exception:
                # Told before anything is torn down: the first rank to report is the one to blame.
                answer = (False, traceback.format_exc())
            pipe.send(answer)


def _let_go() -> None:
    """Free the case's models: they hold their process groups, and each of those some threads.

    They are in cycles. One of them gc does not see, through autograd's graph: the dispatcher of a
    layer of experts keeps the probabilities of the last pass.
    """
    for thing in gc.get_objects():
        if type(thing).__name__.endswith("TokenDispatcher"):
            vars(thing).clear()
    gc.collect()


def _one_case(rank: int, world: int, port: int, store: str, task: bytes) -> Any:
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    fn, args, kwargs = pickle.loads(task)
    result = fn(*args, **kwargs)
    _let_go()
    dist.barrier()  # no rank leaves while another still talks to it
    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    dist.destroy_process_group()
    return result
