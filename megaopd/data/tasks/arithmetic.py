"""Digit-level arithmetic that a model of 100k parameters can learn in minutes.

    addition3      "  7+ 45="       -> "52."
    subtraction3   "  7- 45="       -> "-38."
    addsub3        either sign
    chain4         "12+30- 4+ 1="   -> "42,38,39."   running totals, a small chain of thought

The digit is the longest operand's length (for chain: the number of terms). Operands are padded to
it with spaces. "." ends an answer, as it ends a sequence of data.tokenizer.char_tokenizer.
"""

import random
from collections.abc import Mapping
from typing import Any, Literal

from megaopd.data.tasks.base import Example, Split, draw_in_split
from megaopd.errors import UserError

Kind = Literal["addition", "subtraction", "addsub", "chain"]
SIGNS: dict[str, str] = {"addition": "+", "subtraction": "-", "addsub": "+-"}


class ArithmeticTask:
    """Sums and differences; see the top of the file."""

    def __init__(self, kind: Kind, size: int) -> None:
        low, high = (2, 8) if kind == "chain" else (1, 9)
        if not low <= size <= high:
            raise UserError(
                f"task {kind}{size}",
                expected=f"{kind}{low} to {kind}{high}",
                fix=f'e.g. "task:{kind}3"',
            )
        self.kind, self.size, self.name = kind, size, f"{kind}{size}"

    def example(self, index: int, seed: int, split: Split) -> Example:
        """Question `index`; drawn uniformly, and again until it lies in the split."""
        make = self._chain if self.kind == "chain" else self._binary

        def draw(attempt: int) -> Example:
            return make(random.Random(f"{self.name}/{seed}/{index}/{attempt}"))

        return draw_in_split(draw, split)

    def verify(self, response: str, answer: str, meta: Mapping[str, Any]) -> float:
        """1 if the whole response is the answer; the closing "." may have been stripped as EOS."""
        return float(response.strip().removesuffix(".") == answer.removesuffix("."))

    def _binary(self, rng: random.Random) -> Example:
        a, b = rng.randrange(10**self.size), rng.randrange(10**self.size)
        sign = rng.choice(SIGNS[self.kind])
        result = a + b if sign == "+" else a - b
        meta = {"solution": columns(a, b)} if self.kind == "addition" else {}
        return Example(f"{a:>{self.size}}{sign}{b:>{self.size}}=", f"{result}.", meta)

    def _chain(self, rng: random.Random) -> Example:
        total = rng.randrange(100)
        text, totals = f"{total:>2}", []
        for _ in range(self.size - 1):
            term, sign = rng.randrange(100), rng.choice("+-")
            total = total + term if sign == "+" else total - term
            text += f"{sign}{term:>2}"
            totals.append(str(total))
        return Example(text + "=", ",".join(totals) + ".")


def columns(a: int, b: int) -> str:
    """Addition by columns from the right, carries included: columns(18, 27) is "8+7=15,1+2+1=4"."""
    parts, carry = [], 0
    while a or b or not parts:
        digits = [a % 10, b % 10, *([carry] if carry else [])]
        parts.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
        a, b, carry = a // 10, b // 10, sum(digits) // 10
    return ",".join(parts)
