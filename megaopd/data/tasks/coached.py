"""Addition for self-distillation by what the teacher sees; what a model must have learnt to read.

    coached_addition2  "23+34="               -> "57."    nothing, a fifth of the questions
                       "57.?23+34="           -> "57."    the answer in front
                       "3+4=7,2+3=5?23+34="   -> "57."    the solution
                       "3+-=7,--3=-?23+34="   -> "57."    half of its characters masked
                       "23+34=3+4=7,2+3=5="   -> "57."    the solution behind, as thoughts
    worked_addition2   "23+34="               -> "7,57."  the last digit first, then the answer
    brief_addition2    every second question with "?" in front -> "57."

worked and brief are right by what stands behind the comma: the "?" asks for a shorter response.
"""

import random
from collections.abc import Mapping
from typing import Any, Literal

from megaopd.data.config import DataConfig
from megaopd.data.privileged import masked
from megaopd.data.tasks.arithmetic import ArithmeticTask
from megaopd.data.tasks.base import Example, Split
from megaopd.data.tasks.keyed import TOLD

FRONT = TOLD  # data.teacher_text, where something stands in front
THOUGHTS = "{pi}="
BRIEF = "?{prompt}"
MASKED: dict[str, Any] = {"teacher_sees": "masked", "mask_text": "-", "mask_unit": "character"}


class CoachedTask:
    """Addition with help, or none; see the top of the file."""

    def __init__(self, size: int) -> None:
        self.plain, self.name = ArithmeticTask("addition", size), f"coached_addition{size}"

    def example(self, index: int, seed: int, split: Split) -> Example:
        found = self.plain.example(index, seed, split)
        solution, kind = found.meta["solution"], index % 5
        if kind == 0:
            return found
        if kind == 4:
            text = found.prompt + THOUGHTS.replace("{pi}", solution)
        else:
            rng = random.Random(f"coached/{seed}/{index}")
            covered = masked(solution, rng, DataConfig(source="task:addition", **MASKED))
            told = (found.answer, solution, covered)[kind - 1]
            text = FRONT.replace("{pi}", told).replace("{prompt}", found.prompt)
        return Example(text, found.answer, found.meta)

    def verify(self, response: str, answer: str, meta: Mapping[str, Any]) -> float:
        return self.plain.verify(response, answer, meta)


class WorkedTask:
    """Addition with a first step before the answer; see the top of the file."""

    def __init__(self, kind: Literal["worked", "brief"], size: int) -> None:
        self.kind, self.plain = kind, ArithmeticTask("addition", size)
        self.name = f"{kind}_addition{size}"

    def example(self, index: int, seed: int, split: Split) -> Example:
        found = self.plain.example(index, seed, split)
        if self.kind == "brief" and index % 2:
            return Example(BRIEF.replace("{prompt}", found.prompt), found.answer, found.meta)
        first = found.answer.removesuffix(".")[-1]
        return Example(found.prompt, f"{first},{found.answer}", found.meta)

    def verify(self, response: str, answer: str, meta: Mapping[str, Any]) -> float:
        """1 if what stands behind the last comma is the answer."""
        last = [text.rpartition(",")[2] for text in (response, answer)]
        return self.plain.verify(last[0], last[1], meta)
