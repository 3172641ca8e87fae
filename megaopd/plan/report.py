"""A plan as tables and as JSON."""

import dataclasses
from typing import Any

from megaopd.plan.communication import Traffic, step_traffic
from megaopd.plan.hardware import (
    EFFICIENCY,
    FIXED_RESERVE,
    FRAGMENTS,
    GIB,
    LINK_EFFICIENCY,
    Gpu,
)
from megaopd.plan.head import chunk_rows
from megaopd.plan.job import Job, Side
from megaopd.plan.memory import StageMemory
from megaopd.plan.search import Found, Search, distinct, why_too_large

PARTS = ("weights", "gradients", "optimizer", "teacher_weights", "rollout", "buffers", "batch")


def as_dict(found: Found, gpu: Gpu, result: Search | None) -> dict[str, Any]:
    """Everything that the tables say, in bytes and seconds."""
    job = found.job
    document: dict[str, Any] = {
        "gpu": dataclasses.asdict(gpu),
        "world": job.world,
        "teacher_world": job.teacher_world,
        "student": _side(job.student),
        "teacher": _side(job.teacher) if job.teacher else None,
        "micro_batches": job.micro_batches,
        "sequence": job.padded_sequence,
        "fits": found.fullest.total <= gpu.memory,
        "stages": [_stage(stage) for stage in found.memory],
        "traffic": [dataclasses.asdict(one) for one in step_traffic(job)],
        "seconds": {**dataclasses.asdict(found.seconds), "total": found.seconds.total},
    }
    if result is not None:
        document["suggestions"] = [
            {"settings": one.settings, "seconds": one.seconds.total, "bytes": one.fullest.total}
            for one in distinct(result.fits, 8)
        ]
        document["too_large"] = [
            {"settings": one.settings, "why": why_too_large(one, gpu)}
            for one in result.near_misses()
        ]
        document["impossible"] = dict(result.reasons.most_common())
    return document


def _side(side: Side) -> dict[str, Any]:
    model = side.model
    return {
        "name": model.name,
        "parameters": model.parameters(),
        "active_parameters": model.parameters(active=True),
        "layout": dataclasses.asdict(side.layout),
        "itemsize": side.itemsize,
        "recompute": side.recompute,
    }


def _stage(stage: StageMemory) -> dict[str, Any]:
    values = dataclasses.asdict(stage)
    return values | {"phases": stage.phases, "peak": stage.peak, "total": stage.total}


def layout_text(side: Side) -> str:
    """Short: tp4 pp2 cp1 sp."""
    layout = side.layout
    named = {"tp": layout.tensor, "pp": layout.pipeline, "vpp": layout.virtual}
    named |= {"cp": layout.context, "ep": layout.expert}
    parts = [f"{name}{size}" for name, size in named.items() if size > 1 or name == "tp"]
    return " ".join([*parts, *(["sp"] if layout.sequence else [])])


def gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 20 else ("0" if not size else "<0.1")


def print_plan(found: Found, gpu: Gpu, result: Search | None) -> None:
    """The tables on the console."""
    from rich.console import Console

    console = Console(width=110)
    _print_head(console, found, gpu)
    console.print(_memory_table(found, gpu))
    console.print(_traffic_table(found.job, gpu))
    _print_seconds(console, found)
    full, room = found.fullest, gpu.memory
    verdict = "fits" if full.total <= room else f"does not fit: {why_too_large(found, gpu)}"
    console.print(f"This layout {verdict}; {gib(full.total)} of {gib(room)} GiB.", highlight=False)
    if result is not None:
        _print_search(console, result, gpu)


def _print_head(console: Any, found: Found, gpu: Gpu) -> None:
    job = found.job
    for who, side in (("student", job.student), ("teacher", job.teacher)):
        if side:
            model = side.model
            size = f"{model.parameters() / 1e9:.2f}B parameters"
            if model.experts:
                size += f" ({model.parameters(active=True) / 1e9:.1f}B a token)"
            console.print(f"{who}: {model.name}, {size}, {layout_text(side)}", highlight=False)
    data = job.student.data(job.world)
    own = f" and {job.teacher_world} of the teacher's own" if job.teacher_world else ""
    console.print(
        f"{job.world} x {gpu.name}{own}, data parallel {data}; {job.samples} sequences of "
        f"{job.padded_sequence} tokens a step: {job.micro_batches} micro-batches of "
        f"{job.micro_batch} a rank; recompute {job.student.recompute}; loss in chunks of "
        f"{chunk_rows(job)} rows",
        highlight=False,
    )


