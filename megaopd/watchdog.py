"""A run that stands still ends with the name of the rank that holds it up, and can be restarted.

`enter` and `beat` note where this rank is: a few nanoseconds, no I/O, no device sync. A thread of
every rank writes that to run_dir/heartbeats/rank_N.json. A rank that has not moved for `stall`
seconds writes the stacks of its threads beside it; once no rank has moved for so long, the lowest
rank that still answers prints one report and ends its process. torchrun then ends the others and,
with restarts left, starts the job again, which goes on from its last good checkpoint.

The straggler is, in this order: a rank whose thread has stopped writing (stopped, or in code that
never lets Python run); a rank that is not waiting in a collective while others are; the rank that
has come least far. All others wait for it.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from megaopd.errors import EXIT_INTERNAL

FOLDER = "heartbeats"
# Frames of these files mean that a thread waits for other ranks.
COLLECTIVE = ("torch/distributed/", "pipeline_parallel/p2p_communication", "megaopd/worlds.py")
TEACHING = "teach"  # the phase of ranks of the teacher's own, which enter no others
ASLEEP = 2.0  # seconds late, beyond three rounds, of a thread whose process was stopped
LINES = 24  # of the straggler's stack in the report


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    entered: int = 0  # phases entered so far, alike on all ranks
    step: int = 0
    phase: str = "start"
    beats: int = 0  # within the phase: micro-batches, answers
    at: float = 0.0  # time.monotonic()


_place = Place(at=time.monotonic())


def enter(phase: str, step: int | None = None) -> None:
    """This rank begins a phase that every rank begins; `step`: where a new one begins."""
    global _place
    step = _place.step if step is None else step
    _place = Place(_place.entered + 1, step, phase, 0, time.monotonic())


def beat() -> None:
    """This rank has moved on within its phase."""
    global _place
    here = _place
    _place = Place(here.entered, here.step, here.phase, here.beats + 1, time.monotonic())


class Watchdog:
    """The thread of one rank, while the block runs.

    Args:
        run_dir: shared by all ranks.
        stall_s: seconds without a move, of every rank, that end the run; 0: no watchdog.
    """

    def __init__(
        self, run_dir: Path, rank: int, world: int, *, stall_s: float, out: TextIO | None = None
    ) -> None:
        self.dir, self.rank, self.world, self.stall = run_dir / FOLDER, rank, world, stall_s
        self.out = out or sys.stderr
        self.interval = min(10.0, max(0.2, stall_s / 20))
        self._ticks, self._since = 0, 0.0
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> its last tick, since when
        self._dumped: Place | None = None
        self._stop = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.stall:
            self.dir.mkdir(parents=True, exist_ok=True)
            for stale in self.dir.glob(f"rank_{self.rank}.*"):
                stale.unlink()
            self._write()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        woken = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            if now - woken > 3 * self.interval + ASLEEP:
                self._since = now  # this process was stopped (Ctrl-Z) and goes on: no stall
            self._ticks, woken = self._ticks + 1, now
            age = self._write()
            if age > self.stall and _place is not self._dumped:
                self._dumped = _place
                with (self.dir / f"rank_{self.rank}.stack").open("w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
            if age > self.stall + 3 * self.interval:
                report = self._judge()
                if report and not self._stop.is_set():
                    (self.dir / "stall.txt").write_text(report + "\n")
                    print(report, file=self.out, flush=True)
                    os._exit(EXIT_INTERNAL)

    def _write(self) -> float:
        """This rank's file, replaced as a whole; the seconds since it moved."""
        place, frames = _place, sys._current_frames()
        age = time.monotonic() - max(place.at, self._since)
        main = frames.get(self._main or 0)
        mine = threading.get_ident()
        record = {
            **asdict(place),
            "age": age,
            "tick": self._ticks,
            "waits": any(_waits(f) for ident, f in frames.items() if ident != mine),
            "where": _where(main),
        }
        path = self.dir / f"rank_{self.rank}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record))
        temporary.replace(path)
        return age

    def _judge(self) -> str:
        """The report, where no rank moves and it is this rank's turn to say so."""
        records = {rank: _read(self.dir / f"rank_{rank}.json") for rank in range(self.world)}
        now, silent = time.monotonic(), set()
        for rank, record in records.items():
            tick = record.get("tick", -1)
            if rank not in self._seen or self._seen[rank][0] != tick:
                self._seen[rank] = tick, now
            elif now - self._seen[rank][1] > max(6 * self.interval, 5.0):
                silent.add(rank)
        answering = [rank for rank in records if rank not in silent]
        # The file of a rank that was stopped in mid-course looks young until it counts as silent.
        if any(records[rank].get("age", 0.0) < self.stall for rank in answering):
            return ""
        if self.rank != min(answering, default=self.rank):
            return ""
        return make_report(self.dir, records, silent)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def stragglers(records: dict[int, dict[str, Any]], silent: set[int]) -> list[int]:
    """The ranks that the others wait for; [] where none stands out."""
    if silent:
        return sorted(silent)
    busy = [rank for rank, record in records.items() if not record["waits"]]
    if 0 < len(busy) < len(records):
        return busy
    places = {
        rank: (r["entered"], r["beats"])
        for rank, r in records.items()
        if r.get("phase") != TEACHING
    }
    behind = [rank for rank, place in places.items() if place == min(places.values())]
    return behind if len(behind) < len(places) or len(records) == 1 else []


def make_report(folder: Path, records: dict[int, dict[str, Any]], silent: set[int]) -> str:
    """Who holds the run up, where every rank is, and the stack of the first straggler."""
    named = stragglers(records, silent)
    minutes = min((r["age"] for k, r in records.items() if k not in silent), default=0.0) / 60
    who = f"rank {_ranges(named)} holds the others up" if named else "no rank stands out"
    if len(named) > 1:
        who = f"ranks {_ranges(named)} hold the others up"
    lines = [f"megaopd: no rank has moved for {minutes:.1f} minutes: {who}"]
    groups: dict[str, list[int]] = {}
    for rank, record in records.items():
        groups.setdefault(_line(record, rank in silent), []).append(rank)
    for text, ranks in groups.items():
        lines.append(f"  rank {_ranges(ranks)}: {text}{'  <--' * (ranks[0] in named)}")
    for rank in named[:1]:
        stack = folder / f"rank_{rank}.stack"
        if rank not in silent and stack.is_file():
            lines.append(f"  stack of rank {rank}, innermost first (all threads: {stack}):")
            lines += [f"    {line.strip()}" for line in _main_stack(stack.read_text())]
    lines.append("  this run ends here; started again, it goes on from its last good checkpoint")
    return "\n".join(lines)


def _line(record: dict[str, Any], silent: bool) -> str:
    if not record:
        return "has written nothing"
    beats = f", beat {record['beats']}" if record["beats"] else ""
    place = f"step {record['step']}, {record['phase']}{beats}"
    if silent:
        return f"{place}, and its process does not answer any more"
    return f"{place}, {'waits in a collective' if record['waits'] else 'at'} ({record['where']})"


def _ranges(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _main_stack(text: str) -> list[str]:
    """The main thread's frames: faulthandler writes that thread last."""
    return text.strip().rpartition("\n\n")[2].splitlines()[1 : LINES + 1]


def _waits(frame: FrameType | None) -> bool:
    """Whether a thread is inside a collective."""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in COLLECTIVE):
            return True
        frame = frame.f_back
    return False


def _where(frame: FrameType | None) -> str:
    """Innermost frame of a thread: file, line, function."""
    if frame is None:
        return "?"
    last = traceback.extract_stack(frame, limit=1)[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno} {last.name}"
