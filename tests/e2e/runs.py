"""Small runs of the command line in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from megaopd.quickstart import make_checkpoint


def megaopd(*arguments: object, env: dict[str, str] | None = None, timeout: int = 120):
    """Run `python -m megaopd ARGUMENTS`; the finished process with its output as text."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        settings.pop(name, None)
    return subprocess.run(
        [sys.executable, "-m", "megaopd", *map(str, arguments)],
        env=settings,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def make_models(root: Path) -> tuple[Path, Path]:
    """A random student and a random teacher of the quickstart's shapes."""
    for name in ("student", "teacher"):
        make_checkpoint(name, root / name, seed=5)
    return root / "student", root / "teacher"


def opd_arguments(student: Path, teacher: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Arguments of a small on-policy distillation run on the addition prompts."""
    return [
        "train",
        f"student.path={student}",
        f"teacher.path={teacher}",
        f"run.dir={run_dir}",
        "data.source=task:addition3",
        "rollout.max_new_tokens=5",
        "rollout.prompts_per_step=8",
        "trainer.micro_batch_size=4",
        "optim.lr=2e-3",
        *overrides,
    ]


def columns(run_dir: Path, *names: str) -> list[list[str]]:
    """The named values of every line of metrics.jsonl, as the bytes that stand there."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_float=str, parse_int=str) for line in lines]
    return [[row[name] for name in names] for row in rows]


def end_all(process: subprocess.Popen) -> None:
    """kill -9 for a process that runs and for all that it has started, as a node that is lost."""
    if process.poll() is None:
        root = psutil.Process(process.pid)
        for one in [root, *root.children(recursive=True)]:
            one.kill()
        process.wait()
