"""Questions for self-distillation: the teacher may be told what the student cannot know, or a rule.

    hidden3        "47+5="     -> "4."   the last digit of the sum plus a key below 3 that is drawn
                                         for each question and stands in none
    rule3          the same with the key 2 for every question: what is not told can be learnt
    shown3         "2?47+5="   -> "4."   the key in front; every second time left out
    told_addition2 "57.?23+34=" -> "57." addition with the answer or the solution in front, or
                                         neither, a third each

hidden and rule have the key as their `solution`, which data.teacher_sees=solution shows the
teacher. A student that cannot see it is drawn to the geometric mean of the teacher's laws over the
keys: of hidden, to nothing; of rule, to the law that knows the rule.
"""

import random
from collections.abc import Mapping
from typing import Any, Literal

from megaopd.data.tasks.arithmetic import ArithmeticTask
from megaopd.data.tasks.base import Example, Split, draw_in_split
from megaopd.errors import UserError

Kind = Literal["hidden", "rule", "shown"]
TOLD = "{pi}?{prompt}"  # as data.teacher_text has it


class KeyedTask:
    """Last digits of sums with a key; see the top of the file."""

    def __init__(self, kind: Kind, keys: int) -> None:
        if not 2 <= keys <= 10:
            raise UserError(f"task {kind}{keys}", expected=f"{kind}2 to {kind}10")
        self.kind, self.keys, self.name = kind, keys, f"{kind}{keys}"

    def example(self, index: int, seed: int, split: Split) -> Example:
        """Question `index`; its split goes by the sum alone, whatever the key."""

        def draw(attempt: int) -> Example:
            rng = random.Random(f"keyed/{seed}/{index}/{attempt}")
            a, b, key = rng.randrange(100), rng.randrange(10), rng.randrange(self.keys)
            key = self.keys - 1 if self.kind == "rule" else key
            answer = f"{(a + b + key) % 10}."
            return Example(f"{a:>2}+{b}=", answer, {"solution": str(key)})

        found = draw_in_split(draw, split)
        if self.kind == "shown" and index % 2:
            told = TOLD.replace("{pi}", found.meta["solution"]).replace("{prompt}", found.prompt)
            return Example(told, found.answer, found.meta)
        return found

    def verify(self, response: str, answer: str, meta: Mapping[str, Any]) -> float:
        """1 if the whole response is the answer."""
        return float(response.strip().removesuffix(".") == answer.removesuffix("."))


class ToldTask:
    """Addition with help in front; see the top of the file."""

    def __init__(self, size: int) -> None:
        self.plain, self.name = ArithmeticTask("addition", size), f"told_addition{size}"

    def example(self, index: int, seed: int, split: Split) -> Example:
        found = self.plain.example(index, seed, split)
        help_ = (None, found.answer, found.meta["solution"])[index % 3]
        if help_ is None:
            return found
        told = TOLD.replace("{pi}", help_).replace("{prompt}", found.prompt)
        return Example(told, found.answer, found.meta)

    def verify(self, response: str, answer: str, meta: Mapping[str, Any]) -> float:
        return self.plain.verify(response, answer, meta)
