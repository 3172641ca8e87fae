"""The tasks by name. Heavy libraries are imported when a task that needs them is made."""

import difflib
import functools
import re
from collections.abc import Callable

from megaopd.data.tasks.arithmetic import ArithmeticTask
from megaopd.data.tasks.base import Example, Split, Task
from megaopd.data.tasks.coached import CoachedTask, WorkedTask
from megaopd.data.tasks.environments import Environment, EnvironmentTask
from megaopd.data.tasks.keyed import KeyedTask, ToldTask
from megaopd.data.tasks.math import MathTask
from megaopd.data.tasks.reasoning_gym import ReasoningGymTask
from megaopd.data.tasks.sokoban import SokobanTask
from megaopd.data.tasks.tools import CalculatorTask
from megaopd.data.types import Prompt
from megaopd.errors import UserError

# Family -> constructor of what follows the family in the name: a size, or ":" and a name.
TASKS: dict[str, Callable[[str], Task]] = {
    "addition": lambda size: ArithmeticTask("addition", int(size or 3)),
    "subtraction": lambda size: ArithmeticTask("subtraction", int(size or 3)),
    "addsub": lambda size: ArithmeticTask("addsub", int(size or 3)),
    "chain": lambda size: ArithmeticTask("chain", int(size or 4)),
    "hidden": lambda keys: KeyedTask("hidden", int(keys or 3)),
    "rule": lambda keys: KeyedTask("rule", int(keys or 3)),
    "shown": lambda keys: KeyedTask("shown", int(keys or 3)),
    "told_addition": lambda size: ToldTask(int(size or 2)),
    "coached_addition": lambda size: CoachedTask(int(size or 2)),
    "worked_addition": lambda size: WorkedTask("worked", int(size or 2)),
    "brief_addition": lambda size: WorkedTask("brief", int(size or 2)),
    "calculator": lambda size: CalculatorTask(int(size or 3)),
    "sokoban": lambda size: SokobanTask(int(size or 6)),
    "math": lambda _: MathTask(),
    "reasoning_gym": lambda name: ReasoningGymTask(name.removeprefix(":")),
}

__all__ = ["TASKS", "Example", "Split", "Task"]
__all__ += ["environment_task", "get_environment", "get_task", "score"]


@functools.cache
def get_task(name: str) -> Task:
    """The task `name`: "addition3", "chain4", "math", "reasoning_gym:chain_sum", ...

    Raises:
        UserError: there is none of that name; the nearest names are given.
    """
    match = re.fullmatch(r"([a-z_]+)(\d{1,3}|:\w*)?", name)
    family, rest = (match[1], match[2] or "") if match else (name, "")
    sized = family not in ("math", "reasoning_gym")
    fits = rest == "" if family == "math" else sized == (not rest.startswith(":"))
    if match is None or family not in TASKS or not fits:
        near = difflib.get_close_matches(family, TASKS, 3)
        raise UserError(
            f"no task {name!r}",
            expected="addition3, subtraction3, addsub3, chain4, hidden3, rule3, shown3, "
            "told_addition2, coached_addition2, worked_addition2, brief_addition2, calculator3, "
            "sokoban6, math or reasoning_gym:NAME",
            fix=f"did you mean {', '.join(near)}?" if near else "take one of these",
        )
    return TASKS[family](rest)


def can_score(prompt: Prompt) -> bool:
    """Whether a response to it has a reward, unless something goes wrong."""
    plain = prompt.answer is not None and bool(prompt.task)
    return plain or environment_task(prompt.task) is not None


def score(prompt: Prompt, response: str) -> float | None:
    """Reward in [0, 1] of a response to a prompt; None where the prompt cannot be scored."""
    if prompt.answer is None or not prompt.task:
        return None
    return get_task(prompt.task).verify(response, prompt.answer, prompt.meta)


def environment_task(name: str) -> EnvironmentTask | None:
    """The task of that name if its prompts begin episodes; None for others, and for ""."""
    task = get_task(name) if name else None
    return task if isinstance(task, EnvironmentTask) else None


def get_environment(prompt: Prompt) -> Environment | None:
    """A new environment for an episode that begins with `prompt`; None: its task takes one turn."""
    task = environment_task(prompt.task)
    return None if task is None else task.environment(prompt)
