"""Sampling and training at once: the time of a step beside that of its two halves alone.

    python tools/bench_overlap.py --out docs/bench_overlap

One trainer rank on one core, one SGLang server on another, both in this run. In every round are
measured, in random order: the rollout of a batch with the trainer idle, the update with the server
idle, a strict step (sync, rollout, update), and steps with staleness 1. A simulation with the
measured times says what other ratios of rollout to update, and long responses, would give.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

STEPS = 4  # of staleness 1 in a row, after one that fills the buffer


@dataclass(frozen=True)
class Engine:
    """A decoding step of n running responses takes `base + each * n` seconds."""

    base: float
    each: float
    slots: int


@dataclass(frozen=True)
class Load:
    """What a step samples and trains."""

    lengths: tuple[int, ...]  # tokens of each response of one batch
    update: float  # seconds
    sync: float  # seconds


class Simulation:
    """Decoding steps of one engine, and a trainer that waits for its batches in order."""

    def __init__(self, engine: Engine, load: Load, seed: int = 0) -> None:
        self.engine, self.load, self.rng = engine, load, random.Random(seed)
        self.now = 0.0
        self.running: list[list[int]] = []  # [batch, tokens left], in the order of arrival
        self.left: dict[int, int] = {}  # batch -> responses that are not finished

    def step_seconds(self, staleness: int, steps: int) -> float:
        """Of a step once the buffer is full: batches s..s + staleness are under way at step s."""
        ended: list[float] = []
        for step in range(steps):
            self.now += self.load.sync
            for batch in range(len(self.left), step + staleness + 1):
                self._submit(batch)
            while self.left[step]:
                self._decode()
            end = self.now + self.load.update
            while self.running and self.now < end:
                self._decode()
            self.now = max(self.now, end)
            ended.append(self.now)
        skipped = min(2 + staleness, steps - 2)
        return (ended[-1] - ended[skipped]) / (steps - 1 - skipped)

    def _submit(self, batch: int) -> None:
        lengths = self.rng.sample(self.load.lengths, len(self.load.lengths))
        self.running += [[batch, length] for length in lengths]
        self.left[batch] = len(lengths)

    def _decode(self) -> None:
        active = self.running[: self.engine.slots]
        self.now += self.engine.base + self.engine.each * len(active)
        for request in active:
            request[1] -= 1
            self.left[request[0]] -= request[1] == 0
        self.running = [request for request in self.running if request[1] > 0]


def build(root: Path, arguments: argparse.Namespace) -> Any:
    """The parts of a run with staleness 1."""
    from megaopd.build import build_parts
    from megaopd.parallel import init_distributed
    from megaopd.quickstart import make_checkpoint
    from megaopd.schema import make_config

    for name in ("student", "teacher"):
        make_checkpoint(name, root / name, seed=1)
    init_distributed()
    return build_parts(
        make_config(
            {
                "run": {"dir": str(root / "run"), "steps": 100_000},
                "student": {"path": str(root / "student")},
                "teacher": {"path": str(root / "teacher")},
                "data": {"source": "task:addition3"},
                "rollout": {
                    "engine": "sglang",
                    "prompts_per_step": arguments.prompts,
                    "max_new_tokens": arguments.tokens,
                    "staleness": 1,
                },
                "server": {"cores": str(arguments.server_core), "max_tokens": 20000},
                "objective": {"loss": "rkl"},
                "optim": {"lr": 1e-5},
                "trainer": {"micro_batch_size": arguments.micro_batch},
                "checkpoint": {"every": 0},
            }
        )
    )


class Bench:
    """The measured pieces of a step; each returns seconds."""

    def __init__(self, parts: Any, arguments: argparse.Namespace) -> None:
        from megaopd.rollout.base import SamplingParams

        self.parts, self.step, self.key = parts, 0, -10
        self.params = SamplingParams.from_config(parts.config.rollout)
        self.count = arguments.prompts
        self.lengths: list[int] = []
        self.samples: list[Any] = []

    def rollout(self, count: int | None = None) -> float:
        prompts = self.parts.prompts.next_batch(count or self.count)
        self.key -= 1
        begun = time.perf_counter()
        samples = self.parts.sampler.generate(prompts, self.key, 1, self.params)
        seconds = time.perf_counter() - begun
        if count is None:
            self.samples = samples
            self.lengths += [len(s.response_ids) for s in samples]
        return seconds

    def update(self) -> float:
        begun = time.perf_counter()
        self.parts.update(self.samples)
        return time.perf_counter() - begun

    def sync(self) -> float:
        begun = time.perf_counter()
        self.parts.sampler.sync(self.parts.sampler.engine.weight_version, again=True)
        return time.perf_counter() - begun

    def strict(self) -> float:
        return self.sync() + self.rollout() + self.update()

    def overlapped(self) -> float:
        """Seconds a step of the loop as it runs with staleness 1."""
        parts, times = self.parts, []
        for _ in range(STEPS + 1):
            begun = time.perf_counter()
            parts.sampler.sync(self.step)
            parts.update(parts.sampler.sample(self.step))
            times.append(time.perf_counter() - begun)
            self.step += 1
        self.drain()
        return statistics.mean(times[1:])

    def drain(self) -> None:
        """Let the batch that is under way finish, so that what is measured next is alone."""
        batch = self.parts.sampler.buffer.batches[self.step]
        buffer = self.parts.sampler.buffer
        while batch.tickets:
            buffer._advance(batch)


def measure(bench: Bench, rounds: int) -> dict[str, list[float]]:
    from megaopd.report.progress import progress

    names = ("rollout", "update", "sync", "strict", "overlapped")
    bench.parts.sampler.sync(0)
    bench.rollout()
    bench.update()
    found: dict[str, list[float]] = {name: [] for name in names}
    rng = random.Random(0)
    with progress("rounds", rounds) as advance:
        for _ in range(rounds):
            for name in rng.sample(names, len(names)):
                found[name].append(getattr(bench, name)())
            advance(1)
    return found


def engine_of(bench: Bench, slots: int) -> Engine:
    """Fit the time of a decoding step to a small and a large batch."""
    few, many = 8, 64
    longest = bench.params.max_new_tokens
    at = {n: statistics.median(bench.rollout(n) for _ in range(3)) / longest for n in (few, many)}
    each = max((at[many] - at[few]) / (many - few), 0.0)
    return Engine(max(at[few] - each * few, 1e-4), each, slots)


def long_tail(mean: float, count: int, seed: int = 0) -> tuple[int, ...]:
    """Log-normal lengths (sigma 1) of the same mean."""
    rng = random.Random(seed)
    return tuple(max(1, round(mean * rng.lognormvariate(-0.5, 1.0))) for _ in range(count))


def simulations(bench: Bench, engine: Engine, medians: dict[str, float]) -> list[dict[str, Any]]:
    """Step over max(rollout, update), by ratio, staleness and shape of the lengths."""
    rows = []
    mean = statistics.mean(bench.lengths)
    shapes = {
        "measured": tuple(bench.lengths[: bench.count]),
        "long tail": long_tail(mean, bench.count),
    }
    for shape, lengths in shapes.items():
        alone = Simulation(engine, Load(lengths, 0.0, 0.0)).step_seconds(0, 30)
        for ratio in (0.25, 0.5, 1.0, 2.0, 4.0):
            load = Load(lengths, alone / ratio, medians["sync"])
            row: dict[str, Any] = {"lengths": shape, "rollout / update": ratio}
            for staleness in (0, 1, 2, 4):
                seconds = Simulation(engine, load).step_seconds(staleness, 60)
                row[f"staleness {staleness}"] = seconds / max(alone, load.update)
            rows.append(row)
    return rows


def report(result: dict[str, Any], command: str) -> str:
    """The markdown page."""
    lines = ["# Sampling and training at once, measured", "", f"    {command}", ""]
    lines += [f"{result['what']}", "", "| | seconds (median, 95% interval) |", "|---|---|"]
    for name, row in result["seconds"].items():
        lines.append(f"| {name} | {row['median']:.3f} [{row['low']:.3f}, {row['high']:.3f}] |")
    lines.append("")
    for name, value in result["ratios"].items():
        lines.append(f"- {name}: {value:.3f}")
    lines += ["", "## Other ratios, simulated", ""]
    lines.append(
        "Seconds of a step over max(rollout, update); a decoding step of n responses takes"
    )
    engine = result["engine"]
    lines.append(f"{engine['base']:.4f} + {engine['each']:.5f} n s, {engine['slots']} at once.")
    keys = list(result["simulated"][0])
    lines += ["", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in result["simulated"]:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=40, help="most tokens of a response")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trainer-core", type=int, default=0)
    parser.add_argument("--server-core", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench_overlap"))
    arguments = parser.parse_args()
    from bench.measure import bootstrap_median, pin

    with tempfile.TemporaryDirectory() as root, build(Path(root), arguments) as parts:
        pin(arguments.trainer_core)  # the server has its own core, and has been started
        bench = Bench(parts, arguments)
        found = measure(bench, arguments.rounds)
        engine = engine_of(bench, parts.config.server.concurrency)
        medians = {name: statistics.median(values) for name, values in found.items()}
        simulated = simulations(bench, engine, medians)
    larger = max(medians["rollout"], medians["update"])
    result = {
        "what": f"{arguments.prompts} responses of {statistics.mean(bench.lengths):.1f} tokens a "
        f"step (at most {arguments.tokens}), {arguments.rounds} rounds.",
        "seconds": {name: asdict(bootstrap_median(v)) for name, v in found.items()},
        "ratios": {
            "staleness 1 / max(rollout, update)": medians["overlapped"] / larger,
            "staleness 1 / max(rollout, update + sync)": medians["overlapped"]
            / max(medians["rollout"], medians["update"] + medians["sync"]),
            "strict / max(rollout, update)": medians["strict"] / larger,
        },
        "engine": asdict(engine),
        "simulated": simulated,
    }
    command = "python tools/bench_overlap.py " + " ".join(sys.argv[1:])
    page = report(result, command.strip())
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1))
    arguments.out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
