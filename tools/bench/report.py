"""Records as one document: a Markdown page, the raw numbers as JSON, a plot."""

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .alternatives import PACKAGES
from .worker import CHUNKED, SUMMED, UNCHUNKED, Record

WRONG = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 5e-2}  # gradient errors above are marked
KEY = ("dtype", "hidden", "vocab", "tokens", "ranks", "chunk")  # a table each
HEADER = (
    "method",
    "time / products, same chunks",
    "time / products, all tokens",
    "time / products, hidden gradient summed",
    "peak MB",
    "outputs MB",
    "after forward MB",
    "collectives",
    "B/token",
    "hidden B/token",
    "error of hidden.grad",
    "error of weight.grad",
    "error of loss",
)
LEGEND = """\
- Time: forward and backward, one thread a rank, as a ratio to the four matrix products that none
  can do without (student logits, teacher logits, hidden gradient, weight gradient) in buffers made
  beforehand: in the same chunks of tokens, and of all tokens at once. Every measurement is paired
  with one of the products right before or after it, in random order; a round visits all methods in
  random order. Median over the pairs with its 95% bootstrap interval. With several ranks a barrier
  comes first, and the slowest rank counts; a third ratio is to products in the same chunks that
  also sum the hidden gradient over the ranks, as a split of the vocabulary must (under sequence
  parallel by a reduce-scatter, half of it).
- Peak: bytes that torch's CPU allocator hands out during forward and backward and has not got back,
  beyond the inputs. `outputs` are the part that is wanted: both gradients, the loss and the
  per-token vectors. `after forward` is what stays until backward. Temporaries inside operators
  count; workspace of the BLAS library and of gloo does not. MB = 10^6 bytes.
- Collectives: calls that carry numbers a token (a chunk, for ours), and their bytes a token and
  rank, as contributed, in forward and backward. Traffic of hidden states is counted apart.
- Error: relative difference from dense fp64 autograd on the same inputs; gradients in the 2-norm.
- Logits have a standard deviation of 3; the teacher's are the student's with noise; every token
  weighs 1/T.
"""


def environment() -> dict[str, Any]:
    """Versions and the machine, without names and paths."""
    versions = {"torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "versions": versions,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def read_records(out: Path) -> list[Record]:
    """The records of an earlier document; none where there is none."""
    path = out.with_suffix(".json")
    return json.loads(path.read_text())["records"] if path.exists() else []


def merge(old: list[Record], new: list[Record]) -> list[Record]:
    """New records replace old ones of the same method and table; tables come in order of size."""
    keyed = {(record["method"], *table_key(record)): record for record in [*old, *new]}
    return sorted(keyed.values(), key=table_key)


def table_key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in KEY)


