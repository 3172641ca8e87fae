"""megaopd/plan's memory against live tensor bytes of real updates on CPU ranks over gloo.

python tools/check_plan.py            every held-out case -> docs/planner.json
python tools/check_plan.py NAME...    some cases; held-out ones take their place there
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

LIMIT = 0.1  # of the peak
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megaopd.parallel import ParallelConfig as P  # noqa: E402
from megaopd.rollout.process import free_port  # noqa: E402
from tools.bench.pages import fill  # noqa: E402
from tools.bench.updates import Case, compare  # noqa: E402

# Looked at while the tables of plan/layer.py were read off the code; they prove nothing.
SEEN = (
    Case("seen tp1", P()),
    Case("seen full", P(), recompute="full", sequence=512, response=384, vocab=2048),
    Case("seen bf16 qwen3", P(), dtype="bfloat16", family="Qwen3"),
    Case("seen micro-batch 2", P(), vocab=1024, micro_batch=2, sequence=512, response=300,
         layers=6),
    Case("seen tied", P(), tied=True, vocab=16384, teacher_hidden=0, family="Qwen3", sequence=64,
         response=48, layers=2),
    Case("seen tp2", P(tensor=2), world=2),
    Case("seen tp2 sp", P(tensor=2, sequence=True), world=2),
    Case("seen pp2", P(pipeline=2), world=2),
    Case("seen dp2", P(), world=2),
    Case("seen experts", P(), family="Qwen3Moe", experts=8, layers=2, vocab=2048),
    Case("seen experts bf16", P(), family="Qwen3Moe", experts=4, layers=3, vocab=2048,
         dtype="bfloat16", sequence=512, response=384),
    Case("seen experts tp2 ep2", P(tensor=2, expert=2, sequence=True), world=2, family="Qwen3Moe",
         experts=8, layers=2, vocab=2048),
    Case("seen experts full", P(expert=2), world=2, family="Qwen3Moe", experts=8, layers=4,
         vocab=2048, recompute="full", sequence=512, response=384),
)  # fmt: skip

# Not looked at before the tables were finished, but for six that say so.
HELD_OUT = (
    Case("tp1", P(), hidden=320, teacher_hidden=480, heads=10, kv_heads=5, ffn=896,
         sequence=384, response=300),
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
    # Of a teacher in a layout of its own; the first six were looked at, the last two were not.
    Case("tp2, teacher pp2", P(tensor=2), world=2, teacher_layout=P(pipeline=2), layers=6,
         sequence=384, response=256),
    Case("dp2, teacher tp2 sp", P(), world=2, teacher_layout=P(tensor=2, sequence=True),
         teacher_hidden=512, sequence=512, response=384, dtype="bfloat16"),
    Case("tp2 sp x pp2, teacher dp4", P(tensor=2, pipeline=2, sequence=True), world=4,
         teacher_layout=P(), layers=8, vocab=4096, sequence=384, response=256, samples=8),
    Case("tp2, teacher on one rank", P(tensor=2), world=3, teacher_layout=P(), teacher_ranks=1,
         teacher_hidden=512, sequence=384, response=256),
    Case("dp2, teacher on tp2 sp", P(), world=4, teacher_layout=P(tensor=2, sequence=True),
         teacher_ranks=2, teacher_hidden=512, layers=6, micro_batch=2, samples=8, dtype="bfloat16",
         sequence=512, response=384),
    Case("tp2 sp, teacher on pp2", P(tensor=2, sequence=True), world=4, vocab=4096,
         teacher_layout=P(pipeline=2), teacher_ranks=2, sequence=640, response=384, samples=6),
    Case("pp2, teacher tp2", P(pipeline=2), world=2, teacher_layout=P(tensor=2), layers=8,
         teacher_hidden=512, vocab=6144, sequence=512, response=256, micro_batch=2, samples=8),
    Case("pp2, teacher on tp2 sp x pp2", P(pipeline=2), world=6, teacher_ranks=4, vocab=4096,
         teacher_layout=P(tensor=2, pipeline=2, sequence=True), teacher_hidden=640, layers=6,
         sequence=384, response=320),
    Case("experts, bf16", P(), family="Qwen3Moe", experts=16, top_k=4, expert_ffn=128, layers=3,
         dtype="bfloat16", sequence=320, response=256, micro_batch=2, vocab=4096),
    Case("experts ep2, full", P(expert=2), world=2, family="Qwen3Moe", experts=8, layers=6,
         vocab=4096, recompute="full", sequence=640, response=384),
    Case("experts tp2 sp x ep2", P(tensor=2, expert=2, sequence=True), world=4, family="Qwen3Moe",
         experts=8, layers=4, vocab=6144, sequence=512, response=384, samples=8),
    Case("experts tp2 sp x ep2, full", P(tensor=2, expert=2, sequence=True), world=4,
         family="Qwen3Moe", experts=4, expert_ffn=384, layers=6, vocab=4096, recompute="full",
         sequence=768, response=512, micro_batch=2, samples=8, dtype="bfloat16"),
    Case("experts tp2 sp x ep2 x pp2", P(tensor=2, expert=2, pipeline=2, sequence=True), world=4,
         family="Qwen3Moe", experts=8, layers=4, vocab=4096, sequence=384, response=256),
)  # fmt: skip


def main(names: list[str]) -> int:
    """Exit code 1 where a prediction is off by more than 10%."""
    chosen = [c for c in (*SEEN, *HELD_OUT) if c.name in names] if names else list(HELD_OUT)
    records = []
    # Worlds that split are started for one case alone.
    together: dict[tuple[int, str], list[Case]] = {}
    for case in chosen:
        together.setdefault((case.world, case.name if case.teacher_ranks else ""), []).append(case)
    for (world, _), cases in sorted(together.items()):
        found = run(cases, world)
        for one in found:
            print(_line(one), flush=True)
        _write([one for one in found if one["case"] in {case.name for case in HELD_OUT}])
        records += found
    return int(max(abs(one["error"]) for one in records) > LIMIT)


def _line(one: dict[str, Any]) -> str:
    measured, predicted = one["measured"], one["predicted"]
    place = "teacher" if one["own"] else "stage"
    cells = [one["case"], f"{one['rank']} ({place} {one['stage']})"]
    for part in ("resident", "peak"):
        cells += [f"{x[part] / 1e6:.2f}" for x in (measured, predicted)]
    return "| " + " | ".join([*cells, f"{one['error']:+.1%}", predicted["worst"]]) + " |"


def _write(records: list[dict[str, Any]]) -> None:
    """Into the document, in the place of earlier records of the same cases."""
    if not records:
        return
    path, page = ROOT / "docs/planner.json", ROOT / "docs/planner.md"
    before = json.loads(path.read_text())["records"] if path.is_file() else []
    fresh = {one["case"] for one in records}
    records = [one for one in before if one["case"] not in fresh] + records
    order = {case.name: i for i, case in enumerate(HELD_OUT)}
    records = [one for one in records if one["case"] in order]
    records.sort(key=lambda one: (order[one["case"]], one["rank"]))
    document = {
        "command": "python tools/check_plan.py",
        "worst": max(abs(one["error"]) for one in records),
        "records": records,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    fill(page, "measured", _table(records))


def _table(records: list[dict[str, Any]]) -> str:
    """A line a case and kind of rank: its fullest rank, and the worst prediction of any."""
    kinds: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for one in records:
        kinds.setdefault((one["case"], one["own"]), []).append(one)
    lines = [
        "| case | model | stays, measured | predicted | peak, measured | predicted | error "
        "| worst rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, own), of_case in kinds.items():
        full = max(of_case, key=lambda one: one["measured"]["peak"])
        numbers = [
            f"{x[part] / 1e6:.1f}"
            for part in ("resident", "peak")
            for x in (full["measured"], full["predicted"])
        ]
        worst = max((one["error"] for one in of_case), key=abs)
        what = "its teacher's ranks" if own else _described(full["settings"])
        cells = [name, what, *numbers, f"{full['error']:+.1%}", f"{worst:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _described(case: dict[str, Any]) -> str:
    kind = {"float32": "fp32", "bfloat16": "bf16"}[case["dtype"]]
    experts = ""
    if case["experts"]:
        experts = f"{case['experts']} experts of {case['expert_ffn']}, {case['top_k']} a token, "
    return (
        f"{case['family']}, H {case['hidden']}, {case['layers']} layers, {experts}"
        f"V {case['vocab']}, {case['micro_batch']} x {case['sequence']} tokens, {kind}, "
        f"recompute {case['recompute']}"
    )


def run(cases: list[Case], world: int) -> list[dict[str, Any]]:
    """Prediction and measurement of every rank of these cases, on the same processes."""
    import torch

    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        port = free_port("127.0.0.1")
        torch.multiprocessing.spawn(_rank, (cases, world, folder, port), nprocs=world)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
        return [one for of_case in zip(*found, strict=True) for one in of_case]


def _rank(rank: int, cases: list[Case], world: int, folder: str, port: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from megaopd import platform

    platform.install()
    place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    if not cases[0].teacher_ranks:
        dist.init_process_group("gloo")
    found = [
        {"case": case.name, **compare(case), "settings": dataclasses.asdict(case)} for case in cases
    ]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
