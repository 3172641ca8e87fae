"""report.html: one self-contained page from whatever a run directory holds.

    metrics.jsonl, events.jsonl   plots             config.toml     the resolved configuration
    summary.json                  key figures       samples.jsonl   prompts and responses

A part that is missing or malformed becomes a sentence; nothing is loaded from elsewhere.
"""

import json
import os
from pathlib import Path
from typing import Any

from megaopd.errors import UserError
from megaopd.report.diagnosis import diagnosis
from megaopd.report.metrics import read_events, read_metrics
from megaopd.report.plots import draw_plots

MAX_SAMPLES = 100
NEXT_KEYS = ("what_next", "what next", "next", "next_steps")


def write_report(run_dir: Path, *, title: str | None = None) -> Path:
    """Write run_dir/report.html and return its path.

    Raises:
        UserError: no such directory.
    """
    from jinja2 import Environment, PackageLoader

    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"no run directory {run_dir}", expected="the directory of a run")
    environment = Environment(
        loader=PackageLoader("megaopd.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics, events = read_metrics(run_dir), read_events(run_dir)
    samples, samples_total = _samples(run_dir / "samples.jsonl")
    summary = _summary(run_dir / "summary.json")
    page = environment.get_template("template.html").render(
        title=title or run_dir.resolve().name,
        steps=len(metrics),
        span=_span(metrics),
        diagnosis=diagnosis(metrics) if metrics else [],
        plots=draw_plots([*metrics, *_event_rows(events)]),
        samples=samples,
        samples_total=samples_total,
        config=_text(run_dir / "config.toml"),
        events=[_event_line(event) for event in events[-50:]],
        **summary,
    )
    path = run_dir / "report.html"
    temporary = run_dir / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _span(metrics: list[dict[str, Any]]) -> str:
    """Wall time from the first to the last step."""
    times = [row["time"] for row in metrics if isinstance(row.get("time"), int | float)]
    return _duration(times[-1] - times[0]) if len(times) > 1 else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _event_rows(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Numbers of events that have a step, e.g. evaluations, as rows to plot: "eval/accuracy"."""
    rows = []
    for event in events:
        if isinstance(event.get("step"), int | float):
            kind = event.get("kind", "event")
            fields = {k: v for k, v in event.items() if k not in ("kind", "time", "step")}
            rows.append({"step": event["step"], **{f"{kind}/{k}": v for k, v in fields.items()}})
    return rows


def _event_line(event: dict[str, Any]) -> dict[str, str]:
    fields = {k: v for k, v in event.items() if k not in ("kind", "time", "step")}
    return {
        "step": str(event.get("step", "")),
        "kind": str(event.get("kind", "")),
        "text": ", ".join(f"{k} {_figure(v)}" for k, v in fields.items()),
    }


def _figure(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _summary(path: Path) -> dict[str, Any]:
    """The parts of the summary: before/after pairs, further tables, plain figures, what next."""
    parts: dict[str, Any] = {"pairs": [], "tables": [], "figures": [], "next": [], "problem": ""}
    text = _text(path)
    if text is None:
        parts["problem"] = "There is no summary.json: the run has not finished, or wrote none."
        return parts
    try:
        summary = json.loads(text)
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        parts["problem"] = "summary.json is not a JSON object, so there are no key figures."
        return parts
    summary = dict(summary)
    for key in NEXT_KEYS:
        value = summary.pop(key, [])
        parts["next"] += [value] if isinstance(value, str) else [str(line) for line in value]
    for name, before, after in _pairs(summary):
        parts["pairs"].append((name, _figure(before), _figure(after), _change(before, after)))
    for key, value in summary.items():
        if isinstance(value, dict):
            parts["tables"].append(
                (_words(key), [(_words(k), _figure(v)) for k, v in value.items()])
            )
        else:
            parts["figures"].append((_words(key), _figure(value)))
    return parts


def _pairs(summary: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Take {"x": {"before", "after"}} and {"x_before", "x_after"} out of the summary."""
    pairs = []
    for key in list(summary):
        value = summary.get(key)
        if isinstance(value, dict) and value.keys() == {"before", "after"}:
            pairs.append((_words(key), value["before"], value["after"]))
            del summary[key]
        elif key.endswith("_before") and (other := key[: -len("before")] + "after") in summary:
            pairs.append((_words(key[: -len("_before")]), summary.pop(key), summary.pop(other)))
    return pairs


def _change(before: Any, after: Any) -> str:
    numbers = isinstance(before, int | float) and isinstance(after, int | float)
    return f"{after - before:+.4g}" if numbers else ""


def _words(key: str) -> str:
    return key.replace("_", " ")


def _samples(path: Path) -> tuple[list[dict[str, str]], int]:
    """The first samples as text, and how many there are; malformed lines are left out."""
    rows = []
    for line in (_text(path) or "").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    names = {"expected": ("expected", "answer"), "prompt": ("prompt", "text")}
    shown = []
    for row in rows[:MAX_SAMPLES]:
        cells = {}
        for column in ("step", "prompt", "response", "expected", "reward"):
            keys = names.get(column, (column,))
            value = next((row[key] for key in keys if row.get(key) is not None), "")
            cells[column] = _figure(value)
        shown.append(cells)
    return shown, len(rows)
