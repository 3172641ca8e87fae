"""What a teacher on another layout or on other ranks costs to listen to, in bytes and seconds.

    python tools/bench_teacher.py --out docs/bench_teacher

The same rows are sent as hidden states, as logits, and as the teacher's top 64 ids and log-probs,
over the same calls; bytes are counted where tensors are handed to a send. Ranks are processes of
this machine, so that seconds say something about it and little about a network.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAYLOADS = ("hidden", "logits", "top64")
TOP = 64
# world, ranks of the teacher's own, what it is called
ARRANGEMENTS = {
    "regrouped": (2, 0, "student TP 2, teacher PP 2 on the same ranks"),
    "separate": (3, 1, "student TP 2, teacher on one rank of its own"),
}


def worker(arrangement: str, settings: dict[str, Any], out: Path) -> None:
    """One rank: measures, and writes what it found."""
    import torch

    from megaopd import platform
    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.config import ModelConfig

    platform.install()
    torch.set_num_threads(1)
    config = ModelConfig(settings["teacher"], settings["dtype"])
    arch = architecture(read_hf_config(config.path))
    measure = regrouped if arrangement == "regrouped" else separate
    found = measure(config, arch, settings)
    out.with_name(f"{arrangement}-{os.environ['RANK']}.json").write_text(json.dumps(found))


def student_side(config: Any, arch: Any, settings: dict[str, Any], teachers: int) -> Any:
    """(grid, micro-batches, bridge, padded vocabulary) of a student's rank under TP 2."""
    from megaopd.models.arch import padded_vocab
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.worlds import join_worlds

    bridge = join_worlds(teachers) if teachers else None
    if bridge is not None and bridge.is_teacher:
        return None, None, bridge, 0
    grid = make_grid(ParallelConfig(2))
    return grid, batches(grid, arch.vocab, settings), bridge, padded_vocab(arch.vocab, 2, 8)


def batches(grid: Any, vocab: int, settings: dict[str, Any]) -> Any:
    import random

    from megaopd.data.types import Prompt, Sample
    from megaopd.trainer.batch import make_micro_batches

    rng = random.Random(0)
    made = []
    for i in range(settings["samples"]):
        ids = [rng.randrange(vocab) for _ in range(settings["prompt"] + settings["response"])]
        cut = settings["prompt"]
        prompt = Prompt(str(i), tuple(ids[:cut]), "", None, "")
        made.append(Sample(prompt, tuple(ids[cut:]), None, "stop", 0))
    return make_micro_batches(made, grid=grid, micro_batch_size=2, pad_id=0, loss_agg="token-mean")


def as_payload(kind: str, rows: Any, weight: Any) -> Any:
    """[R, Ht] -> what is sent of them: [R, Ht], [R, V], or [R, 2 x 64] of 32-bit numbers."""
    import torch

    if kind == "hidden":
        return rows
    logits = rows @ weight.t()
    if kind == "logits":
        return logits
    log_probs, ids = logits.float().log_softmax(-1).topk(TOP)
    return torch.cat([ids.int().view(torch.float32), log_probs], 1)


def width_of(kind: str, arch: Any, dtype: Any) -> tuple[int, Any]:
    import torch

    return {
        "hidden": (arch.hidden, dtype),
        "logits": (arch.vocab, dtype),
        "top64": (2 * TOP, torch.float32),
    }[kind]


def whole_output_layer(config: Any, arch: Any) -> Any:
    """[V, Ht], for the payloads that need it on the teacher's side."""
    import torch

    from megaopd.models.weights import HfReader

    name = "model.embed_tokens.weight" if arch.tied else "lm_head.weight"
    weight = HfReader(config.path).read(name, None, 0, 0, 0)
    return weight.to(getattr(torch, config.dtype))


