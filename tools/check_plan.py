"""megaopd/plan's memory against live tensor bytes of real updates on CPU ranks over gloo.

python tools/check_plan.py            every held-out case -> docs/planner.json
python tools/check_plan.py NAME...    some cases, printed only
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megaopd.parallel import ParallelConfig as P  # noqa: E402
from tools.bench.updates import Case, compare  # noqa: E402

# Looked at while the tables of plan/layer.py were read off the code; they prove nothing.
SEEN = (
    Case("seen tp1", P()),
    Case("seen full", P(), recompute="full", sequence=512, response=384, vocab=2048),
    Case("seen bf16 qwen3", P(), dtype="bfloat16", family="Qwen3"),
    Case("seen tp2", P(tensor=2), world=2),
    Case("seen tp2 sp", P(tensor=2, sequence=True), world=2),
    Case("seen pp2", P(pipeline=2), world=2),
    Case("seen dp2", P(), world=2),
)

# Not looked at before the tables were finished.
HELD_OUT = (
    Case("tp1", P(), hidden=320, heads=10, kv_heads=5, ffn=896, sequence=384, response=300),
    Case("tp1 full", P(), recompute="full", layers=8, sequence=768, response=512, vocab=4096),
    Case("tp1 selective", P(), recompute="selective", layers=6, family="Qwen3", micro_batch=2),
    Case("tp1 bf16 full", P(), recompute="full", dtype="bfloat16", layers=8, sequence=1024,
         response=640, vocab=2048, family="Qwen3"),
    Case("tied, large vocabulary", P(), tied=True, vocab=24576, layers=2, sequence=96, response=64,
         teacher_hidden=256),
    Case("tp2", P(tensor=2), world=2, hidden=384, teacher_hidden=512, sequence=320, response=256),
    Case("tp2 sp", P(tensor=2, sequence=True), world=2, layers=6, sequence=512, response=384),
    Case("tp2 sp bf16 full", P(tensor=2, sequence=True), world=2, dtype="bfloat16", layers=6,
         recompute="full", sequence=768, response=512, micro_batch=2),
    Case("pp2", P(pipeline=2), world=2, layers=6, sequence=384, response=256, samples=6),
    Case("pp2 bf16", P(pipeline=2), world=2, layers=8, dtype="bfloat16", vocab=4096, samples=6,
         sequence=512, response=384, family="Qwen3"),
    Case("dp2 zero-1", P(), world=2, layers=6, vocab=6144, micro_batch=2, samples=8),
    Case("dp2 zero-1 bf16", P(), world=2, dtype="bfloat16", hidden=384, teacher_hidden=256,
         sequence=512, response=320),
    Case("dp2, optimizer not split", P(), world=2, distributed=False, vocab=12288),
    Case("tp2 x pp2", P(tensor=2, pipeline=2), world=4, layers=8, sequence=384, response=256),
    Case("tp2 sp x pp2 full", P(tensor=2, pipeline=2, sequence=True), world=4, layers=8,
         recompute="full", sequence=768, response=512, vocab=4096, micro_batch=2, samples=8),
)  # fmt: skip


def main(names: list[str]) -> int:
    """Exit code 1 where a prediction is off by more than 10%."""
    chosen = [c for c in (*SEEN, *HELD_OUT) if any(n in c.name for n in names)]
    records = []
    for case in chosen or HELD_OUT:
        found = run(case)
        records += found
        for one in found:
            print(json.dumps(one) if names else _line(one), flush=True)
    worst = max(abs(one["error"]) for one in records)
    if not names:
        document = {"command": "python tools/check_plan.py", "worst": worst, "records": records}
        (ROOT / "docs/planner.json").write_text(json.dumps(document, indent=1) + "\n")
    return int(worst > 0.1)


def _line(one: dict[str, Any]) -> str:
    measured, predicted = (one[k]["peak"] / 1e6 for k in ("measured", "predicted"))
    return (
        f"| {one['case']} | {one['rank']} | {measured:.1f} | {predicted:.1f} | "
        f"{one['error']:+.1%} | {one['predicted']['worst']} |"
    )


def run(case: Case) -> list[dict[str, Any]]:
    """Prediction and measurement of every rank of a case."""
    import torch

    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        torch.multiprocessing.spawn(_rank, (case, folder), nprocs=case.world)
        files = [Path(folder, f"{rank}.json") for rank in range(case.world)]
        return [json.loads(file.read_text()) for file in files]


def _rank(rank: int, case: Case, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from megaopd import platform

    platform.install()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.world
    )
    found = {"case": case.name, **compare(case), "settings": dataclasses.asdict(case)}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