def write(out: Path, records: list[Record], command: str) -> None:
    """out.json, out.md and out.png; `command` is how to make them again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    about = environment()
    document = {"command": command, "environment": about, "records": records}
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    draw(out.with_suffix(".png"), records)
    out.with_suffix(".md").write_text(markdown(records, about, command, out.name))


def markdown(records: list[Record], about: dict[str, Any], command: str, name: str) -> str:
    """The page: legend, plot, a table for each shape and number of ranks, what was left out."""
    versions = ", ".join(f"{k} {v or '(absent)'}" for k, v in about["versions"].items())
    lines = [
        "# Losses at the output layer, measured",
        "",
        f"    {command}",
        "",
        f"{about['date']}, {about['processor']}, {about['cores']} cores, {versions}.",
        "",
        LEGEND,
        *_methods(records),
        f"![time and memory]({name}.png)",
        "",
    ]
    for _, group in groupby(records, table_key):
        lines += _section(list(group))
    return "\n".join(lines + _flatness(records)).rstrip() + "\n"


def _methods(records: list[Record]) -> list[str]:
    """What the names stand for: "+stats" rows are the same with statistics."""
    notes = {r["method"]: r["note"] for r in records if r["note"] and "+" not in r["method"]}
    lines = [f"- {name}: {note}" for name, note in notes.items()]
    return [*lines, "- +stats: with the statistics of return_stats (labels given)", ""]


def _section(records: list[Record]) -> list[str]:
    one = records[0]
    title = f"T={one['tokens']}, H={one['hidden']}, V={one['vocab']}, chunk {one['chunk']}"
    ranks = f"TP {one['ranks']}, {one['dtype']}"
    base = next((r["products_seconds"] for r in records if "products_seconds" in r), None)
    lines = [f"## {title}: {ranks}", ""]
    if base is not None:
        counts = sorted({r["pairs"] for r in records if "pairs" in r}, reverse=True)
        others = "".join(f", {n} of other implementations" for n in counts[1:])
        pairs = f"{counts[0]} pairs{others}"
        crowded = f" Only {one['cores']} cores: the ranks take turns." * (
            one["ranks"] > one["cores"]
        )
        lines += [f"The products in chunks take {base:.3f} s. {pairs}.{crowded}", ""]
    lines += [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    rows = [r for r in records if r["skipped"] is None]
    lines += [f"| {' | '.join(row(record))} |" for record in rows]
    left_out: dict[str, list[str]] = {}
    for record in records:
        if record["skipped"] is not None:
            left_out.setdefault(record["skipped"], []).append(record["method"])
    if left_out:
        lines += [
            "",
            *(f"- left out: {', '.join(names)}: {why}" for why, names in left_out.items()),
        ]
    return [*lines, ""]


def row(record: Record) -> list[str]:
    """The cells of a record under HEADER; "-" where nothing was measured."""
    yardstick = record["method"] == CHUNKED
    return [
        record["method"],
        "1" if yardstick else _cell(record, "ratio", _ratio),
        "1" if record["method"] == UNCHUNKED else _cell(record, "ratio_unchunked", _ratio),
        "1" if record["method"] == SUMMED else _cell(record, "ratio_summed", _ratio),
        _cell(record, "peak_bytes", _megabytes),
        _cell(record, "output_bytes", _megabytes),
        _cell(record, "held_bytes", _megabytes),
        _traffic(record),
        _cell(record, "scalar_bytes", lambda n: f"{n / record['tokens']:.4g}"),
        _cell(record, "hidden_bytes", lambda n: f"{n / record['tokens']:.4g}"),
        _cell(record, "hidden_error", lambda e: _error(e, record["dtype"])),
        _cell(record, "weight_error", lambda e: _error(e, record["dtype"])),
        _cell(record, "loss_error", lambda e: _error(e, record["dtype"])),
    ]


def _cell(record: Record, key: str, show: Callable[[Any], str]) -> str:
    return show(record[key]) if record.get(key) is not None else "-"


def _ratio(interval: dict[str, float]) -> str:
    return f"{interval['median']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}"


def _error(error: float, dtype: str) -> str:
    return f"{error:.1e}" if error <= WRONG[dtype] else f"**wrong** ({error:.2g})"


def _traffic(record: Record) -> str:
    if "scalar_calls" not in record:
        return "-"
    if record["ours"]:
        return f"{record['scalar_calls'] / record['chunks']:.3g} a chunk"
    return f"{record['scalar_calls']} in all"


def _flatness(records: list[Record]) -> list[str]:
    """Peak beyond outputs at each number of tokens, for methods measured at several."""
    grouped: dict[tuple[Any, ...], dict[int, float]] = {}
    for record in records:
        if "peak_bytes" in record and record["ours"]:
            key = (record["method"], *(record[k] for k in KEY[:-1] if k != "tokens"))
            beyond = (record["peak_bytes"] - record["output_bytes"]) / 1e6
            grouped.setdefault(key, {})[record["tokens"]] = beyond
    several = {key: values for key, values in grouped.items() if len(values) > 1}
    if not several:
        return []
    tokens = sorted({t for values in several.values() for t in values})
    lines = ["## Peak beyond outputs against tokens (MB)", ""]
    lines += [f"| method | H | V | TP | {' | '.join(f'T={t}' for t in tokens)} | last / first |"]
    lines += ["|" + "---|" * (len(tokens) + 5)]
    for (method, _, hidden, vocab, ranks), values in several.items():
        cells = [f"{values[t]:.1f}" if t in values else "-" for t in tokens]
        growth = values[max(values)] / values[min(values)]
        cells = [method, str(hidden), str(vocab), str(ranks), *cells, f"{growth:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def draw(path: Path, records: list[Record]) -> None:
    """A row of two bar charts for each shape; ranks side by side."""
    from matplotlib.figure import Figure

    shown = [r for r in records if r["skipped"] is None and r["method"] != CHUNKED]
    shapes = [list(g) for _, g in groupby(shown, lambda r: table_key(r)[:4])]
    # What was measured for its memory alone has a table of its own.
    shapes = [group for group in shapes if any("ratio" in r for r in group)] or shapes
    if not shapes:
        return
    heights = [1.2 + 0.32 * len({r["method"] for r in group}) for group in shapes]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    axes = figure.subplots(len(shapes), 2, squeeze=False, height_ratios=heights)
    for (time, memory), group in zip(axes, shapes, strict=True):
        one = group[0]
        title = f"T={one['tokens']} H={one['hidden']} V={one['vocab']} {one['dtype']}"
        _bars(time, group, lambda r: r.get("ratio", {}).get("median"), None)
        time.axvline(1.0, color="#808080", lw=1)
        time.set_title(f"{title}: time / bare products in the same chunks", fontsize=9)
        _bars(memory, group, _peak_mb, lambda r: r["output_bytes"] / 1e6)
        memory.set_title("peak MB beyond inputs (pale: the outputs)", fontsize=9)
        memory.set_yticklabels([])
        memory.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": ""})


def _peak_mb(record: Record) -> float | None:
    return record["peak_bytes"] / 1e6 if "peak_bytes" in record else None


def _bars(
    axes: Any,
    records: list[Record],
    value: Callable[[Record], float | None],
    pale: Callable[[Record], float] | None,
) -> None:
    methods = list(dict.fromkeys(r["method"] for r in records))
    ranks = sorted({r["ranks"] for r in records})
    width = 0.8 / len(ranks)
    colors = ("#3b82f6", "#f59e0b", "#10b981", "#a855f7")
    for i, count in enumerate(ranks):
        rows = [r for r in records if r["ranks"] == count and value(r) is not None]
        places = [methods.index(r["method"]) + (i + 0.5) * width - 0.4 for r in rows]
        values = [value(r) for r in rows]
        axes.barh(places, values, width, color=colors[i % 4], label=f"TP {count}")
        if pale is not None:
            axes.barh(places, [pale(r) for r in rows], width, color="white", alpha=0.6)
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="x", alpha=0.2)
