"""`megaopd plan`: from a configuration to a printed plan."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megaopd.errors import UserError
from megaopd.plan.configured import job_of, left_out
from megaopd.plan.hardware import find_gpu
from megaopd.plan.job import check_job
from megaopd.plan.report import as_dict, print_plan
from megaopd.plan.search import best, evaluate, search
from megaopd.schema import load_config


def plan(
    config: Path | None,
    overrides: Sequence[str],
    *,
    gpus: int,
    gpu: str,
    teacher_layout: str = "",
    suggest: bool = True,
    as_json: bool = False,
) -> int:
    """Print what the run needs on `gpus` GPUs; 0 where it fits or something else does.

    Raises:
        UserError: a layout that cannot be built, or (suggest) none that fits.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus}", expected="at least 1")
    kind = find_gpu(gpu)
    run = load_config(config, overrides)
    job = job_of(run, gpus, teacher_layout=teacher_layout)
    unknown = ", ".join(left_out(run))
    if unknown:
        print(f"megaopd: this plan is made without {unknown}", file=sys.stderr)
    check_job(job)
    found = evaluate(job, kind)
    result = search(job, kind) if suggest else None
    if as_json:
        print(json.dumps(as_dict(found, kind, result), indent=1))
    else:
        print_plan(found, kind, result)
    if found.fullest.total <= kind.memory:
        return 0
    if result is not None:
        best(result)
        return 0
    return 1
