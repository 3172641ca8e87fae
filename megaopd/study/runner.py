"""Runs a study: its cases for each seed, workers side by side, and the report of what is there."""

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from megaopd.errors import UserError
from megaopd.parallel import leave_distributed
from megaopd.recipes import merged, places, shared
from megaopd.report.metrics import read_metrics
from megaopd.report.progress import progress
from megaopd.study import many_faces, report
from megaopd.study.stages import Stages, slug

PREFIXES = (0, 1, 2)  # tokens of the student's
SECONDS = 16.0  # of a case on one core, with its evaluation: for the estimate only


def command(root: Path, seeds: Sequence[int], workers: int, only: Sequence[int]) -> int:
    """`megaopd study many_faces`: run what is missing, and write study.md and study.html."""
    if workers < 1 or not seeds:
        raise UserError(f"--workers {workers}, --seeds {list(seeds)}", expected="at least one")
    questions = list(only) or list(report.QUESTIONS)
    cases = [case for case in many_faces.CASES if case.question in questions]
    jobs = [(root, seed, what) for seed in seeds for what in _missing(root, seed, questions)]
    minutes = len(jobs) * SECONDS / 60 / workers
    print(f"{len(cases)} cases x {len(seeds)} seeds, {len(jobs)} to run: about {minutes:.0f} min")
    begun, new = time.monotonic(), not (root / "figures").exists()
    wanted = [(root, seed, sorted(_stages_of(jobs, seed))) for seed in seeds]
    # Fresh interpreters, each of which imports once. First what cases share, so that no two make
    # the same stage.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        failed = _all(pool, _make_stages, wanted, "stages, by seed")
        failed += _all(pool, _run_job, jobs, "cases")
    seconds = time.monotonic() - begun
    path = report.write(root, seeds, seconds=seconds if new and not failed else None)
    print(f"{seconds:.0f} s; wrote {path}")
    for text in failed:
        print(f"failed: {text}")
    return 1 if failed else 0


Job = tuple[Path, int, str]  # the root, a seed, and a case or one of EXTRAS


def _missing(root: Path, seed: int, questions: Sequence[int]) -> list[str]:
    """Cases and extras that have no figures yet."""
    names = [case.name for case in many_faces.CASES if case.question in questions]
    names += [name for name, (question, _, _) in EXTRAS.items() if question in questions]
    return [name for name in names if not _figures_file(root, seed, name).is_file()]


def _stages_of(jobs: Sequence[Job], seed: int) -> set[str]:
    """What the jobs of a seed start from."""
    cases = {case.name: case for case in many_faces.CASES}
    found: set[str] = set()
    for _, other, name in jobs:
        if other == seed:
            values = merged(shared("tiny"), cases[name].values) if name in cases else {}
            found |= set(places(values)) if name in cases else set(EXTRAS[name][1])
    return found


def _all(pool: ProcessPoolExecutor, work: Any, jobs: Sequence[Any], what: str) -> list[str]:
    """Run the jobs, with a bar; what failed."""
    failed = []
    with progress(what, len(jobs), enabled=len(jobs) > 0) as advance:
        for done in as_completed([pool.submit(work, job) for job in jobs]):
            failed += done.result()
            advance(1)
    return failed


@contextmanager
def _output_in(root: Path, seed: int, name: str) -> Iterator[None]:
    """What a worker prints goes to a file: the console has the bar."""
    path = (root / "logs" / _figures_file(root, seed, name).name).with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def _stages(root: Path, seed: int) -> Stages:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    return Stages(root / f"seed_{seed}", seed, say=lambda text: None)


def _make_stages(job: tuple[Path, int, list[str]]) -> list[str]:
    root, seed, names = job
    stages, failed = _stages(root, seed), []
    for name in names:
        try:
            with _output_in(root, seed, name):
                stages.make(name)
        except Exception as error:  # the cases that need it will fail, and others will not
            failed.append(_told(root, seed, name, error))
    return failed


def _run_job(job: Job) -> list[str]:
    """One case, or one of EXTRAS, in this process; what failed."""
    root, seed, name = job
    stages = _stages(root, seed)
    try:
        with _output_in(root, seed, name):
            if name in EXTRAS:
                out = _figures_file(root, seed, name)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(EXTRAS[name][2](stages)))
            else:
                case = next(case for case in many_faces.CASES if case.name == name)
                _run_case(stages, root, seed, case)
    except Exception as error:  # one case's fault is a line of the report
        return [_told(root, seed, name, error)]
    finally:
        leave_distributed()  # of its evaluations
    return []


def _told(root: Path, seed: int, name: str, error: Exception) -> str:
    """One line; the traceback goes to the log."""
    with _output_in(root, seed, name):
        traceback.print_exception(error)
    return f"seed {seed}, {name}: {type(error).__name__}: {error}"


def _figures_file(root: Path, seed: int, name: str) -> Path:
    return root / "figures" / f"{slug(name)}-{seed}.json"


def _run_case(stages: Stages, root: Path, seed: int, case: many_faces.Case) -> None:
    out = _figures_file(root, seed, case.name)
    values = merged(shared("tiny"), case.values)
    summary = stages.run(slug(case.name), values)
    run_dir = Path(summary["dir"])
    lines = read_metrics(run_dir)
    found = {"before": summary["accuracy_before"], "accuracy": summary["accuracy_after"]}
    found |= _exact(stages, values, run_dir)
    if "mass_student" in lines[0]:
        found |= {"mass_first": lines[0]["mass_student"], "mass": lines[-1]["mass_student"]}
    if values["student"]["path"] == "{keyed_student}":
        found |= _means(stages, run_dir)
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


def _means(stages: Stages, run_dir: Path) -> dict[str, float]:
    """Where the student stands to the means of its teacher's laws over the keys."""
    from megaopd.study.laws import mean_laws

    last = max((run_dir / "checkpoints").glob("step_????????"))
    start = Path(stages.make("keyed_student"))
    return mean_laws(last, start, start, keys=many_faces.KEYS)


def _noise(stages: Stages) -> Any:
    """Question 6: noise and bias of the estimators on the student's own responses."""
    from megaopd.data.responses import read_records
    from megaopd.study.laws import estimator_noise

    records = read_records(Path(stages.make("student_responses")))
    student, teacher = (Path(stages.make(name)) for name in ("student", "teacher"))
    return estimator_noise(student, teacher, records)


def _prefixes(stages: Stages) -> Any:
    """Question 2: the teacher's accuracy behind the student's first tokens."""
    from megaopd.study.prefixes import continuations

    responses = Path(stages.make("student_responses"))
    values = merged(shared("tiny"), {"student": {"path": stages.make("teacher")}})
    values.pop("teacher")
    return continuations(values, responses, PREFIXES)


# Name -> the question, the stages that it needs, and what makes its figures.
EXTRAS: dict[str, tuple[int, tuple[str, ...], Callable[[Stages], Any]]] = {
    "prefixes": (2, ("student_responses", "teacher"), _prefixes),
    "noise": (6, ("student_responses", "student", "teacher"), _noise),
}
