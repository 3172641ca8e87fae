"""Runs a study: its cases for each seed, workers side by side, and the report of what is there."""

import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaopd.errors import UserError
from megaopd.parallel import leave_distributed
from megaopd.recipes import merged, places, shared
from megaopd.report.metrics import read_metrics
from megaopd.report.progress import progress
from megaopd.study import report
from megaopd.study.cases import BY_NAME, EXTRAS, KEYS, PREFIXES, WORKED, Case
from megaopd.study.jobs import Job, all_stored
from megaopd.study.stages import Stages, slug

GRID_QUESTION, REAL = 8, 9  # asked for by --full-grid and --real-model
# Of a case on one core with its evaluation, and of question 9: for the estimate only.
SECONDS, SECONDS_OF_REAL = 16.0, 900.0


def command(
    root: Path,
    seeds: Sequence[int],
    workers: int,
    only: Sequence[int],
    *,
    full_grid: bool = False,
    real_model: Path | None = None,
) -> int:
    """`megaopd study many_faces`: run what is missing, and write study.md and study.html."""
    questions = _questions(only, full_grid, real_model)
    _check_model(root, real_model)
    if workers < 1 or not seeds:
        raise UserError(f"--workers {workers}, --seeds {list(seeds)}", expected="at least one")
    jobs = [
        Job(root, seed, name, real_model=real_model)
        for seed in seeds
        for name in missing(root, seed, questions)
    ]
    seconds = sum(SECONDS_OF_REAL if job.name == "system" else SECONDS for job in jobs)
    minutes = seconds / 60 / workers
    print(f"{len(seeds)} seeds, {len(jobs)} runs to do: about {minutes:.0f} min")
    begun, new = time.monotonic(), not (root / "figures").exists()
    shared_stages = [Job(root, seed, stages=stages_of(jobs, seed)) for seed in seeds]
    # Fresh interpreters, each of which imports once.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        failed = _all(pool, shared_stages, jobs)
    seconds = time.monotonic() - begun
    path = report.write(root, seeds, seconds=seconds if new and not failed else None)
    print(f"{seconds:.0f} s; wrote {path}")
    for text in failed:
        print(f"failed: {text}")
    return 1 if failed else 0


def _questions(only: Sequence[int], full_grid: bool, real_model: Path | None) -> list[int]:
    """Those to run: all but the grid and the real model's, which are asked for."""
    unknown = sorted(set(only) - set(report.QUESTIONS))
    if unknown:
        raise UserError(f"--only {unknown}", expected=f"some of {list(report.QUESTIONS)}")
    if REAL in only and real_model is None:
        raise UserError(f"--only {REAL}", expected="--real-model, the folder of a checkpoint")
    if real_model is not None and not (real_model / "config.json").is_file():
        raise UserError(
            f"--real-model {real_model}: no config.json there", expected="a Hugging Face checkpoint"
        )
    chosen = set(only) or set(report.QUESTIONS) - {GRID_QUESTION, REAL}
    chosen |= {GRID_QUESTION} if full_grid else set()
    chosen |= {REAL} if real_model is not None else set()
    return sorted(chosen)


def _check_model(root: Path, real_model: Path | None) -> None:
    """Figures of one real model are not those of another."""
    for seed, found in all_stored(root, "system").items():
        if real_model is not None and found["model"] != real_model.name:
            path = Job(root, seed, "system").path
            raise UserError(
                f"--real-model {real_model}, and {path} is of {found['model']}",
                fix="take another --dir",
            )


def missing(root: Path, seed: int, questions: Sequence[int]) -> list[str]:
    """Cases and extras that have no figures yet, or old ones."""
    names = [name for name, case in BY_NAME.items() if case.question in questions]
    names += [name for name, extra in EXTRAS.items() if extra.question in questions]
    return [name for name in names if Job(root, seed, name).stored() is None]


def stages_of(jobs: Sequence[Job], seed: int) -> tuple[str, ...]:
    """What the jobs of a seed start from, in order of names."""
    found: set[str] = set()
    for job in jobs:
        if job.seed == seed:
            if job.name in BY_NAME:
                found |= set(places(merged(shared("tiny"), BY_NAME[job.name].values)))
            else:
                found |= set(EXTRAS[job.name].stages)
    return tuple(sorted(found))


def _all(pool: ProcessPoolExecutor, stages: Sequence[Job], jobs: Sequence[Job]) -> list[str]:
    """The stages of each seed, and behind them its jobs; what failed.

    What cases share comes first, so that no two make the same stage.
    """
    behind = {
        pool.submit(_make_stages, one): [job for job in jobs if job.seed == one.seed]
        for one in stages
    }
    failed: list[str] = []
    with progress("stages and cases", len(stages) + len(jobs), enabled=len(jobs) > 0) as advance:
        while behind:
            done, _ = wait(behind, return_when=FIRST_COMPLETED)
            for one in done:
                failed += one.result()
                behind |= {pool.submit(_run_job, job): [] for job in behind.pop(one)}
                advance(1)
    return failed


