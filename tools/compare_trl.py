"""The same on-policy distillation by megaopd and by TRL: accuracy against tokens and against time.

python tools/compare_trl.py --student DIR --teacher DIR --peer-python .venv/bench/bin/python

Same models (Hugging Face folders of the toy tokenizer), prompts in the same order, reverse KL over
the whole vocabulary, AdamW, cosine schedule, fp32, one process, one thread, transformers' generate
on both sides. The held-out prompts are scored by greedy decoding outside the measured time. Writes
OUT.md, OUT.json and OUT.png; what is in WORK already is not run again.

With --self the student as it began is the teacher and sees the answer, the loss is Jensen-Shannon,
and the peer is TRL's SDFTTrainer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megaopd.data.tasks.coached import FRONT  # noqa: E402
from tools.bench.trl_runner import SELF_TRAINERS, TRAINERS  # noqa: E402

OURS = "megaopd"
LOSS = "reverse KL over the whole vocabulary (TRL: beta = 1)"
SELF_LOSS = (
    "the student as it began is the teacher and sees the answer, Jensen-Shannon over the whole "
    "vocabulary, mean over a response's tokens, then over responses (TRL: SDFTTrainer with "
    "full_logits, alpha = 0.5)"
)
IWOPD = (
    "IWOPDTrainer is TRL's experimental importance-weighted sampled-token objective, with `jsd` "
    "its full-vocabulary one."
)
Points = list[dict[str, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", type=Path, required=True, help="a Hugging Face folder")
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--teacher", type=Path)
    teacher.add_argument("--self", action="store_true", help="the student, which sees the answer")
    parser.add_argument("--task", default="addition3")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has trl")
    parser.add_argument("--peers", nargs="*", choices=(*TRAINERS, *SELF_TRAINERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=128, help="of a step")
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--work", type=Path, help="default: runs/compare_trl, or ..._self")
    parser.add_argument("--out", type=Path, help="default: docs/compare_trl, or ..._self")
    options = parser.parse_args()
    options.teacher = options.teacher or options.student
    fitting = SELF_TRAINERS if options.self else TRAINERS
    options.peers = list(fitting) if options.peers is None else options.peers
    if not set(options.peers) <= set(fitting):
        parser.error(f"--peers {' '.join(options.peers)}: expected some of {', '.join(fitting)}")
    suffix = "_self" if options.self else ""
    options.work = options.work or Path(f"runs/compare_trl{suffix}")
    options.out = options.out or ROOT / "docs" / f"compare_trl{suffix}"
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, Points]] = {}
    for seed in options.seeds:
        data = _data(options, seed)
        results.setdefault(OURS, {})[seed] = _ours(options, seed)
        for name in options.peers:
            points = _peer(options, name, seed, data)
            results.setdefault(name, {})[seed] = points
    _write(options, results)
    return 0


def _config(options: Any, seed: int) -> dict[str, Any]:
    sees = {"teacher_sees": "answer", "teacher_text": FRONT} if options.self else {}
    return {
        "run": {"dir": str(options.work / f"megaopd_{seed}"), "steps": options.steps, "seed": seed},
        "student": {"path": str(options.student)},
        "teacher": {"path": str(options.teacher)},
        "data": {"source": f"task:{options.task}", "seed": seed, **sees},
        "rollout": {
            "prompts_per_step": options.prompts,
            "max_new_tokens": 5,
            "batch_size": options.prompts,
        },
        "objective": (
            {"loss": "jsd", "loss_agg": "seq-mean-token-mean"} if options.self else {"loss": "rkl"}
        ),
        "optim": {"lr": options.lr, "warmup_steps": options.steps // 20, "decay": "cosine"},
        "trainer": {"micro_batch_size": options.prompts},
        "eval": {"prompts": options.held_out, "every": options.every},
        "report": {"every": options.every},
    }


def _data(options: Any, seed: int) -> dict[str, Any]:
    """The run's prompts and answers in its order, and the held-out ones."""
    from megaopd.data.prompts import PromptStream
    from megaopd.inputs import held_out, student_tokenizer
    from megaopd.schema import make_config

    config = make_config(_config(options, seed))
    tokenizer = student_tokenizer(config)
    stream = PromptStream(config.data, tokenizer)
    drawn = [p for _ in range(options.steps) for p in stream.next_batch(options.prompts)]
    return {
        "prompts": [p.text for p in drawn],
        "answers": [p.answer for p in drawn],
        "held_out": [{"prompt": p.text, "answer": p.answer} for p in held_out(config, tokenizer)],
    }


