"""One measurement: one shape on one number of ranks, all methods in turn. Runs on every rank."""

import os
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .alternatives import alternatives
from .cases import Forward, Inputs, Method, Products, Shape, our_methods
from .measure import (
    Collectives,
    LiveBytes,
    Pairs,
    bootstrap_median,
    storage_bytes,
    time_pairs,
    visited,
)
from .references import Truths

Record = dict[str, Any]

CHUNKED, UNCHUNKED = "bare products, same chunks", "bare products, all tokens"
SUMMED = "bare products, hidden gradient summed"  # in the same chunks; with several ranks
PROBE = Shape(tokens=8, hidden=16, vocab=256, chunk=4)


@dataclass(frozen=True)
class Job:
    """What to measure. `methods` are names; `truths` a folder, or None to skip gradient errors."""

    shape: Shape
    dtype: torch.dtype
    ranks: int
    pairs: int
    methods: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)  # name -> reason, found by probe()
    truths: Path | None = None
    max_gib: float = 8.0
    other_pairs: int | None = None  # of methods that are not ours; None: as many

    def pairs_of(self, method: str) -> int:
        """Timed pairs of a method, or of one of the products' rows."""
        ours = method not in self.methods or all_methods()[method].ours
        return self.pairs if ours or self.other_pairs is None else min(self.pairs, self.other_pairs)


def all_methods() -> dict[str, Method]:
    """Ours first, then the others, by name."""
    return {method.name: method for method in [*our_methods(), *alternatives()]}


def probe(method: Method, dtype: torch.dtype) -> str | None:
    """Why the method cannot run here, found on a tiny input; None where it can."""
    expected = (TypeError, ValueError) if method.ours else Exception  # a library may raise anything
    inputs = Inputs.make(PROBE, dtype)
    try:
        method.build(inputs)().loss.backward()
    except expected as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def unfit(method: Method, job: Job) -> str | None:
    """Why the method is left out of this job although it runs."""
    if method.name in job.skipped:
        return job.skipped[method.name]
    if job.ranks > 1 and not method.tensor_parallel:
        return "knows no vocabulary split over ranks"
    needs = method.logits_copies * job.shape.logits_bytes(1) / 2**30
    if needs > job.max_gib:
        return f"logits of all tokens, about {needs:.0f} GiB on all ranks (limit {job.max_gib:g})"
    return None


def measure(job: Job, rank: int, group: Any, advance: Callable[[], None]) -> list[Record]:
    """All records of the job, complete on rank 0. advance() is called total_steps(job) times.

    A method that fails on every rank is left out; one that fails on some stops the run at the next
    collective, which then times out.
    """
    torch._dynamo.reset()  # code compiled for another shape would be reused as a general one
    inputs = Inputs.make(job.shape, job.dtype, rank, job.ranks)
    inputs.group = group
    bare = (CHUNKED, *_others(job)) if job.pairs else ()
    records = {name: _record(job, name) for name in bare}
    forwards: dict[str, Forward] = {}
    for name in job.methods:
        method = all_methods()[name]
        records[name] = _record(job, name, method)
        records[name]["skipped"] = unfit(method, job)
        if records[name]["skipped"] is not None:
            continue
        try:
            forward = method.build(inputs)
            records[name] |= _first_run(method, forward, inputs, job)
            records[name] |= _memory(forward, inputs)
            forwards[name] = forward
        except Exception as error:  # recorded: one method's fault must not cost the others
            records[name]["skipped"] = _reason(error)
        advance()
    if job.pairs:
        _time(job, inputs, forwards, records, advance)
    return _merge_ranks(list(records.values()), group)


def total_steps(job: Job) -> int:
    """How often measure() calls advance()."""
    runnable = [n for n in job.methods if unfit(all_methods()[n], job) is None]
    others = len(_others(job)) - (not _unchunked_fits(job))
    return len(runnable) + job.pairs * others + sum(job.pairs_of(name) for name in runnable)


def _others(job: Job) -> tuple[str, ...]:
    """The products' rows beside the yardstick's own."""
    return (UNCHUNKED, SUMMED) if job.ranks > 1 else (UNCHUNKED,)


def _unchunked_fits(job: Job) -> bool:
    return 2 * job.shape.logits_bytes(1) / 2**30 <= job.max_gib


def _record(job: Job, name: str, method: Method | None = None) -> Record:
    return {
        "method": name,
        "ours": bool(method and method.ours),
        "note": method.note if method else "",
        "objective": dict(method.objective) if method else {},
        "ranks": job.ranks,
        "cores": os.cpu_count(),
        **asdict(job.shape),
        "dtype": str(job.dtype).removeprefix("torch."),
        "chunks": len(job.shape.chunks()),
        "skipped": None,
    }