@contextmanager
def _output_in(job: Job) -> Iterator[None]:
    """What a worker prints goes to a file: the console has the bar."""
    path = (job.root / "logs" / job.path.name).with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def _make_stages(job: Job) -> list[str]:
    stages, failed = job.place(), []
    for name in job.stages:
        one = replace(job, name=name)
        try:
            with _output_in(one):
                stages.make(name)
        except Exception as error:  # the cases that need it will fail, and others will not
            failed.append(_told(one, error))
    return failed


def _run_job(job: Job) -> list[str]:
    """One case, or one of EXTRAS, in this process; what failed."""
    stages = job.place()
    try:
        with _output_in(job):
            if job.name in EXTRAS:
                job.store(MAKERS[job.name](stages, job))
            else:
                _run_case(stages, job, BY_NAME[job.name])
    except Exception as error:  # one case's fault is a line of the report
        return [_told(job, error)]
    finally:
        leave_distributed()  # of its evaluations
    return []


def _told(job: Job, error: Exception) -> str:
    """One line; the traceback goes to the log."""
    with _output_in(job):
        traceback.print_exception(error)
    return f"seed {job.seed}, {job.name}: {type(error).__name__}: {error}"


def _run_case(stages: Stages, job: Job, case: Case) -> None:
    values = merged(shared("tiny"), case.values)
    summary = stages.run(slug(case.name), values)
    run_dir = Path(summary["dir"])
    lines = read_metrics(run_dir)
    found = {"before": summary["accuracy_before"], "accuracy": summary["accuracy_after"]}
    found |= _exact(stages, values, run_dir)
    for name, key in (("mass_student", "mass"), ("response_length", "length")):
        if name in lines[0]:
            found |= {f"{key}_first": lines[0][name], key: lines[-1][name]}
    if values["student"]["path"] == "{keyed_student}":
        found |= _means(stages, run_dir)
    curve = {k: [line.get(k) for line in lines] for k in ("mass_student", "entropy", "reward")}
    job.store(found, curve=curve)


def _exact(stages: Stages, values: dict[str, Any], run_dir: Path) -> dict[str, float]:
    """KL(student || teacher) over the whole vocabulary and the student's entropy, on its samples.

    The teacher is the case's; without a checkpoint of its own, nothing is measured.
    """
    from megaopd import run

    if not values["teacher"].get("path"):
        return {}
    last = max((run_dir / "checkpoints").glob("step_????????"))
    judged = {**values, "objective": {"loss": "rkl"}}
    judged.pop("mix", None)  # only samples are scored
    judged = merged(
        judged, {"student": {"path": str(last)}, "run": {"dir": str(run_dir / "exact")}}
    )
    run.evaluate(stages.config(judged))
    figures = json.loads((run_dir / "exact" / "evaluation.json").read_text())["figures"]
    return {"kl": figures["kl"], "entropy": figures["entropy"]}


def _means(stages: Stages, run_dir: Path) -> dict[str, float]:
    """Where the student stands to the means of its teacher's laws over the keys."""
    from megaopd.study.laws import mean_laws

    last = max((run_dir / "checkpoints").glob("step_????????"))
    start = Path(stages.make("keyed_student"))
    return mean_laws(last, start, start, keys=KEYS)


def _noise(stages: Stages, job: Job) -> Any:
    """Question 6: noise and bias of the estimators on the student's own responses."""
    from megaopd.data.responses import read_records
    from megaopd.study.laws import estimator_noise

    records = read_records(Path(stages.make("student_responses")))
    student, teacher = (Path(stages.make(name)) for name in ("student", "teacher"))
    return estimator_noise(student, teacher, records)


def _prefixes(stages: Stages, job: Job) -> Any:
    """Question 2: the teacher's accuracy behind the student's first tokens."""
    from megaopd.study.prefixes import continuations

    responses = Path(stages.make("worked_responses"))
    values = merged(shared("tiny"), {"student": {"path": stages.make("worked_teacher")}})
    values.pop("teacher")
    return continuations(merged(values, WORKED), responses, PREFIXES)


def _system_prompt(stages: Stages, job: Job) -> Any:
    """Question 9: what all prompts share, learnt by a real model."""
    from megaopd.study.system_prompt import internalise

    assert job.real_model is not None
    return {"model": job.real_model.name, **internalise(stages, job.real_model)}


# What makes the figures of each of EXTRAS.
MAKERS: dict[str, Callable[[Stages, Job], Any]] = {
    "prefixes": _prefixes,
    "system": _system_prompt,
    "noise": _noise,
}
