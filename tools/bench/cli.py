"""The command: presets, one process or several ranks, one document."""

import argparse
import fnmatch
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import report
from .cases import CASES, Inputs, Shape
from .references import Truths
from .worker import Job, Record, all_methods, measure, probe, rank_main, summarise, total_steps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
TALK = Console(stderr=True)


@dataclass(frozen=True)
class Preset:
    """What a name stands for; every field can be overridden on the command line."""

    shapes: tuple[Shape, ...]
    ranks: tuple[int, ...]
    pairs: int
    cases: tuple[str, ...] = ("*",)
    alternatives: bool = True
    gradients: bool = True


STANDARD = Shape(tokens=2048, hidden=512, vocab=32768)
PRESETS = {
    "one": Preset((STANDARD,), ranks=(1,), pairs=15),
    "standard": Preset((STANDARD,), ranks=(1, 2, 4), pairs=15),
    "quick": Preset((Shape(256, 128, 8192, 64),), ranks=(1, 2), pairs=5),
    "sweep": Preset(
        (
            Shape(1024, 1024, 32768),
            Shape(4096, 256, 32768),
            Shape(1024, 512, 65536),
            Shape(512, 1024, 151936),
        ),
        ranks=(1,),
        pairs=5,
        cases=("rkl", "rkl+stats", "rkl_top20_tail", "kl_top64"),
    ),
    "memory": Preset(
        tuple(replace(STANDARD, tokens=t) for t in (2048, 8192, 32768)),
        ranks=(1,),
        pairs=0,
        cases=("rkl", "rkl+stats", "fkl", "rkl_top20_tail"),
        alternatives=False,
        gradients=False,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when everything that can run here was measured and written."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _options(argv)
    preset = _preset(options)
    torch.set_num_threads(1)
    names = _names(preset)
    dtype = DTYPES[options.dtype]
    skipped = {}
    for name in names:
        reason = probe(all_methods()[name], dtype)
        if reason is not None:
            skipped[name] = reason
            TALK.print(f"left out: {name}: {reason}", markup=False, highlight=False)
    command = _command(argv)
    records = report.read_records(options.out) if options.merge else []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for shape in preset.shapes:
            for ranks in preset.ranks:
                job = Job(
                    shape.resolved(ranks),
                    dtype,
                    ranks,
                    preset.pairs,
                    names,
                    skipped,
                    max_gib=options.max_gib,
                    other_pairs=options.other_pairs,
                )
                if preset.gradients:
                    job = replace(job, truths=Path(folder))
                    _prepare_truths(job)
                found = run(job, Path(folder))
                summarise(found)
                records = report.merge(records, found)
                report.write(options.out, records, command)
                _print(found)
    TALK.print(f"written: {options.out}.md, .json, .png", highlight=False)
    return 0


def _command(argv: Sequence[str]) -> str:
    """How to make the document again, without the path that it was written to."""
    words = list(argv)
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return shlex.join(["python", "tools/bench_loss.py", *words])


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time, memory, traffic and gradient error of the losses, beside the bare matrix"
        " products and other implementations. Without --preset: one standard shape on one rank.",
    )
    add = parser.add_argument
    add("--preset", choices=[name for name in PRESETS if name != "one"], default=None)
    add("--tokens", type=int)
    add("--hidden", type=int)
    add("--vocab", type=int)
    add("--chunk", type=int, help="tokens whose logits are held at once; default: the losses' own")
    add("--pairs", type=int, help="timed pairs a method; 0: no timing")
    add("--other-pairs", type=int, help="of the other implementations; default: as many")
    add("--tp", type=int, nargs="+", metavar="N", help="numbers of ranks, each measured in turn")
    add("--cases", nargs="+", metavar="NAME", help=f"of {', '.join(CASES)}, each also with +stats")
    add("--alternatives", action=argparse.BooleanOptionalAction, default=None)
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--max-gib", type=float, default=8.0, help="leave out what holds more logits than this")
    add("--out", type=Path, default=Path("docs/bench_loss"), help="without ending")
    add("--merge", action="store_true", help="keep the tables that are already in --out")
    options = parser.parse_args(argv)
    for name in ("tokens", "hidden", "vocab", "chunk", "pairs", "other_pairs"):
        value = getattr(options, name)
        if value is not None and value < (0 if name == "pairs" else 1):
            parser.error(f"--{name.replace('_', '-')} {value}: expected a positive number")
    preset = _preset(options)
    for shape in preset.shapes:
        for ranks in preset.ranks:
            if ranks < 1 or shape.vocab % ranks:
                parser.error(f"--tp {ranks}: the vocabulary of {shape.vocab} ids does not divide")
    ours = [name for name, method in all_methods().items() if method.ours]
    for pattern in preset.cases:
        if not fnmatch.filter(ours, pattern):
            parser.error(f"--cases {pattern}: expected some of {', '.join(ours)}")
    return options


def _preset(options: argparse.Namespace) -> Preset:
    """The preset with what the command line overrides."""
    preset = PRESETS[options.preset or "one"]
    sizes = {
        name: getattr(options, name)
        for name in ("tokens", "hidden", "vocab", "chunk")
        if getattr(options, name) is not None
    }
    shapes = tuple(dict.fromkeys(replace(shape, **sizes) for shape in preset.shapes))
    given: dict[str, Any] = {
        "ranks": tuple(options.tp) if options.tp else None,
        "pairs": options.pairs,
        "cases": tuple(options.cases) if options.cases else None,
        "alternatives": options.alternatives,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(preset, shapes=shapes, **changes)


def _names(preset: Preset) -> tuple[str, ...]:
    return tuple(
        name
        for name, method in all_methods().items()
        if (
            any(fnmatch.fnmatchcase(name, pattern) for pattern in preset.cases)
            if method.ours
            else preset.alternatives
        )
    )


def _prepare_truths(job: Job) -> None:
    assert job.truths is not None
    truths, inputs = Truths(job.truths), Inputs.make(job.shape, job.dtype)
    wanted = [all_methods()[name].objective for name in job.methods if name not in job.skipped]
    with TALK.status("dense fp64 gradients"):
        for objective in wanted:
            truths.prepare(inputs, objective)


def run(job: Job, folder: Path) -> list[Record]:
    """The records of a job: in this process for one rank, in processes of their own for several."""
    if job.ranks == 1:
        with _progress(job) as advance:
            return measure(job, 0, None, advance)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        torch.multiprocessing.spawn(_child, (job, own), nprocs=job.ranks)
        return json.loads(Path(own, "records.json").read_text())


def _child(rank: int, job: Job, own: str) -> None:
    store = str(Path(own, "store"))
    if rank:
        rank_main(rank, job, store, lambda: None)
        return
    with _progress(job) as advance:
        records = rank_main(rank, job, store, advance)
    Path(own, "records.json").write_text(json.dumps(records))


@contextmanager
def _progress(job: Job) -> Iterator[Any]:
    shape = job.shape
    name = f"TP {job.ranks}, T={shape.tokens} H={shape.hidden} V={shape.vocab}"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=TALK) as progress:
        total = total_steps(job)
        task = progress.add_task(name, total=total)
        yield lambda: progress.advance(task)
        progress.update(task, completed=total)  # a method that failed has no pairs


def _print(records: list[Record]) -> None:
    one = records[0]
    title = f"T={one['tokens']} H={one['hidden']} V={one['vocab']} TP {one['ranks']}"
    table = Table(*report.HEADER, title=title)
    for record in records:
        if record["skipped"] is None:
            table.add_row(*report.row(record))
    Console(width=None if sys.stdout.isatty() else 220).print(table)


__all__ = ["PRESETS", "main"]
