"""Whole runs as TOML files, and where to find them.

A method may also be a file of one's own, named by its path.

quickstart/ and h100/ are runs. methods/ has a file for each method, which goes on top of what all
methods share: tiny.toml on a laptop, full.toml on H100s. stages/ are what comes before a tiny run;
a string of a method or stage that holds "{NAME}" stands for what stage NAME makes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaopd import extend
from megaopd.config import build, read_toml
from megaopd.errors import UserError

FOLDER = Path(__file__).parent
Variant = Literal["tiny", "full"]
_PLACE = re.compile(r"\{(\w+)\}")


def recipe(name: str) -> Path:
    """The path of a packaged recipe, e.g. recipe("quickstart/opd")."""
    return FOLDER / f"{name}.toml"


@dataclass(frozen=True, kw_only=True)
class About:
    """The [recipe] of a method: what it is for and how it is judged."""

    about: str
    paper: str = ""
    when: str = ""
    cost: str = ""
    note: str = ""  # what has to be made first, or is left out of the paper's
    metric: str = "accuracy"  # of an evaluation, named before it is run
    direction: Literal["up", "down", "none"] = "none"  # where the metric is expected to go
    baseline: str = "student"  # another method, or "student": the model before
    baseline_student: str = ""  # what the baseline starts from; empty: what its own recipe says


@dataclass(frozen=True, kw_only=True)
class Method(About):
    """A method's recipe, with its values by section."""

    name: str
    sections: Mapping[str, Any]

    def values(self, variant: Variant) -> dict[str, Any]:
        """A run's TOML values: the shared ones, the method's, and those of the variant."""
        below = shared(variant)
        if variant == "full":  # methods that build on each other have folders of their own
            below["run"]["dir"] = f"runs/{self.name}"
        own = {k: v for k, v in self.sections.items() if k not in ("recipe", "tiny", "full")}
        own = merged(own, self.sections.get(variant, {}))
        if own.get("teacher", {}).get("path") == "":  # no checkpoint, nor settings of one
            below.pop("teacher")
        return merged(below, own)


def methods() -> list[str]:
    """Names of the methods that have a recipe."""
    return sorted(path.stem for path in (FOLDER / "methods").glob("*.toml"))


def method(name: str) -> Method:
    """The recipe of a method: by its name, or of a file of one's own by a path that ends in .toml.

    Raises:
        UserError: no such method or file, or a [recipe] that does not say what it has to.
    """
    own = name.endswith(".toml")
    if not own and name not in methods():
        raise UserError(
            f"no recipe {name!r}",
            expected="one of " + ", ".join(methods()) + ", or the path of a .toml file",
        )
    path = Path(name) if own else FOLDER / "methods" / f"{name}.toml"
    sections = extend.placed(read_toml(path), path.parent)
    about = build(_Head, {"recipe": sections.get("recipe", {})}).recipe
    return Method(name=path.stem, sections=sections, **vars(about))


@dataclass(frozen=True, kw_only=True)
class _Head:
    recipe: About


def stage_values(name: str) -> dict[str, Any]:
    """What a stage is: its kind, and a run's values where it is one."""
    path = FOLDER / "stages" / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"no stage {name!r}", expected=f"a file {path.name} in {path.parent}")
    return read_toml(path)


def shared(variant: Variant) -> dict[str, Any]:
    """What all methods have in a variant."""
    return read_toml(FOLDER / f"{variant}.toml")


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above` in it, section by section."""
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        found[key] = merged(old, value) if both else value  # pyright: ignore[reportArgumentType]
    return found


def places(values: Any) -> Iterator[str]:
    """Names of the stages that some values refer to."""
    if isinstance(values, str):
        yield from _PLACE.findall(values) if _whole(values) else ()
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from places(value)


def filled(values: Any, found: Mapping[str, str]) -> Any:
    """The values with what those stages made."""
    if isinstance(values, str) and _whole(values):
        return found[values[1:-1]]
    if isinstance(values, Mapping):
        return {key: filled(value, found) for key, value in values.items()}
    return values


def _whole(text: str) -> bool:
    """Whether a string is a stage's name in braces and nothing else: {pi} in a prompt is none."""
    return _PLACE.fullmatch(text) is not None
