"""Cost of a weight sync: method x bytes x time x memory, on real ranks and a real SGLang server.

    python tools/bench_sync.py --model DIR --layouts 1x2 3x1

Starts one CPU server with SGLang, and the ranks of each layout (tensor x pipeline) in turn, which
load the model, change it a little before every sync, and push it by each method. Every sync is
verified by checksum: all bits of all parameters. Writes a page and its numbers (--out).
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # read when torch is imported
# Read when the ranks and the server begin: what they free goes back to the system at once, so that
# growth is what is in use.
os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "1000000"

METHODS = ("tensor", "broadcast", "disk")
PACKAGES = ("torch", "sglang", "megatron-core", "transformers")
HEADER = (
    "method",
    "bucket MB",
    "MB",
    "gather s",
    "paused s",
    "total s",
    "MB/s",
    "rank 0 peak MB",
    "other ranks' peak MB",
    "server peak MB",
)
LEGEND = """\
- Layout: tensor x pipeline ranks of the student. One thread a rank, gloo.
- MB: what one server gets (10^6 bytes). gather: rank 0 waits for tensors of the training ranks;
  paused: the server generates nothing; total: the whole push, verified by checksum. Medians.
- Peaks: the largest growth of resident memory during a sync, beyond what the process held before it
  (model and all); what is freed goes back to the system at once. The server's is of all its
  processes together. Other ranks: the worst of them.
- all ranks, rank 0 only: the stream alone, in the form where every rank gets every tensor (as for
  the embedded engine and export), and in that of the sync.
- Before every sync all weights are changed, so that nothing passes for having arrived.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when every layout was measured and written."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _options(argv)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from megaopd.rollout.config import ServerConfig
    from megaopd.rollout.loop import LoopThread
    from megaopd.rollout.server import Fleet

    records: list[dict[str, Any]] = []
    load = os.getloadavg()[0]  # what else the machine does
    loop = LoopThread()
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as folder:
        config = ServerConfig(port=options.port, dtype="float32")
        fleet = Fleet(
            config, options.model, device="cpu", dtype="float32", log_dir=Path(folder, "servers")
        )
        try:
            loop.run(fleet.start())
            server = fleet.servers[0]
            assert server.process is not None
            for layout in options.layouts:
                job = _job(options, layout, server.url, server.process.group, folder)
                records += _measure(job, Path(folder, f"store-{layout}"))
                _write(options, records, argv, load)
        finally:
            loop.run(fleet.stop())
            loop.close()
    print((options.out.with_suffix(".md")).read_text())
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face checkpoint")
    add("--layouts", nargs="+", default=["1x1"], metavar="TPxPP")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--bucket-mb", nargs="+", type=int, default=[64])
    add("--repeats", type=int, default=3)
    add("--port", type=int, default=0, help="of the server; 0: any free one")
    add("--name", default="", help="of the model, for the page; default: its directory's")
    add("--out", type=Path, default=Path("docs/bench_sync"), help="without ending")
    return parser.parse_args(argv)


def _job(
    options: argparse.Namespace, layout: str, url: str, group: int, folder: str
) -> dict[str, Any]:
    tensor, pipeline = (int(part) for part in layout.split("x"))
    return {
        "model": str(options.model),
        "tensor": tensor,
        "pipeline": pipeline,
        "methods": options.methods,
        "buckets": options.bucket_mb,
        "repeats": options.repeats,
        "url": url,
        "group": group,
        "folder": folder,
    }


def _measure(job: dict[str, Any], store: Path) -> list[dict[str, Any]]:
    """The records of one layout, from ranks in processes of their own."""
    import torch.multiprocessing

    out = store.with_suffix(".json")
    torch.multiprocessing.spawn(
        _rank, (job, str(store), str(out)), nprocs=job["tensor"] * job["pipeline"]
    )
    return json.loads(out.read_text())


