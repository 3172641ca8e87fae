"""Tasks that take several turns: the student writes, the environment answers, until it is done.

A task whose prompts are the first observation of an environment is an `EnvironmentTask`. The loop
that plays it is rollout/agent.py.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from megaopd.data.tasks.base import Task
from megaopd.data.types import Prompt
from megaopd.errors import UserError


@dataclass(frozen=True)
class Step:
    """What an environment answers to one turn."""

    observation: str  # shown to the student before its next turn; nobody sees it where done
    reward: float  # of this turn; those of an episode add up to something in [0, 1]
    done: bool


class Environment(Protocol):
    """A world of text for one episode.

    Its methods are called one at a time, but by any thread, and they may be given up in the middle
    when they take too long. Model text is data: it is never run, nor repeated in an observation,
    where it could forge a turn.
    """

    def reset(self, seed: int) -> str:
        """Begin anew; the first observation, which is a function of `seed` alone."""
        ...

    def step(self, text: str) -> Step:
        """The answer to the student's turn. Any text is allowed; a bad one is no exception."""
        ...


@runtime_checkable
class EnvironmentTask(Task, Protocol):
    """A task whose prompts begin episodes. `meta["seed"]` of a prompt is what resets it."""

    def environment(self, prompt: Prompt) -> Environment:
        """A new one for an episode that begins with `prompt`; the caller resets it."""
        ...


def seed_of(prompt: Prompt) -> int:
    """What resets the environment of an episode that begins with `prompt`; 0 where it needs none.

    Raises:
        UserError: it is no integer.
    """
    seed = prompt.meta.get("seed", 0)
    if not isinstance(seed, int):
        raise UserError(f"prompt {prompt.id!r}: seed = {seed!r}", expected="an integer")
    return seed
