"""Mathematical answers, compared as mathematics by the math-verify library.

math-verify stops a comparison that takes too long with SIGALRM, which exists in main threads only,
and which cannot interrupt a big-integer power at all. So the comparison runs in a process of its
own, where signals work, under a memory limit; a reply that is late costs that process its life and
the response its reward. Verification may be called from any thread, and no response hangs a run.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from megaopd.data.tasks.base import Example, Split
from megaopd.errors import UserError

START_S = 60.0  # importing sympy on a busy machine
MEMORY_BYTES = 4 << 30
TAIL_CHARS = 8000  # the final answer is at the end; the patterns are slow on more


class MathTask:
    """Verifies only; questions come from a JSONL file."""

    name = "math"

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def example(self, index: int, seed: int, split: Split) -> Example:
        """Always a UserError: this task has no generator."""
        raise UserError(
            "task math has no questions of its own",
            fix='data.source = a .jsonl file of {"prompt": ..., "answer": ...} lines',
        )

    def verify(self, response: str, answer: str, meta: Mapping[str, Any]) -> float:
        """1 if the final answer of the response equals `answer`; 0 if it does not, or is late.

        The final answer is the last \\boxed{} after the thinking, else what math-verify finds.
        """
        tail = response.rpartition("</think>")[2][-TAIL_CHARS:]
        # math-verify joins boxes that stand close together into a set.
        tail = tail[max(tail.rfind("\\boxed"), 0) :]
        request = json.dumps([answer, tail, max(1, round(self.timeout_s))]).encode() + b"\n"
        with self._lock:
            worker = self._running_worker()
            assert worker.stdin is not None and worker.stdout is not None
            try:
                worker.stdin.write(request)
                reply = _read_line(worker.stdout, 2 * self.timeout_s + 1)
            except BrokenPipeError:
                reply = None
            if reply not in (b"0", b"1"):
                self._stop()
        return float(reply == b"1")

    def close(self) -> None:
        """End the process; the next verify starts another."""
        with self._lock:
            self._stop()

    def _running_worker(self) -> subprocess.Popen[bytes]:
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._worker = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            # It needs no accelerator, and its memory limit leaves no room for one.
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert self._worker.stdout is not None
        if _read_line(self._worker.stdout, START_S) != b"ready":
            self._stop()
            raise UserError(
                "the math verifier did not start", fix="pip install 'math-verify[antlr4_13_2]'"
            )
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            for pipe in (self._worker.stdin, self._worker.stdout):
                if pipe is not None:
                    pipe.close()
            self._worker = None


def _read_line(pipe: IO[bytes], timeout_s: float) -> bytes | None:
    """One line without its end; None where it is late or the writer has gone."""
    line, deadline = b"", time.monotonic() + timeout_s
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return None
        chunk = os.read(pipe.fileno(), 4096)
        if not chunk:
            return None
        line += chunk
    return line.strip()


def equal(answer: str, response: str, timeout_s: int) -> bool:
    """Whether the response's final answer is `answer`. Main thread only: it sets SIGALRM."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    marked = "\\boxed" in answer or "$" in answer
    try:
        gold = parse(answer if marked else f"\\boxed{{{answer}}}", parsing_timeout=timeout_s)
        found = parse(response, parsing_timeout=timeout_s)
        return bool(verify(gold, found, timeout_seconds=timeout_s))
    except (Exception, TimeoutException, RecursionError):
        # sympy and antlr raise nearly anything on a model's text: not a right answer.
        return False


def serve() -> None:
    """The process: one JSON request a line on stdin, "1" or "0" a line on stdout."""
    import logging
    import resource

    import math_verify  # noqa: F401 before the limit and the first request: it is slow

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a stray print must not look like a reply
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        answer, response, timeout_s = json.loads(line)
        try:
            right = equal(answer, response, timeout_s)
        except MemoryError:
            right = False
        replies.write(b"1\n" if right else b"0\n")


if __name__ == "__main__":
    serve()