def _ours(options: Any, seed: int) -> Points:
    from megaopd.config import save
    from megaopd.report.metrics import read_metrics
    from megaopd.schema import make_config

    values = _config(options, seed)
    directory = Path(values["run"]["dir"])
    if not (directory / "summary.json").is_file():
        path = options.work / f"megaopd_{seed}.toml"
        save(make_config(values), path)
        _run([sys.executable, "-m", "megaopd", "train", "--config", str(path)])
    seconds = tokens = 0.0
    at = {0: (0.0, 0.0)}
    for line in read_metrics(directory):
        seconds += sum(v for k, v in line.items() if k.startswith("time/"))
        tokens += line["tokens"]
        at[line["step"]] = (seconds, tokens)
    events = map(json.loads, (directory / "events.jsonl").read_text().splitlines())
    return [
        {"step": e["step"], "tokens": at[e["step"]][1], "seconds": at[e["step"]][0],
         "accuracy": e["accuracy"]}
        for e in events if e["kind"] == "eval"
    ]  # fmt: skip


def _peer(options: Any, name: str, seed: int, data: dict[str, Any]) -> Points:
    stem = options.work / f"{name.replace(', ', '_')}_{seed}"
    out = stem.with_suffix(".points.json")
    if not out.is_file():
        job = {
            "trainer": name,
            "student": str(options.student),
            "teacher": str(options.teacher),
            "teacher_text": FRONT,
            **data,
            "task": options.task,
            "steps": options.steps,
            "prompts_per_step": options.prompts,
            "max_new_tokens": 5,
            "lr": options.lr,
            "warmup_steps": options.steps // 20,
            "every": options.every,
            "seed": seed,
            "out": str(out),
        }
        path = stem.with_suffix(".job.json")
        path.write_text(json.dumps(job))
        _run([options.peer_python, "-m", "tools.bench.trl_runner", str(path)])
    return json.loads(out.read_text())


def _run(command: list[str]) -> None:
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | threads | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    print(">>", *command, flush=True)
    subprocess.run(command, check=True, cwd=Path.cwd(), env=environment)


def _write(options: Any, results: dict[str, dict[int, Points]]) -> None:
    record = {"command": " ".join(["python tools/compare_trl.py", *_asked(options)])}
    record |= {"steps": options.steps, "prompts": options.prompts, "results": results}
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1))
    steps = [int(p["step"]) for p in next(iter(results[OURS].values()))]
    lines = [
        "# megaopd beside TRL, measured",
        "",
        f"    {record['command']}",
        "",
        f"`task:{options.task}`, {options.steps} steps of {options.prompts} prompts, "
        f"{SELF_LOSS if options.self else LOSS},",
        "AdamW, fp32, one process with one thread, transformers' generate on both sides. Greedy "
        f"accuracy on {options.held_out} held-out prompts;",
        f"mean of {len(options.seeds)} seeds. Evaluation is not in the seconds.",
        *([] if options.self else [IWOPD]),
        "",
        "| | " + " | ".join(f"step {s}" for s in steps) + " | tokens | s | tokens/s |",
        "|---" * (len(steps) + 4) + "|",
    ]
    for name, seeds in results.items():
        means = [
            statistics.mean(p[i]["accuracy"] for p in seeds.values()) for i in range(len(steps))
        ]
        tokens = statistics.mean(p[-1]["tokens"] for p in seeds.values())
        seconds = statistics.mean(p[-1]["seconds"] for p in seeds.values())
        row = [f"{m:.3f}" for m in means]
        row += [f"{tokens:,.0f}", f"{seconds:.1f}", f"{tokens / seconds:,.0f}"]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", "Last accuracy by seed: " + "; ".join(
        f"{name} " + ", ".join(f"{p[-1]['accuracy']:.3f}" for p in seeds.values())
        for name, seeds in results.items()
    ) + ".", "", f"![accuracy]({options.out.name}.png)", ""]  # fmt: skip
    options.out.with_suffix(".md").write_text("\n".join(lines))
    _plot(options, results)


def _asked(options: Any) -> list[str]:
    """The arguments that say what was run; folders by their names only."""
    names = ("task", "seeds", "steps", "prompts", "held_out", "every", "lr")
    asked = ["--student STUDENT", "--self" if options.self else "--teacher TEACHER"]
    for name in names:
        value = getattr(options, name)
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        asked.append(f"--{name.replace('_', '-')} {text}")
    return asked


def _plot(options: Any, results: dict[str, dict[int, Points]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for color, (name, seeds) in enumerate(results.items()):
        for number, points in enumerate(seeds.values()):
            for axis, key in zip(axes, ("tokens", "seconds"), strict=True):
                axis.plot(
                    [p[key] for p in points],
                    [p["accuracy"] for p in points],
                    color=f"C{color}",
                    alpha=0.8,
                    label=name if number == 0 else None,
                )
    for axis, label in zip(axes, ("tokens sampled", "seconds"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("greedy accuracy")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(options.out.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    sys.exit(main())
