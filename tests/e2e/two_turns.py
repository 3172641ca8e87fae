"""A plugin: addition in two turns, for runs whose prompts begin episodes."""

from collections.abc import Mapping
from typing import Any

from megaopd import extend
from megaopd.data.tasks import get_task
from megaopd.data.tasks.base import Example, Split
from megaopd.data.tasks.environments import Step
from megaopd.data.types import Prompt


class Asked:
    """Pays for the right sum in the first turn, asks again, and ends."""

    def __init__(self, task: "TwoTurns", prompt: Prompt) -> None:
        self.task, self.prompt, self.turns = task, prompt, 0

    def reset(self, seed: int) -> str:
        self.turns = 0
        return self.prompt.text

    def step(self, text: str) -> Step:
        self.turns += 1
        right = self.task.verify(text, self.prompt.answer or "", {})
        return Step("?", right if self.turns == 1 else 0.0, done=self.turns == 2)


@extend.task("two_turns_of_addition")
class TwoTurns:
    def __init__(self, size: str) -> None:
        self.name, self.plain = f"two_turns_of_addition{size}", get_task(f"addition{size}")

    def example(self, index: int, seed: int, split: Split) -> Example:
        return self.plain.example(index, seed, split)

    def verify(self, response: str, answer: str, meta: Mapping[str, Any]) -> float:
        return self.plain.verify(response, answer, meta)

    def environment(self, prompt: Prompt) -> Asked:
        return Asked(self, prompt)