def regrouped(config: Any, arch: Any, settings: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    from megaopd.parallel import ParallelConfig, gather_objects
    from megaopd.trainer.teachers.exchange import RegroupedTeacher
    from megaopd.trainer.teachers.scoring import run_jobs
    from megaopd.trainer.teachers.wants import local_wants, make_jobs, teacher_sequences
    from megaopd.worlds import second_layout

    grid, micro_batches, _, rows = student_side(config, arch, settings, 0)
    layout = second_layout(ParallelConfig(pipeline=2))
    teacher = RegroupedTeacher(config, arch, grid, layout, vocab_rows=rows)
    weight = whole_output_layer(config, arch)
    jobs = make_jobs(gather_objects(local_wants(micro_batches, grid)))
    sequences = teacher_sequences(micro_batches[0].samples, arch.max_positions)
    found: dict[str, Any] = {}
    for kind in PAYLOADS:
        width, dtype = width_of(kind, arch, weight.dtype)
        seconds = []
        for _ in range(settings["repeats"]):
            pieces: dict[tuple[int, int], Any] = {}

            def deliver(job: Any, mine: Any, kind: str = kind, pieces: Any = pieces) -> None:
                for rank, part in mine:
                    pieces[job.index, rank] = as_payload(kind, part, weight)

            with layout.active():
                run_jobs(teacher.model, layout.grid, jobs, sequences, deliver)
            # What stays on this rank is not sent; what is sent is counted by the exchange.
            kept = sum(
                t.numel() * t.element_size() for (_, r), t in pieces.items() if r == grid.rank
            )
            before = teacher.exchange.sent_bytes
            dist.barrier()
            begun = time.perf_counter()
            teacher.exchange(jobs, pieces, width, dtype)
            dist.barrier()
            seconds.append(time.perf_counter() - begun)
        sent = teacher.exchange.sent_bytes - before
        found[kind] = {"sent": sent, "kept": kept, "seconds": statistics.median(seconds)}
    return found


def separate(config: Any, arch: Any, settings: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from megaopd.parallel import ParallelConfig
    from megaopd.trainer.teachers.ranks import SeparateTeacher, Service, serve

    grid, micro_batches, bridge, rows = student_side(config, arch, settings, 1)
    weight = whole_output_layer(config, arch)

    class Payloads(Service):
        def payload(self, teacher: str, rows: Any) -> Any:
            return as_payload(teacher, rows, weight)

        def answer(self, request: Any) -> None:
            before = bridge.sent.get("hidden", 0)
            super().answer(request)
            sent[request.teacher] = bridge.sent.get("hidden", 0) - before

    if bridge.is_teacher:
        sent: dict[str, int] = {}
        teachers = dict.fromkeys(PAYLOADS, (config, arch))
        serve(teachers, ParallelConfig(), bridge, make=Payloads)
        return {kind: {"sent": sent[kind], "kept": 0} for kind in PAYLOADS}
    found: dict[str, Any] = {}
    for kind in PAYLOADS:
        teacher = SeparateTeacher(config, arch, grid, bridge, vocab_rows=rows, window=2, name=kind)
        teacher.width, teacher.torch_dtype = width_of(kind, arch, getattr(torch, config.dtype))
        seconds, before = [], dict(bridge.sent)
        for _ in range(settings["repeats"]):
            dist.barrier()
            begun = time.perf_counter()
            for part in teacher.hidden_states(micro_batches):
                part()
            dist.barrier()
            seconds.append(time.perf_counter() - begun)
        asked = {k: v - before.get(k, 0) for k, v in bridge.sent.items()}
        found[kind] = {
            "sent": 0,
            "kept": 0,
            "asked": sum(asked.values()) / settings["repeats"],
            "seconds": statistics.median(seconds),
        }
    teacher.close()
    return found


def start(arrangement: str, world: int, settings: dict[str, Any], folder: Path) -> list[Any]:
    """Run the ranks; what each wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, __file__, "--worker", arrangement, "--out", str(folder / "x")]
    command += ["--settings", json.dumps(settings)]
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(world)
    ]
    if any(rank.wait(timeout=600) for rank in ranks):
        sys.exit(f"{arrangement}: a rank failed")
    return [json.loads((folder / f"{arrangement}-{r}.json").read_text()) for r in range(world)]


def report(results: dict[str, Any], settings: dict[str, Any], command: str) -> str:
    lines = [
        "# Bytes that a teacher on another layout or other ranks sends\n",
        f"    {command}\n",
        f"A teacher of hidden size {settings['hidden']} and {settings['vocab']} ids in "
        f"{settings['dtype']}, {settings['tokens']} tokens that the loss looks at. Bytes are "
        "counted at the send calls, a token: each row goes once to the student's tensor group, "
        "whose ranks get a part each and put it together over their own links. Requests are token "
        "ids, wanted rows and credits. Seconds: median of "
        f"{settings['repeats']}, on one machine; regrouped: the exchange alone, separate: scoring "
        "and sending.\n",
        "| arrangement | payload | sent | kept on the rank | requests (bytes a token) | ms |",
        "|---|---|---|---|---|---|",
    ]
    for arrangement, rows in results.items():
        for kind, row in rows.items():
            lines.append(
                f"| {ARRANGEMENTS[arrangement][2]} | {kind} | {row['sent']:.0f} "
                f"| {row['kept']:.0f} | {row['asked']:.1f} | {1000 * row['seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="without its ending")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=37888)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--response", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--worker", choices=list(ARRANGEMENTS), help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.settings, arguments.out)
        return
    names = ("hidden", "vocab", "samples", "response", "repeats", "dtype")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    settings |= {"prompt": 8, "tokens": arguments.samples * arguments.response}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings["teacher"] = make_teacher(Path(folder), settings)
        for name, (world, _, _) in ARRANGEMENTS.items():
            per_rank = start(name, world, settings, Path(folder))
            tokens = settings["tokens"]
            results[name] = {
                kind: {
                    "sent": sum(r[kind]["sent"] for r in per_rank) / tokens,
                    "kept": sum(r[kind]["kept"] for r in per_rank) / tokens,
                    "asked": sum(r[kind].get("asked", 0) for r in per_rank) / tokens,
                    "seconds": max(r[kind].get("seconds", 0) for r in per_rank),
                }
                for kind in PAYLOADS
            }
    settings.pop("teacher")
    command = "python tools/bench_teacher.py --out docs/bench_teacher"
    text = report(results, settings, command)
    arguments.out.with_suffix(".md").write_text(text)
    arguments.out.with_suffix(".json").write_text(
        json.dumps({"settings": settings, "results": results}, indent=1)
    )
    print(text)


def make_teacher(folder: Path, settings: dict[str, Any]) -> str:
    """A random checkpoint of one shallow layer pair: what is sent does not depend on its depth."""
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=settings["vocab"],
        hidden_size=settings["hidden"],
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(
        getattr(torch, settings["dtype"])
    )
    model.save_pretrained(folder / "teacher")
    return str(folder / "teacher")


if __name__ == "__main__":
    main()