def _first_run(method: Method, forward: Forward, inputs: Inputs, job: Job) -> Record:
    """Warm-up, traffic and gradient error in one."""
    inputs.clear_gradients()
    with Collectives() as traffic:
        loss = forward().loss
        loss.backward()
    chunk, rest = job.shape.chunk, job.shape.tokens % job.shape.chunk
    scalars, states = traffic.split(job.shape.hidden, max(1, (rest or chunk) // job.ranks))
    record = {
        "scalar_calls": len(scalars),
        "scalar_bytes": sum(call.nbytes for call in scalars),
        "hidden_calls": len(states),
        "hidden_bytes": sum(call.nbytes for call in states),
    }
    truth = None
    if job.truths is not None:
        truth = Truths(job.truths).load(inputs, method.objective)
    if truth is not None:
        value = loss.detach().double()
        if method.partial_loss and job.ranks > 1:
            dist.all_reduce(value)
        record["loss_error"] = ((value - truth.loss).abs() / truth.loss.abs()).item()
        record["hidden_error"] = _relative_error(inputs.hidden.grad, truth.hidden)
        found = inputs.weight.main_grad if method.main_grad else inputs.weight.grad
        record["weight_error"] = _relative_error(found, truth.weight, job.ranks > 1)
    return record


def _relative_error(found: Tensor | None, truth: Tensor, sharded: bool = False) -> float:
    """|found - truth| / |truth| in the 2-norm; over all shards where the tensor is sharded."""
    if found is None:
        return float("inf")
    squares = torch.stack([(found.double() - truth).square().sum(), truth.square().sum()])
    if sharded:
        dist.all_reduce(squares)
    return (squares[0] / squares[1]).sqrt().item()


def _memory(forward: Forward, inputs: Inputs) -> Record:
    inputs.clear_gradients()
    with LiveBytes() as live:
        outcome = forward()
        live.mark("forward")
        outcome.loss.backward()
    results = [inputs.hidden.grad, inputs.weight.grad, outcome.loss, *outcome.extras]
    return {
        "peak_bytes": live.peak,
        "held_bytes": live.at["forward"],
        "output_bytes": storage_bytes(results),
    }


def _time(
    job: Job,
    inputs: Inputs,
    forwards: dict[str, Forward],
    records: dict[str, Record],
    advance: Callable[[], None],
) -> None:
    """Adds the samples to the records; the products' own rows get theirs from buffers made here."""

    def step(forward: Forward) -> Callable[[], None]:
        return lambda: forward().loss.backward()

    def before() -> None:
        inputs.clear_gradients()
        if job.ranks > 1:
            dist.barrier()

    chunked = Products(inputs, chunked=True)
    steps: dict[str, Callable[[], None]] = {name: step(f) for name, f in forwards.items()}
    records[CHUNKED] |= chunked.memory()
    if _unchunked_fits(job):
        unchunked = Products(inputs, chunked=False)
        records[UNCHUNKED] |= unchunked.memory()
        steps[UNCHUNKED] = unchunked
        unchunked()
    else:
        records[UNCHUNKED]["skipped"] = f"logits of all tokens, limit {job.max_gib:g} GiB"
    if job.ranks > 1:
        summed = Products(inputs, chunked=True, summed=True)
        records[SUMMED] |= summed.memory()
        steps[SUMMED] = summed
        summed()
    chunked()
    for name, pairs in time_pairs(
        steps,
        chunked,
        job.pairs,
        fewer={name: job.pairs_of(name) for name in steps},
        before=before,
        advance=advance,
    ).items():
        records[name]["samples"] = asdict(pairs)


def _merge_ranks(records: list[Record], group: Any) -> list[Record]:
    """Rank 0: of each pair's times and of each number of bytes, the largest over the ranks."""
    if group is None:
        return records
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, records, group=group)
    for i, merged in enumerate(records):
        others = [part[i] for part in gathered]
        for key in ("peak_bytes", "held_bytes", "output_bytes", "hidden_error"):
            if key in merged:
                merged[key] = max(other[key] for other in others)
        for name in merged.get("samples", {}):
            columns = zip(*(other["samples"][name] for other in others), strict=True)
            merged["samples"][name] = [max(column) for column in columns]
    return records


def summarise(records: list[Record]) -> None:
    """Adds ratios with intervals to the records of one job, from their samples.

    ratio: to the products in the same chunks, pair by pair. ratio_unchunked and ratio_summed: that,
    divided by the same round's ratio of the other products to the chunked ones, so that both
    factors come from neighbours in time.
    """
    by_name = {record["method"]: record for record in records}
    others = {
        key: Pairs(**by_name[name]["samples"]).ratios()
        for key, name in (("ratio_unchunked", UNCHUNKED), ("ratio_summed", SUMMED))
        if "samples" in by_name.get(name, {})
    }
    for record in records:
        if "samples" not in record:
            continue
        pairs = Pairs(**record["samples"])
        ratios = pairs.ratios()
        record["pairs"] = len(ratios)
        record["seconds"] = statistics.median(pairs.step)
        record["products_seconds"] = statistics.median(pairs.yardstick)
        record["ratio"] = asdict(bootstrap_median(ratios))
        for key, other in others.items():
            same_rounds = [other[i] for i in visited(len(ratios), len(other))]
            double = [a / b for a, b in zip(ratios, same_rounds, strict=True)]
            record[key] = asdict(bootstrap_median(double))


def rank_main(rank: int, job: Job, store: str, advance: Callable[[], None]) -> list[Record]:
    """A process of a job with several ranks: joins the others, pins itself to a core, measures."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's, of collectives' names
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= job.ranks:
        os.sched_setaffinity(0, {cores[rank]})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=job.ranks)
    records = measure(job, rank, dist.group.WORLD, advance)
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()
    return records