def _rank(rank: int, job: dict[str, Any], store: str, out: str) -> None:
    """One rank: every method in turn; rank 0 writes the records."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    world = job["tensor"] * job["pipeline"]
    os.environ["WORLD_SIZE"] = str(world)
    from megaopd import platform

    platform.install()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    student = Student(job)
    records = [_streamed(student, only_rank_0) for only_rank_0 in (False, True)]
    for method in job["methods"]:
        # By disk the bucket is the size of a file, and changes nothing else.
        for bucket in job["buckets"][: 1 if method == "disk" else None]:
            records.append(_pushed(student, job, method, bucket))
    if rank == 0:
        layout = f"{job['tensor']}x{job['pipeline']}"
        Path(out).write_text(json.dumps([{"layout": layout, **record} for record in records]))
    dist.barrier()
    dist.destroy_process_group()


class Student:
    """This rank's part of the model."""

    def __init__(self, job: dict[str, Any]) -> None:
        from megaopd.models.arch import architecture, read_hf_config
        from megaopd.models.build import build_model
        from megaopd.models.config import ModelConfig
        from megaopd.models.weights import load_hf_weights
        from megaopd.parallel import ParallelConfig, make_grid

        self.grid = make_grid(ParallelConfig(job["tensor"], job["pipeline"]))
        self.arch = architecture(read_hf_config(job["model"]))
        self.model = build_model(self.arch, ModelConfig(path=job["model"]), self.grid)
        load_hf_weights(self.model, job["model"], self.arch, self.grid)

    def change(self) -> None:
        """Other weights, of the same kind."""
        import torch

        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.0 + 2.0**-10)

    def stream(self, only_rank_0: bool = True) -> Any:
        from megaopd.models.weights import WeightStream

        return WeightStream(self.model, self.arch, self.grid, only_rank_0=only_rank_0)


class Peak:
    """The growth of this process's resident memory inside the block, and that of a process group's
    others where given, in bytes.
    """

    def __init__(self, group: int = 0) -> None:
        self.group, self.own, self.others = group, 0, 0

    def __enter__(self) -> "Peak":
        self._pids = [os.getpid(), *(_members(self.group) if self.group else [])]
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # forget the peak so far
        self._before = [_status(pid, "VmRSS") for pid in self._pids]
        return self

    def __exit__(self, *_: object) -> None:
        grown = [
            _status(pid, "VmHWM") - before
            for pid, before in zip(self._pids, self._before, strict=True)
        ]
        self.own, self.others = grown[0], sum(grown[1:])


def _members(group: int) -> list[int]:
    """The processes of a process group."""
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if _group_of(p) == group]


def _group_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[2])
    except OSError:  # it has ended
        return -1


def _status(pid: int, key: str) -> int:
    """Bytes, of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _streamed(student: Student, only_rank_0: bool) -> dict[str, Any]:
    """The stream alone."""
    from time import monotonic

    import torch.distributed as dist

    sizes = []

    def run() -> dict[str, float]:
        student.change()
        weights = student.stream(only_rank_0)
        dist.barrier()
        started = monotonic()
        sizes.append(sum(tensor.nbytes for _, tensor in weights))
        return {"total": monotonic() - started}

    found = _repeated(run, 3, 0)
    name = "stream: rank 0 only" if only_rank_0 else "stream: all ranks"
    return {"method": name, "bucket_mb": None, "bytes": max(sizes), **found}


def _pushed(student: Student, job: dict[str, Any], method: Any, bucket: int) -> dict[str, Any]:
    """One method: the median of its repeats."""
    import torch.distributed as dist

    pushes = Pushes(job, method, bucket) if dist.get_rank() == 0 else None
    reports: list[Any] = []

    def run() -> dict[str, float]:
        student.change()
        weights = student.stream()
        if pushes is None:
            for _ in weights:
                pass
            return {}
        reports.append(pushes.push(weights, len(reports)))
        return reports[-1].seconds

    run()  # a process group is made, and buffers grow
    found = _repeated(run, job["repeats"], job["group"])
    if pushes is not None:
        pushes.close()
    nbytes = reports[-1].bytes if reports else 0
    return {"method": method, "bucket_mb": bucket, "bytes": nbytes, **found}


class Pushes:
    """Rank 0's side of a sync, with the server that the parent has started."""

    def __init__(self, job: dict[str, Any], method: Any, bucket: int) -> None:
        from megaopd.rollout.config import ServerConfig
        from megaopd.rollout.loop import LoopThread
        from megaopd.rollout.server import Fleet
        from megaopd.rollout.sync import WeightSync

        config = ServerConfig(
            addresses=(job["url"],), sync=method, bucket_mb=bucket, verify="checksum"
        )
        self.loop, folder = LoopThread(), Path(job["folder"])
        self.fleet = Fleet(
            config, Path(job["model"]), device="cpu", dtype="float32", log_dir=folder
        )
        self.loop.run(self.fleet.start())
        self.sync = WeightSync(
            config,
            model_dir=Path(job["model"]),
            work_dir=folder / "weights",
            nonce=f"bench-{method}-{bucket}",
            run=self.loop.run,
            device="cpu",
            dtype="float32",
        )

    def push(self, weights: Any, version: int) -> Any:
        report = self.sync.push(self.fleet.servers, weights, version)
        if report.failed:
            raise RuntimeError(str(report.failed))
        return report

    def close(self) -> None:
        self.sync.close()
        self.loop.run(self.fleet.stop())
        self.loop.close()


