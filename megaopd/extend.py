"""What a file of one's own adds: losses, estimators, tasks, and hooks into the loop.

`run.plugins` names such files. Each is executed once in every process of the run, before the
configuration is checked, so that its names can stand there. A plugin is code of whoever starts the
run, with all that this process may do. docs/extending.md has worked examples.

    @extend.divergence("name")      (laws, parameter) -> (term, G): losses/divergences.py
    @extend.estimator("name")       (terms) -> (value, slope): losses/sampled.py
    @extend.task("name")            a class or function that makes a task: data/tasks/base.py
    @extend.summarizer("name")      (prompt, response) -> skill: data/skills.py
    @extend.hook("verified")        one of HOOKS

A hook is of the runs whose configuration names its file; names are of the process. What a hook
returns must follow from its arguments alone: every rank calls it, and a resumed run calls it again.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megaopd.errors import UserError
from megaopd.objectives import names

F = TypeVar("F", bound=Callable[..., Any])

# Where a hook is called, and what it is given and returns. METHODS of training, not of the trainer.
HOOKS = {
    "verified": "(samples, step) -> samples: the step's own samples, with their rewards",
    "weighed": "(samples, step) -> samples: all of the step, with weights and advantages",
    "metrics": "(samples, step) -> {name: number}: what is logged beside the step's metrics",
}

Hooks = Mapping[str, Sequence[Callable[..., Any]]]

_LOADED: dict[Path, dict[str, list[Callable[..., Any]]]] = {}
_loading: list[Path] = []  # the file that is being executed


def load(paths: Sequence[str]) -> None:
    """Execute the files that were not yet in this process.

    Raises:
        UserError: there is no such file.
    """
    for path in map(Path, paths):
        place = path.resolve()
        if place in _LOADED:
            continue
        if not place.is_file() or place.suffix != ".py":
            raise UserError(f"run.plugins holds {str(path)!r}", expected="paths of .py files")
        spec = importlib.util.spec_from_file_location(f"megaopd_plugin_{place.stem}", place)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        _LOADED[place] = {point: [] for point in HOOKS}
        _loading.append(place)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del _LOADED[place]
            raise
        finally:
            _loading.pop()


def hooks_of(paths: Sequence[str]) -> Hooks:
    """The hooks that these files have, which are loaded, by point and in order."""
    files = [_LOADED[Path(path).resolve()] for path in paths]
    return {point: [hook for file in files for hook in file[point]] for point in HOOKS}


def placed(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Values of a TOML file in `folder`, whose plugins are found from there."""
    found = {
        key: placed(value, folder) if key in ("tiny", "full") else value
        for key, value in values.items()
    }
    run = values.get("run")
    if isinstance(run, Mapping) and isinstance(run.get("plugins"), list):
        found["run"] = {**run, "plugins": [str(folder.resolve() / str(p)) for p in run["plugins"]]}
    return found


def hook(point: str) -> Callable[[F], F]:
    """Have the function called at a point of the loop."""
    if point not in HOOKS or not _loading:
        raise UserError(
            f"hook {point!r}" + ("" if _loading else " outside of a plugin"),
            expected="one of " + ", ".join(map(repr, HOOKS)) + ", in a file of run.plugins",
        )

    def add(function: F) -> F:
        _LOADED[_loading[-1]][point].append(function)
        return function

    return add


def divergence(
    name: str, *, parameter: str | None = None, default: float | None = None
) -> Callable[[F], F]:
    """A divergence for objective.loss, on every support that an f-divergence has.

    parameter: "alpha" or "beta", a number above 0 and below 1 that it takes; default: its value.
    """
    from megaopd.losses.divergences import Kind
    from megaopd.losses.terms import add_kind

    _check_new(name)
    if (parameter is None) != (default is None) or parameter not in (None, "alpha", "beta"):
        raise UserError(
            f"divergence {name!r} with parameter {parameter!r}, default {default!r}",
            expected="parameter 'alpha' or 'beta' and its default, or neither",
        )

    def add(function: F) -> F:
        add_kind(name, Kind(function, parameter, default))
        names.DIVERGENCES.append(name)
        names.LOSSES.append(name)
        if parameter:
            names.PARAMETER[name] = parameter
        return function

    return add


def estimator(
    name: str, *, about: str = "", parameters: Mapping[str, float] | None = None
) -> Callable[[F], F]:
    """An estimator on the sampled token for objective.loss.

    parameters: those of clip_low, clip_high and cap that it takes, with their defaults.
    """
    from megaopd.losses.sampled import ESTIMATORS, Estimator

    _check_new(name)
    own = dict(parameters or {})
    if not own.keys() <= {"clip_low", "clip_high", "cap"}:
        raise UserError(
            f"estimator {name!r} with parameters {sorted(own)}",
            expected="of clip_low, clip_high and cap, which [objective] has",
        )

    def add(function: F) -> F:
        ESTIMATORS[name] = Estimator(function, about, parameters=own)
        names.ESTIMATORS.append(name)
        names.LOSSES.append(name)
        if "cap" in own:
            names.CAPPED.append(name)
        if "clip_low" in own:
            names.CLIPPED.append(name)
        return function

    return add


def task(name: str) -> Callable[[F], F]:
    """A task for data.source ("task:NAME") and data.verifier; it is made with the size behind its
    name as text."""
    from megaopd.data.tasks import TASKS

    if name in TASKS or not name.replace("_", "").isalpha() or not name.islower():
        raise UserError(
            f"task {name!r}", expected="a name of small letters and _ that no other task has"
        )

    def add(make: F) -> F:
        TASKS[name] = make
        return make

    return add


def summarizer(name: str) -> Callable[[F], F]:
    """What data.summarizer makes of a success: (prompt, response text) -> skill, "" for none."""
    from megaopd.data.skills import SUMMARIZERS

    if name in SUMMARIZERS:
        raise UserError(f"summarizer {name!r}", expected="a name that no other has")

    def add(function: F) -> F:
        SUMMARIZERS[name] = function
        return function

    return add


def _check_new(name: str) -> None:
    if name in names.LOSSES or name in names.REFUSED:
        raise UserError(f"a loss {name!r} in a plugin", expected="a name that no other loss has")
