"""How far the engine's log-probs are from the trainer's, and what importance weights do about it.

    python tools/bench_mismatch.py --student DIR --teacher DIR --out docs/bench_mismatch

Short runs of sampled-token distillation on a real SGLang server whose weights are in fp32 or bf16
while the trainer computes in fp32, with truncated importance weights off and on; with strict
turns, and one step ahead. Every step of every run logs k3 and the effective sample size.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COLUMNS = ("rollout_log_prob_diff", "rollout_k3", "rollout_ess", "tis/ess", "tis/clip_fraction")


def run(directory: Path, arguments: argparse.Namespace, **overrides: Any) -> dict[str, Any]:
    """Medians over the steps of one run, and its accuracy before and after."""
    settings = {
        "run.dir": directory,
        "run.steps": arguments.steps,
        "student.path": arguments.student,
        "teacher.path": arguments.teacher,
        "data.source": "task:addition3",
        "rollout.engine": "sglang",
        "rollout.prompts_per_step": arguments.prompts,
        "rollout.max_new_tokens": 5,
        "objective.loss": arguments.loss,
        "optim.lr": arguments.lr,
        "trainer.micro_batch_size": arguments.prompts,
        "server.max_tokens": 20000,
        "eval.prompts": 500,
        "checkpoint.every": 0,
        **overrides,
    }
    command = [sys.executable, "-m", "megaopd", "train"]
    command += [f"{key}={value}" for key, value in settings.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {
        name: statistics.median(row[name] for row in rows) for name in COLUMNS if name in rows[0]
    }
    summary = json.loads((directory / "summary.json").read_text())
    return found | {name: summary[f"accuracy_{name}"] for name in ("before", "after")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, required=True, help="checkpoint")
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--loss", default="pg", help="an estimator on the sampled token")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("bench_mismatch"))
    arguments = parser.parse_args()
    from megaopd.report.progress import progress

    cases = [
        {"server.dtype": dtype, "objective.tis": tis, "rollout.staleness": staleness}
        for dtype in ("float32", "bfloat16")
        for tis in ("off", "token")
        for staleness in (0, 1)
    ]
    rows = []
    with (
        tempfile.TemporaryDirectory() as root,
        progress("runs", len(cases)) as advance,
    ):
        for number, case in enumerate(cases):
            found = run(Path(root) / str(number), arguments, **case)
            rows.append({**case, **found})
            advance(1)
    names = [*cases[0], *COLUMNS, "before", "after"]
    command = ("python tools/bench_mismatch.py " + " ".join(sys.argv[1:])).strip()
    lines = ["# Engine against trainer, measured", "", f"    {command}", ""]
    lines += [f"`objective.loss={arguments.loss}`, {arguments.steps} steps of {arguments.prompts}"]
    lines += ["responses, the trainer in fp32. Medians over the steps; accuracy before and after."]
    lines += ["", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v := row.get(n, "-"), float) else str(v) for n in names]
        lines.append("| " + " | ".join(cells) + " |")
    page = "\n".join(lines) + "\n"
    arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    arguments.out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
