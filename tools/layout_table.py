"""The same training run under every layout, against one rank: docs/layouts.json and the table.

    python tools/layout_table.py --out docs/layouts             # CPU ranks over gloo, fp32
    python tools/layout_table.py --cuda --dtype bfloat16 --out /tmp/layouts   # torchrun, NCCL

A small student and a teacher of another width and depth, clipping active, micro-batches of unequal
token counts (tests/dist/layouts.py); a mixture of experts, fine-tuned without a teacher, under
expert parallel layouts. On the CPU the ranks are kept from one layout to the next.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.dist import layouts  # noqa: E402
from tests.dist.families import CASES  # noqa: E402
from tests.dist.layouts import EXPERT_LAYOUTS, LAYOUTS, SINGLE, Layout  # noqa: E402
from tests.dist.pool import Ranks  # noqa: E402
from tools.bench.pages import fill  # noqa: E402

SHOWN = ("loss", "grad_norm", "first_grad_norm")


def on_cpu(ranks: Any, paths: tuple[str, str], values: dict[str, Any]) -> Any:
    """run(layout) on ranks of a pool: what its rank 0 found."""

    def run(layout: Layout) -> Any:
        found = ranks.run(layouts.trajectory, layout.world, paths, layout, timeout=600, **values)
        assert all(other[0] == found[0][0] for other in found), "ranks report different metrics"
        return found[0]

    return run


def on_gpus(paths: tuple[str, str], values: dict[str, Any]) -> Any:
    """run(layout) by torchrun on this machine's GPUs: what its rank 0 found."""

    def run(layout: Layout) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder, "answer.json")
            job = json.dumps([paths, list(layout), values, str(answer)])
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={layout.world}", __file__, "--job", job]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
            return json.loads(answer.read_text())

    return run


def run_job(job: str) -> None:
    """One layout on the ranks that torchrun started."""
    paths, layout, values, answer = json.loads(job)
    from megaopd.parallel import init_distributed

    init_distributed()
    found = layouts.trajectory(paths, Layout(*layout), **values)
    if int(os.environ["RANK"]) == 0:
        Path(answer).write_text(json.dumps(found))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a layout: largest relative differences of loss and gradient norm over the steps, and
    that of the first step's norm, before Adam has amplified any rounding."""
    values = {"steps": arguments.steps, "dtype": arguments.dtype, "lr": arguments.lr}
    rows, ranks = [], Ranks(4)  # which start when they are needed
    with tempfile.TemporaryDirectory() as folder:
        dense = layouts.checkpoints(Path(folder), tied=True)
        experts = (CASES["qwen3_moe"].save(Path(folder), "experts"), "")
        for group, paths, more in (
            (LAYOUTS, dense, {}),
            (EXPERT_LAYOUTS, experts, {"loss": "sft"}),
        ):
            wanted = [name for name in group if name in (arguments.only or group)]
            if not wanted:
                continue
            job = (paths, {**values, **more})
            run = on_gpus(*job) if arguments.cuda else on_cpu(ranks, *job)
            single = run(SINGLE)
            for name in wanted:
                rows.append(_row(name, group[name], run, single, arguments.cuda))
                print(_line(rows[-1]), flush=True)
    return rows


def _row(name: str, layout: Layout, run: Any, single: Any, cuda: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"layout": name, **layout._asdict()}
    if cuda and layout.world > _gpus():
        return row | {"skipped": f"needs {layout.world} GPUs"}
    found = run(layout)
    loss, norm, weights = layouts.differences(single, found)
    first = abs(found[0][0][1] / single[0][0][1] - 1)
    return row | {"loss": loss, "grad_norm": norm, "first_grad_norm": first, "weights": weights}


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _line(row: dict[str, Any]) -> str:
    sizes = [f"{key} {row[key]}" for key in ("tensor", "context", "pipeline", "virtual", "expert")]
    split = [size for size in sizes if not size.endswith(" 1")]
    per_copy = row["tensor"] * row["context"] * row["pipeline"]
    if row["world"] > per_copy:
        split.append(f"data {row['world'] // per_copy}")
    flags = ["sequence parallel"] * row["sequence"] + ["ZeRO-1"] * row["distributed"]
    flags += [f"packed in {row['tokens']}"] * bool(row["tokens"])
    flags += ["one sample a micro-batch"] * (row["samples"] == 1)
    cells = [f"`{row['layout']}`", ", ".join([*split, *flags]), str(row["world"])]
    cells += [f"{row[key]:.1e}" if key in row else row["skipped"] for key in SHOWN]
    return "| " + " | ".join(cells) + " |"


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """OUT.json, and the table in OUT.md between its two marks (which a new page gets)."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    facts = {"steps": arguments.steps, "lr": arguments.lr, "dtype": arguments.dtype, **versions}
    facts["ranks"] = "NCCL" if arguments.cuda else "CPU, gloo"
    out = Path(arguments.out)
    Path(f"{out}.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    page = Path(f"{out}.md")
    if not page.is_file():
        page.write_text("# Layouts\n\n<!-- table -->\n<!-- end of table -->\n")
    table = ["| layout | split | ranks | loss | gradient norm | at the first step |"]
    table.append("|---|---|---|---|---|---|")
    table += [_line(row) for row in rows]
    caption = ", ".join(f"{key} {value}" for key, value in facts.items())
    fill(page, "table", "\n".join([*table, "", f"{caption}."]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=5e-4, help="the larger, the more of rounding")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cuda", action="store_true", help="on this machine's GPUs, by torchrun")
    parser.add_argument(
        "--only", nargs="*", choices=[*LAYOUTS, *EXPERT_LAYOUTS], help="these layouts"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/layouts")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        run_job(arguments.job)
    else:
        write(measure(arguments), arguments)


if __name__ == "__main__":
    main()
