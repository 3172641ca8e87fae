"""A progress bar on a terminal, a line now and then in a log, nothing on ranks other than 0."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 30.0


@contextmanager
def progress(
    stage: str, total: int, *, enabled: bool | None = None
) -> Iterator[Callable[[int], None]]:
    """Show how far a stage is; yields a function that is told of n more units done.

        with progress("evaluate", len(prompts)) as advance:
            advance(32)

    Args:
        enabled: None: on rank 0 only, by torchrun's RANK.
    """
    if enabled is None:
        enabled = os.environ.get("RANK", "0") == "0"
    if not enabled:
        yield lambda n: None
    elif sys.stderr.isatty():
        with _bar(stage, total) as advance:
            yield advance
    else:
        lines = _Lines(stage, total)
        yield lines.advance
        lines.end()


@contextmanager
def _bar(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(stage, total=total)
        yield lambda n: bars.advance(task, n)


class _Lines:
    """Plain lines: one every 30 s and one at the end."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done = stage, total, 0
        self.start = self.last = time.monotonic()

    def advance(self, n: int) -> None:
        self.done += n
        if time.monotonic() - self.last >= LINE_EVERY_S:
            self._print()

    def end(self) -> None:
        self._print()

    def _print(self) -> None:
        self.last = time.monotonic()
        seconds = self.last - self.start
        print(f"{self.stage}: {self.done}/{self.total} in {seconds:.0f} s", file=sys.stderr)