def _repeated(run: Callable[[], dict[str, float]], repeats: int, group: int) -> dict[str, Any]:
    """Median seconds by phase, and the largest peaks over the repeats and ranks; a collective."""
    import torch.distributed as dist

    seconds, peaks, server = [], [], 0
    for _ in range(repeats):
        dist.barrier()
        with Peak(group if dist.get_rank() == 0 else 0) as peak:
            seconds.append(run())
            dist.barrier()  # a rank that is done early must still be seen at its peak
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, peak.own)
        peaks.append(everyone)
        server = max(server, peak.others)
    phases = {phase: statistics.median(s[phase] for s in seconds) for phase in seconds[0]}
    return {
        "seconds": phases,
        "rank_peaks": [max(of_rank) for of_rank in zip(*peaks, strict=True)],
        "server_peak": server,
    }


def _write(
    options: argparse.Namespace, records: list[dict[str, Any]], argv: Sequence[str], load: float
) -> None:
    """The page and its numbers."""
    out: Path = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "model": options.name or options.model.name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "repeats": options.repeats,
        "load_before": load,
    }
    document = {"about": about, "records": records}
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    words = list(argv)
    for flag, instead in (("--model", "DIR"), ("--out", ""), ("--port", "")):
        if flag in words:
            at = words.index(flag)
            words[at : at + 2] = [flag, instead] if instead else []
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Weight sync, measured",
        "",
        f"    {shlex.join(['python', 'tools/bench_sync.py', *words])}",
        "",
        f"{about['model']} in float32. {about['date']}, {about['cores']} cores for the ranks and "
        f"the server together (load of others before: {load:.1f}), {versions}, "
        f"{about['repeats']} syncs each.",
        "",
        LEGEND,
    ]
    for layout in dict.fromkeys(record["layout"] for record in records):
        tensor, pipeline = layout.split("x")
        lines += [f"## TP {tensor} x PP {pipeline}", "", f"| {' | '.join(HEADER)} |"]
        lines.append("|" + "---|" * len(HEADER))
        lines += [f"| {' | '.join(_row(r))} |" for r in records if r["layout"] == layout]
        lines.append("")
    out.with_suffix(".md").write_text("\n".join(lines))


def _row(record: dict[str, Any]) -> list[str]:
    """The cells under HEADER; "-" where there is nothing to say."""
    seconds, size = record["seconds"], record["bytes"] / 1e6
    pushed = record["bucket_mb"] is not None
    first, *others = (peak / 1e6 for peak in record["rank_peaks"])
    buckets = pushed and record["method"] != "disk"
    return [
        record["method"],
        str(record["bucket_mb"]) if buckets else "-",
        f"{size:.1f}",
        f"{seconds['gather' if pushed else 'total']:.2f}",
        f"{seconds['paused']:.2f}" if pushed else "-",
        f"{seconds['total']:.2f}",
        f"{size / seconds['total']:.0f}",
        f"{first:.0f}",
        f"{max(others):.0f}" if others else "-",
        f"{record['server_peak'] / 1e6:.0f}" if pushed else "-",
    ]


if __name__ == "__main__":
    sys.exit(main())
