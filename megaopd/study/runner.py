"""Runs a study: its cases for each seed, workers side by side, and the report of what is there."""

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaopd.errors import UserError
from megaopd.recipes import FOLDER, merged
from megaopd.report.metrics import read_metrics
from megaopd.study import many_faces, report
from megaopd.study.stages import Stages

PREFIXES = (0, 1, 2)  # tokens of the student's
SECONDS = 16.0  # of a case on one core, with its evaluation: for the estimate only


def command(root: Path, seeds: Sequence[int], workers: int, only: Sequence[int]) -> int:
    """`megaopd study many_faces`: run what is missing, and write study.md and study.html."""
    if workers < 1 or not seeds:
        raise UserError(f"--workers {workers}, --seeds {list(seeds)}", expected="at least one")
    cases = [c for c in many_faces.CASES if not only or c.question in only]
    todo = sum(
        not _figures_file(root, seed, case.name).is_file() for seed in seeds for case in cases
    )
    minutes = todo * SECONDS / 60 / min(workers, len(seeds))
    print(f"{len(cases)} cases x {len(seeds)} seeds, {todo} to run: about {minutes:.0f} min")
    begun = time.monotonic()
    jobs = [
        (str(root), seed, [case.name for case in cases], not only or 2 in only) for seed in seeds
    ]
    if workers == 1:
        failed = [_run_seed(job) for job in jobs]
    else:
        # Fresh interpreters: a worker imports once and runs all cases of its seeds.
        with multiprocessing.get_context("spawn").Pool(min(workers, len(seeds))) as pool:
            failed = pool.map(_run_seed, jobs, chunksize=1)
    path = report.write(root, seeds)
    print(f"{time.monotonic() - begun:.0f} s; wrote {path}")
    for text in (line for lines in failed for line in lines):
        print(f"failed: {text}")
    return 1 if any(failed) else 0


def _run_seed(job: tuple[str, int, list[str], bool]) -> list[str]:
    """All cases of one seed in this process; what failed."""
    root, seed, names, prefixes = Path(job[0]), job[1], set(job[2]), job[3]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    stages = Stages(root / f"seed_{seed}", seed, say=lambda text: print(f"[{seed}] {text}"))
    failed = []
    for case in many_faces.CASES:
        if case.name in names:
            try:
                _run_case(stages, root, seed, case)
            except Exception as error:  # one case's fault is a line of the report
                traceback.print_exc()
                failed.append(f"seed {seed}, {case.name}: {type(error).__name__}: {error}")
    if prefixes:
        _prefixes(stages, root, seed)
    return failed


def _figures_file(root: Path, seed: int, name: str) -> Path:
    folder = "".join(c if c.isalnum() else "_" for c in name)
    return root / "figures" / f"{folder}-{seed}.json"


def _shared() -> dict[str, Any]:
    import tomllib

    return tomllib.loads((FOLDER / "tiny.toml").read_text())


def _run_case(stages: Stages, root: Path, seed: int, case: many_faces.Case) -> None:
    out = _figures_file(root, seed, case.name)
    if out.is_file():
        return
    values = merged(_shared(), case.values)
    summary = stages.run("".join(c if c.isalnum() else "_" for c in case.name), values)
    run_dir = Path(summary["dir"])
    lines = read_metrics(run_dir)
    found = {"before": summary["accuracy_before"], "accuracy": summary["accuracy_after"]}
    found |= _exact(stages, values, run_dir)
    if "mass_student" in lines[0]:
        found |= {"mass_first": lines[0]["mass_student"], "mass": lines[-1]["mass_student"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"case": case.name, "seed": seed, **found}))
    curve = {k: [line.get(k) for line in lines] for k in ("mass_student", "entropy", "reward")}
    out.with_suffix(".curve.json").write_text(json.dumps(curve))


def _exact(stages: Stages, values: dict[str, Any], run_dir: Path) -> dict[str, float]:
    """KL(student || teacher) over the whole vocabulary and the student's entropy, on its samples.

    The teacher is the case's; of a student that is its own teacher, nothing is measured.
    """
    from megaopd import run

    if not values["teacher"].get("path"):
        return {}
    last = max((run_dir / "checkpoints").glob("step_????????"))
    judged = {**values, "objective": {"loss": "rkl"}}
    judged = merged(
        judged, {"student": {"path": str(last)}, "run": {"dir": str(run_dir / "exact")}}
    )
    run.evaluate(stages.config(judged))
    figures = json.loads((run_dir / "exact" / "evaluation.json").read_text())["figures"]
    return {"kl": figures["kl"], "entropy": figures["entropy"]}


def _prefixes(stages: Stages, root: Path, seed: int) -> None:
    out = root / "figures" / f"prefixes-{seed}.json"
    if out.is_file():
        return
    from megaopd.study.prefixes import continuations

    responses = Path(stages.make("student_responses"))
    values = merged(_shared(), {"student": {"path": stages.make("teacher")}})
    values.pop("teacher")
    found = continuations(values, responses, PREFIXES)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found))