def _memory_table(found: Found, gpu: Gpu) -> Any:
    from rich.table import Table

    table = Table(title="Memory of a rank, GiB, by pipeline stage", title_justify="left")
    table.add_column("")
    stages = []
    for own in (False, True):
        of_model = [stage for stage in found.memory if stage.own == own]
        stages += of_model if len(of_model) <= 4 else [of_model[0], of_model[-1]]
    for stage in stages:
        table.add_column(stage.name, justify="right")
    for name in PARTS:
        table.add_row(name.replace("_", " "), *(gib(getattr(s, name)) for s in stages))
    table.add_section()
    for phase in ("teacher", "forward", "backward", "optimizer"):
        marks = [("*" if s.worst == phase else "") + gib(s.phases[phase]) for s in stages]
        table.add_row(f"phase: {phase}", *marks)
    table.add_row("  of it: teacher's hidden states", *(gib(s.hidden) for s in stages))
    flights = [f"{gib(s.saved)} x {s.in_flight:g}" for s in stages]
    table.add_row("  of it: activations x in flight", *flights)
    table.add_section()
    table.add_row("live tensors at the peak", *(gib(s.peak) for s in stages))
    reserve = f"reserve ({FIXED_RESERVE / GIB:g} GiB + {FRAGMENTS:.0%})"
    table.add_row(reserve, *(gib(s.reserve) for s in stages))
    table.add_row(f"needed of {gib(gpu.memory)}", *(gib(s.total) for s in stages))
    return table


def _traffic_table(job: Job, gpu: Gpu) -> Any:
    from rich.table import Table

    table = Table(title="Sent by a rank in a step", title_justify="left")
    for name in ("", "ranks", "GiB", "calls", "link"):
        table.add_column(name, justify="right" if name else "left")
    for one in step_traffic(job):
        table.add_row(one.name, str(one.ranks), gib(one.sent), f"{one.calls:,.0f}", _link(one, gpu))
    return table


def _link(one: Traffic, gpu: Gpu) -> str:
    return "network" if one.crosses(gpu) else "node"


def _print_seconds(console: Any, found: Found) -> None:
    parts = dataclasses.asdict(found.seconds).items()
    text = ", ".join(f"{name} {value:.1f}" for name, value in parts)
    beside = found.job.teacher_world and not found.job.scored_first
    overlap = "the teacher beside the student's passes" if beside else "no overlap"
    console.print(
        f"Estimate of a rollout's updates: {found.seconds.total:.1f} s ({text}); {overlap}, "
        f"products at {EFFICIENCY:.0%} of the peak, links at {LINK_EFFICIENCY:.0%}; sampling not "
        "included.",
        highlight=False,
    )


def _print_search(console: Any, result: Search, gpu: Gpu) -> None:
    from rich.table import Table

    console.print(
        f"\nSuggestions: {len(result.fits)} settings fit, {len(result.too_large)} are too large.",
        highlight=False,
    )
    table = Table(title="Best of each layout, fastest estimate first", title_justify="left")
    for name in ("layout", "micro", "recompute", "GiB", "s", "bubble", "network"):
        table.add_column(name, justify="left" if name in ("layout", "recompute") else "right")
    for one in distinct(result.fits, 8):
        job, spent = one.job, one.seconds
        table.add_row(
            layout_text(job.student), str(job.micro_batch), job.student.recompute,
            gib(one.fullest.total), f"{spent.total:.1f}", f"{spent.bubble:.1f}",
            f"{spent.network:.1f}",
        )  # fmt: skip
    console.print(table)
    if result.fits:
        console.print("Use: " + " ".join(result.fits[0].settings), highlight=False)
    near = result.near_misses()
    if near:
        console.print("Too large, the nearest of each layout:", highlight=False)
    for one in near:
        text = f"{layout_text(one.job.student)}: {why_too_large(one, gpu)}"
        console.print(f"  {text}", highlight=False)
    if result.reasons:
        console.print("Cannot be built:", highlight=False)
    for reason, count in result.reasons.most_common(6):
        console.print(f"  {reason} ({count} layouts)", highlight=False)
