"""Plots of a run as inline SVG: which metrics belong together, and what each plot says."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Text is drawn in this colour and then given the colour of the page: readable in light and dark.
_TEXT = "#010203"
_LINES = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#14b8a6", "#ec4899", "#84cc16")
MAX_LINES = len(_LINES)
SMOOTH_FROM = 80  # points; from here on the raw line is pale and a running mean is on top


@dataclass(frozen=True)
class PlotGroup:
    """Metrics that share a plot, found by name."""

    title: str
    pattern: str  # regular expression, searched in the lower-cased metric name
    says: str  # what the reader should see in it


# The first group that matches takes the metric, so the order matters.
GROUPS: tuple[PlotGroup, ...] = (
    PlotGroup(  # first: grad_norm/entropy is a norm
        "Gradient norm",
        r"grad",
        "Size of the gradient before clipping, and of each term's alone where it is logged. Spikes "
        "are steps that clipping had to tame.",
    ),
    PlotGroup(
        "Engine and trainer agreement",
        r"mismatch|probe|log_?prob_(diff|gap|error)|rollout_k",
        "How far the log-probs of the sampling engine and of the trainer are apart for the same "
        "tokens. It should stay near 0; a jump means that they hold different weights.",
    ),
    PlotGroup(
        "Accuracy and reward",
        r"accuracy|\bacc\b|reward|pass_?rate|pass@|solved",
        "The share of responses that the verifier accepts. This is what the run is for.",
    ),
    PlotGroup(
        "Mass on the support",
        r"mass",
        "Probability that each model puts on the tokens a truncated divergence looks at. A falling "
        "student mass means that the student flees to tokens that the loss does not see.",
    ),
    PlotGroup(
        "Slowest rank",
        r"^pace/",
        "Which rank took longest for its forward and backward, and how many times the median. The "
        "same one again and again, well above 1, is a slow GPU.",
    ),
    PlotGroup(
        "Overlap with the teacher",
        r"overlap|rank",
        "How far the two models prefer the same tokens, and where the sampled token stands in the "
        "teacher's order.",
    ),
    PlotGroup(
        "Entropy",
        r"entropy|(^|/)h_[pq]$",
        "How undecided the models are per token, in nats. A collapse to 0 means that the student "
        "repeats itself; a rise means that it has become noisy.",
    ),
    PlotGroup(
        "Distance to the teacher",
        r"kl|jsd|divergence|log_ratio|pi_gap",
        "Divergence between student and teacher per token, in nats. It should fall.",
    ),
    PlotGroup(
        "Loss",
        r"loss|nll|distill|(^|/)value$",
        "The objective that is minimised. For sampled and truncated objectives its value may be "
        "negative and need not fall; then the distance to the teacher is what to read.",
    ),
    PlotGroup("Learning rate", r"(^|/)lr$|learning_rate", "The schedule as it was applied."),
    PlotGroup(
        "Importance weights",
        r"\bess\b|clip|importance|staleness|ratio",
        "How much the samples had to be reweighted because the student has moved on since.",
    ),
    PlotGroup(
        "Throughput",
        r"per_sec|per_s$|/s$|tflops|mfu",
        "Work done per second.",
    ),
    PlotGroup(
        "Response length",
        r"length|tokens$|truncated|finished|repetition|eos_prob",
        "Tokens per response, and the share that was cut at the limit. Growth with falling reward "
        "is a warning.",
    ),
    PlotGroup("Memory", r"memory|_gib$|_bytes$", "Memory in use."),
    PlotGroup(
        "Where the time goes",
        r"time|second|_s$|_ms$",
        "Wall time of each part of a step.",
    ),
    PlotGroup("Other metrics", r"", "Everything else that was logged."),
)

# The order on the page; titles that are not named follow in the order above.
FIRST = ("Accuracy and reward", "Distance to the teacher", "Loss", "Entropy", "Gradient norm")


@dataclass(frozen=True)
class Plot:
    """A finished plot."""

    title: str
    says: str
    svg: str  # safe markup, made here


def group_metrics(rows: Sequence[dict[str, Any]]) -> list[tuple[PlotGroup, list[str]]]:
    """Each group with the numeric metrics that belong to it, in order of first appearance."""
    names: dict[str, None] = {}
    for row in rows:
        for key, value in row.items():
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            if numeric and key not in ("step", "time"):
                names[key] = None
    found: dict[str, list[str]] = {group.title: [] for group in GROUPS}
    for name in names:
        group = next(g for g in GROUPS if re.search(g.pattern, name.lower()))
        found[group.title].append(name)
    order = sorted(GROUPS, key=lambda g: FIRST.index(g.title) if g.title in FIRST else len(FIRST))
    return [(group, found[group.title]) for group in order if found[group.title]]


def draw_plots(rows: Sequence[dict[str, Any]]) -> list[Plot]:
    """One plot for every up to 8 metrics of a group; rows are {"step": s, name: number, ...}."""
    plots = []
    for group, names in group_metrics(rows):
        for start in range(0, len(names), MAX_LINES):
            part = names[start : start + MAX_LINES]
            title = group.title if start == 0 else f"{group.title} (continued)"
            plots.append(Plot(title, group.says, _draw(rows, part)))
    return plots


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    points = [(r["step"], r[name]) for r in rows if isinstance(r.get(name), int | float)]
    points = sorted((step, float(value)) for step, value in points if math.isfinite(value))
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(values: list[float]) -> list[float]:
    """Mean over a centred window of a twentieth of the points."""
    half = max(1, len(values) // 40)
    means = []
    for i in range(len(values)):
        window = values[max(0, i - half) : i + half + 1]
        means.append(sum(window) / len(window))
    return means


def _draw(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "megaopd",
        "text.color": _TEXT,
        "axes.labelcolor": _TEXT,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
        "axes.edgecolor": _TEXT,
        "font.size": 9,
        "font.family": "sans-serif",
        "axes.unicode_minus": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(5.6, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for color, name in zip(_LINES, names, strict=False):
            _draw_line(axes, *_series(rows, name), name, color)
        axes.set_xlabel("step")
        axes.grid(True, alpha=0.18, color="#808080")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(
            loc="outside upper left", frameon=False, fontsize=8, ncols=2 if len(names) > 1 else 1
        )
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue())


def _draw_line(axes: Any, steps: list[float], values: list[float], name: str, color: str) -> None:
    """One metric; "$" would start a formula and a leading "_" would hide it from the legend."""
    label = name.replace("$", r"\$").lstrip("_")
    if len(values) < SMOOTH_FROM:
        marker = "o" if len(values) <= 12 else None
        axes.plot(steps, values, color=color, lw=1.6, marker=marker, ms=3.5, label=label)
        return
    axes.plot(steps, values, color=color, lw=0.7, alpha=0.3)
    axes.plot(steps, _running_mean(values), color=color, lw=1.7, label=label)


def _inline(svg: str) -> str:
    """Only the element, without namespaces (HTML knows them) and in the page's text colour."""
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentColor")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(width|height|version)="[^"]*"', "", opening)  # the page sets the size
    return f'{opening} role="img">{rest}'
