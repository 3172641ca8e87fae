"""`megaopd recipe`: a method's recipe on a laptop, judged by the metric that it names."""

import copy
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from megaopd.config import apply_overrides
from megaopd.errors import UserError
from megaopd.recipes import Variant, filled, method, methods, places
from megaopd.schema import Config, make_config
from megaopd.study.stages import Stages


def run_tiny(
    name: str,
    root: Path,
    seed: int,
    overrides: Sequence[str] = (),
    stages: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a method's tiny variant after its stages, in this process.

    Args:
        name: of a method, or the path of a recipe of one's own.
        stages: overrides of every stage that trains or samples.

    Returns:
        method, seed, every evaluated figure before and after, seconds, and the folder of the run.
    """
    one = method(name)
    values = apply_overrides(one.values("tiny"), overrides)
    check(values)
    made = Stages(root / f"seed_{seed}", seed, overrides=stages)
    summary = made.run(one.name, values)
    return {
        "method": one.name,
        "seed": seed,
        **{when: figures(summary, when) for when in ("before", "after")},
        "seconds": summary["seconds"],
        "dir": summary["dir"],
    }


def figures(summary: Mapping[str, Any], when: str) -> dict[str, float]:
    """What a run's evaluations found before or after it, by name."""
    end = f"_{when}"
    return {k.removesuffix(end): v for k, v in summary.items() if k.endswith(end)}


def as_toml(name: str, variant: Variant, overrides: Sequence[str] = ()) -> str:
    """A method's values as the TOML of a run; {NAME} stands for what a stage makes."""
    one = method(name)
    values = apply_overrides(one.values(variant), overrides)
    check(values)
    about = [text for text in (one.about, one.note) if text]
    lines = [line for text in about for line in textwrap.wrap(text, 96, break_on_hyphens=False)]
    return "".join(f"# {line}\n" for line in lines) + tomli_w.dumps(values)


def check(values: Mapping[str, Any]) -> Config:
    """The Config of a method's values, whatever its stages make. UserError where there is none."""
    stood_for = {name: f"<{name}>" for name in places(values)}
    return make_config(copy.deepcopy(filled(values, stood_for)))


def table() -> Any:
    """Every method in a line, for the console."""
    from rich.table import Table

    made = Table("method", "what", "metric", "baseline", box=None)
    arrow = {"up": "\N{UPWARDS ARROW}", "down": "\N{DOWNWARDS ARROW}", "none": ""}
    for name in methods():
        one = method(name)
        made.add_row(name, one.about, f"{one.metric} {arrow[one.direction]}", one.baseline)
    return made


def command(
    name: str,
    variant: Variant,
    root: Path,
    seed: int,
    overrides: Sequence[str],
    *,
    stages: Sequence[str] = (),
    show: bool,
) -> int:
    """What the command line asks for."""
    if show:
        print(as_toml(name, variant, overrides), end="")
        return 0
    if variant == "full":
        raise UserError(
            "a full variant is a run of its own",
            expected="--show, which prints its TOML",
            fix=f"megaopd recipe {name} --variant full --show > run.toml, put in your paths, and "
            "megaopd train --config run.toml",
        )
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    found = run_tiny(name, root, seed, overrides, stages)
    metric = method(name).metric
    print(
        f"{found['method']}: {metric} {found['before'][metric]:.4f} -> {found['after'][metric]:.4f}"
    )
    print(f"megaopd report {found['dir']}")
    return 0
