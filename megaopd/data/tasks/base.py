"""What a task is: it may generate questions, and it verifies answers."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from megaopd.errors import UserError

Split = Literal["train", "test"]

TEST_SHARE = 20  # one question in 20 is held out
MAX_DRAWS = 2000  # 0.95 ** 2000 is below 1e-44: no such question exists


@dataclass(frozen=True)
class Example:
    """A generated question, its answer, and what the verifier needs beyond the answer."""

    prompt: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A source of questions and a judge of answers."""

    name: str

    def example(self, index: int, seed: int, split: Split) -> Example:
        """Question `index`: a function of these three alone, so that a cursor is one integer.

        Raises:
            UserError: the task only verifies.
        """
        ...

    def verify(self, response: str, answer: str, meta: Mapping[str, Any]) -> float:
        """Reward in [0, 1] of a response; bad text gets 0, never an exception."""
        ...


def stable_hash(*parts: object) -> int:
    """64-bit hash that is the same in every process and Python version."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def held_out(prompt: str) -> bool:
    """Whether a question belongs to the test split: by its text, so the splits are disjoint."""
    return stable_hash("held out", prompt) % TEST_SHARE == 0


def draw_in_split(draw: Callable[[int], Example], split: Split) -> Example:
    """The first of draw(0), draw(1), ... whose question lies in the split.

    Raises:
        UserError: the task is so small that the split holds no question.
    """
    for attempt in range(MAX_DRAWS):
        example = draw(attempt)
        if held_out(example.prompt) == (split == "test"):
            return example
    raise UserError(
        f"no {split} question in {MAX_DRAWS} draws, the last one {example.prompt!r}",
        fix="take a task with more questions",
    )
