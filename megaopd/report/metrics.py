"""One call a step, log_metrics(step, dict), feeds metrics.jsonl, the console and wandb.

metrics.jsonl holds each step once, also after a kill and a resume: lines past the checkpoint are
dropped when the run is taken up again. Floats are written so that equal floats give equal bytes and
read back exactly; NaN and Infinity are written as such (Python's JSON reads them).
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from megaopd.report.config import ReportConfig
from megaopd.report.wandb_sink import wandb_sink

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
HEADER_EVERY = 25  # console lines
DEFAULT_COLUMNS = 8
MIN_WIDTH = 9


class Logger(Protocol):
    """What the run needs of a logger; NullLogger is the one of ranks other than 0."""

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None: ...
    def log_event(self, kind: str, values: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class NullLogger:
    """Takes everything and writes nothing."""

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def log_event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class MetricLogger:
    """Writes the metrics and events of one run; made on rank 0 only."""

    def __init__(
        self,
        run_dir: Path,
        config: ReportConfig,
        *,
        columns: Sequence[str] | None = None,
        total_steps: int | None = None,
        resume_step: int | None = None,
    ) -> None:
        """
        Args:
            columns: metrics of the console line; None: the first 8 of the first step.
            total_steps: shown as "step/total".
            resume_step: last step that the checkpoint holds; later lines are dropped. None: a new
                run; files of an earlier one are set aside as metrics.jsonl.1, .2, ...
        """
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._last_step: int | None = None
        if resume_step is None:
            _set_aside(run_dir / METRICS)
            _set_aside(run_dir / EVENTS)
        else:
            self._last_step = _truncate(run_dir / METRICS, resume_step)
            _truncate(run_dir / EVENTS, None)  # history: what was done again stays on record
        self._metrics = (run_dir / METRICS).open("a", encoding="utf-8")
        self._events = (run_dir / EVENTS).open("a", encoding="utf-8")
        self._line = ConsoleLine(columns, total_steps) if config.console else None
        self._wandb = wandb_sink(run_dir, config)
        self._every = config.every

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the numbers of a step: floats, ints, or anything with .item(), such as tensors.

        Raises:
            ValueError: the step is not later than the last one.
        """
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"step {step} logged after step {self._last_step}: once each, in order"
            )
        self._last_step = step
        values = {key: _number(value) for key, value in metrics.items()}
        _append(self._metrics, {"step": step, **values, "time": round(time.time(), 3)})
        if step % self._every == 0:
            if self._line is not None:
                self._line.print(step, values)
            self._wandb.log(step, values)

    def log_event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Record something that is not a step: an evaluation, a resume, an alarm, a checkpoint."""
        plain = {key: _number(value) for key, value in values.items()}
        _append(self._events, {"kind": kind, **plain, "time": round(time.time(), 3)})

    def close(self) -> None:
        """Close the files and finish the wandb run."""
        self._metrics.close()
        self._events.close()
        self._wandb.close()


class ConsoleLine:
    """An aligned line a step, the header again every 25."""

    def __init__(self, columns: Sequence[str] | None, total_steps: int | None) -> None:
        self._columns = None if columns is None else list(columns)
        self._total = total_steps
        self._printed = 0
        self._console = Console()

    def print(self, step: int, values: Mapping[str, Any]) -> None:
        """Print the chosen columns; a metric that is absent at this step leaves a gap."""
        if self._columns is None:
            self._columns = list(values)[:DEFAULT_COLUMNS]
        step_text = str(step) if self._total is None else f"{step}/{self._total}"
        step_width = max(len("step"), 5 if self._total is None else 2 * len(str(self._total)) + 1)
        widths = [max(len(column), MIN_WIDTH) for column in self._columns]
        if self._printed % HEADER_EVERY == 0:
            names = [f"{c:>{w}}" for c, w in zip(self._columns, widths, strict=True)]
            self._write("  ".join([f"{'step':>{step_width}}", *names]), style="bold")
        cells = [
            f"{format_number(values[c]) if c in values else '':>{w}}"
            for c, w in zip(self._columns, widths, strict=True)
        ]
        self._write("  ".join([f"{step_text:>{step_width}}", *cells]))
        self._printed += 1

    def _write(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def format_number(value: Any) -> str:
    """At most 9 characters: integers whole, floats to 4 significant digits."""
    if isinstance(value, int) and abs(value) < 10**8:
        return str(value)
    if not isinstance(value, int | float):
        return str(value)[:9]
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:#.4g}".rstrip(".")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, in order; a torn last line is left out. Empty: no such file."""
    return _read(Path(run_dir) / METRICS)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl, likewise."""
    return _read(Path(run_dir) / EVENTS)


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _append(file: Any, record: dict[str, Any]) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line that ends in a newline and parses, up to the first that does not."""
    lines: list[tuple[bytes, dict[str, Any]]] = []
    if path.is_file():
        for raw in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n") or not isinstance(record, dict):
                break
            lines.append((raw, record))
    return lines


def _read(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in _whole_lines(path)]


def _truncate(path: Path, last_step: int | None) -> int | None:
    """Keep the whole lines up to a step, byte for byte; returns the last step kept."""
    lines = _whole_lines(path)
    if last_step is not None:
        lines = [(raw, record) for raw, record in lines if record.get("step", 0) <= last_step]
    if path.is_file():
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.writelines(raw for raw, _ in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return lines[-1][1].get("step") if lines else None


def _set_aside(path: Path) -> None:
    if not path.is_file():
        return
    if path.stat().st_size == 0:
        path.unlink()
        return
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    path.rename(path.with_name(f"{path.name}.{number}"))
