"""What went wrong in a run, in words, from its metrics: `megaopd report`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaopd.report.alarms import (
    ALARMS,
    FIRST,
    LAST,
    Metrics,
    Watch,
    distance,
    judged,
    means,
    numbers,
)


@dataclass(frozen=True)
class Symptom:
    """An alarm of a run."""

    name: str
    step: int  # that raised it
    says: str  # at that step
    means: str
    fix: str


def symptoms(rows: Sequence[Mapping[str, Any]]) -> list[Symptom]:
    """The alarms of a run, the first one first; rows: lines of metrics.jsonl."""
    watch, found = Watch(), []
    for row in rows:
        for name, says in watch.see(row).items():
            found.append(
                Symptom(name, row.get("step", 0), says, ALARMS[name].means, ALARMS[name].fix)
            )
    return found


def diagnosis(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences: each symptom with what became of it until the end, or what went well.

    Alarms that many causes end in come after those that name one; else the first one first.
    """
    plain = [numbers(row) for row in rows]
    first, last = means(plain[:FIRST]), means(plain[-LAST:])
    at_end = judged(plain[:FIRST], plain[-LAST:])
    lines = []
    for one in sorted(symptoms(rows), key=lambda one: ALARMS[one.name].general):
        text = at_end.get(one.name) or f"{one.says} (at step {one.step}; no longer at the end)"
        text += _while(one.name, first, last)
        text += f": {one.means}. Try {one.fix}. (first seen at step {one.step})"
        lines.append(text[0].upper() + text[1:])
    if len(rows) < FIRST + LAST:
        what = "other alarms" if lines else "a diagnosis"
        return [*lines, f"{len(rows)} steps are too few for {what}: it takes {FIRST + LAST}."]
    told = _told(first, last)
    if not lines:
        return [f"No alarm. {told}" if told else "No alarm."]
    return [*lines, told] if told else lines


def _while(name: str, first: Metrics, last: Metrics) -> str:
    """That the objective, by its own account, went well meanwhile."""
    if name not in ("mass_student", "distance") or not last.get("loss", 0.0) < first.get("loss", 0):
        return ""
    return f" while the loss improved from {first['loss']:.3f} to {last['loss']:.3f}"


def _told(first: Metrics, last: Metrics) -> str:
    """Where the run began and ended."""
    parts = []
    far, was = distance(last), distance(first)
    if far and was and far[0] == was[0]:
        parts.append(f"distance to the teacher ({far[0]}) {was[1]:.3f} -> {far[1]:.3f}")
    for name in ("reward", "entropy", "response_length"):
        if name in first and name in last:
            parts.append(f"{name.replace('_', ' ')} {first[name]:.3g} -> {last[name]:.3g}")
    return f"From the first steps to the last: {', '.join(parts)}." if parts else ""
