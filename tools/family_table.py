"""Every model family against transformers: logits, gradients and round trips, under every layout.

    python tools/family_table.py --out docs/families
    python tools/family_table.py --convert DIRECTORY --out docs/families

Makes a tiny random model of each family and feature (tests/dist/families.py) and measures it on
real ranks over gloo. With --convert: the peak resident memory of `megaopd convert`, both ways, of a
checkpoint, beside that of a model that weighs nothing. Both fill in their part of OUT.json and of
the page OUT.md, between its marks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # read when torch is imported
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.bench.pages import fill  # noqa: E402

# Runs in a child of its own: the peaks of its own children are then those of one conversion. What
# is mapped from files can be taken back at any time; the rest is looked at every 10 ms.
PEAK = """
import pathlib, psutil, re, resource, subprocess, sys, time
process, anonymous = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL), 0
while process.poll() is None:
    for child in psutil.Process().children(recursive=True):
        try:
            status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            continue
        found = re.search(r"RssAnon:\\s+(\\d+)", status)
        anonymous = max(anonymous, int(found[1]) if found else 0)
    time.sleep(0.01)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, anonymous)
sys.exit(process.returncode)
"""


def families(only: list[str]) -> list[dict[str, Any]]:
    """One row per family and layout; the worst rank's numbers."""
    from tests.dist.families import CASES, LAYOUTS, measure
    from tests.dist.pool import Ranks

    names = [name for name in CASES if not only or any(word in name for word in only)]
    rows, ranks = [], Ranks()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: CASES[name].save(Path(folder), name) for name in names}
        for layout in LAYOUTS:
            fit = [name for name in names if CASES[name].expert or layout.expert == 1]
            start = time.monotonic()
            each = ranks.run(measure, layout.world, [paths[n] for n in fit], layout, timeout=600)
            print(f"{layout}: {len(fit)} models in {time.monotonic() - start:.0f} s", flush=True)
            for name, *measured in zip(fit, *each, strict=True):
                row: dict[str, Any] = {"family": name, "layout": str(layout), **asdict(layout)}
                for what in ("logits", "gradient", "grad_norm"):
                    row[what] = max(getattr(one, what) for one in measured)
                row["exact"] = not any(one.changed or one.to_rank_0 for one in measured)
                rows.append(row)
    ranks.close()
    return rows


def family_page(rows: list[dict[str, Any]]) -> str:
    """A model a row, a layout a column: logits / gradient."""
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = f"{row['logits']:.1e} / {row['gradient']:.1e}".replace("e-0", "e-")
        cells.setdefault(row["family"], {})[row["layout"]] = cell + " CHANGED" * (not row["exact"])
    lines = ["| | " + " | ".join(layouts) + " |", "|" + "---|" * (len(layouts) + 1)]
    for family, found in cells.items():
        lines.append(f"| {family} | " + " | ".join(found.get(x, "") for x in layouts) + " |")
    exact = sum(row["exact"] for row in rows)
    worst = max(row["grad_norm"] for row in rows)
    lines += ["", f"Gradient norm: off by at most {worst:.1e}. Bit-exact: {exact} of {len(rows)}."]
    return "\n".join(lines)


def conversions(checkpoint: Path) -> list[dict[str, Any]]:
    """Peak resident memory of each conversion, of one rank, without what an empty one takes."""
    from tests.dist.families import CASES

    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        empty = CASES["llama"].save(Path(folder), "empty")
        for layout in ((1, 1), (1, 2)):
            base = _both_ways(Path(empty), Path(folder, f"base-{layout[1]}"), layout)
            found = _both_ways(checkpoint, Path(folder, f"real-{layout[1]}"), layout)
            for direction, (peak, anonymous, seconds) in found.items():
                rows.append(
                    {
                        "direction": direction,
                        "tensor": layout[0],
                        "pipeline": layout[1],
                        "model_mb": size / 1e6,
                        "peak_mb": peak,
                        "anonymous_mb": anonymous,
                        "above_empty_mb": anonymous - base[direction][1],
                        "seconds": seconds,
                    }
                )
    return rows


def _both_ways(
    hf: Path, work: Path, layout: tuple[int, int]
) -> dict[str, tuple[float, float, float]]:
    """direction -> (peak MB of the largest process, without files, seconds)."""
    found = {}
    there, back = work / "megatron", work / "hf"
    for direction, options in (
        ("hf-to-megatron", ["--hf", hf, "--out", there]),
        ("megatron-to-hf", ["--megatron", there, "--out", back]),
    ):
        command = [sys.executable, "-m", "megaopd", "convert", direction, *map(str, options)]
        command += ["--tp", str(layout[0]), "--pp", str(layout[1])]
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *command], capture_output=True, text=True, cwd=ROOT
        )
        if done.returncode:
            sys.exit(done.stderr)
        peak, anonymous = (float(kib) * 1024 / 1e6 for kib in done.stdout.split())
        found[direction] = peak, anonymous, time.monotonic() - start
    return found


def conversion_page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| direction | layout | model MB | peak MB | without files | above empty | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        layout = f"TP{row['tensor']} PP{row['pipeline']}"
        share = row["above_empty_mb"] / row["model_mb"]
        lines.append(
            f"| {row['direction']} | {layout} | {row['model_mb']:.0f} | {row['peak_mb']:.0f} "
            f"| {row['anonymous_mb']:.0f} | {row['above_empty_mb']:.0f} ({share:.2f} x the model) "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def write(out: Path, part: str, rows: list[dict[str, Any]], page: str) -> None:
    """Put rows into OUT.json and the table into its place in OUT.md, where there is one."""
    data = out.with_suffix(".json")
    known = json.loads(data.read_text()) if data.exists() else {}
    data.write_text(json.dumps({**known, part: rows}, indent=1) + "\n")
    if out.with_suffix(".md").exists():
        fill(out.with_suffix(".md"), part, page)
    print(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("families"))
    parser.add_argument("--only", nargs="*", default=[], help="words of the families' names")
    parser.add_argument("--convert", type=Path, help="a checkpoint, to measure conversions only")
    arguments = parser.parse_args()
    if arguments.convert:
        rows = conversions(arguments.convert)
        write(arguments.out, "conversion", rows, conversion_page(rows))
        return
    rows = families(arguments.only)
    write(arguments.out, "families", rows, family_page(rows))


if __name__ == "__main__":
    main()
