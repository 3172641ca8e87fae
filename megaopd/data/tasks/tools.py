"""Tools that the student calls in its turns, and a task that wants one.

    calculator3    "Compute 417 * 38 - 250. ..."; the number is how many terms there are

The student writes <tool>12*7</tool>, the environment answers <result>84</result>, and a turn
without a call is the final answer.
"""

import ast
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

from megaopd.data.tasks.base import Example, Split, draw_in_split
from megaopd.data.tasks.environments import Step
from megaopd.data.types import Prompt
from megaopd.errors import UserError

CALLS_PER_TURN = 8
INSTRUCTIONS = """Compute {question}.
You may use a calculator: <tool>12*7</tool> is answered by <result>84</result>.
Give the number that you arrive at as <answer>84</answer>."""

_CALL = re.compile(r"<tool>(.*?)</tool>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]{0,99}(?:\.\d{1,100})?(?:/\d{1,100})?")


class ToolError(Exception):
    """A call that cannot be answered; the student is told why."""


class Tool(Protocol):
    """Something that answers a line of text, the same each time."""

    name: str

    def call(self, text: str) -> str:
        """The result.

        Raises:
            ToolError: the text is not what the tool takes.
        """
        ...


class Calculator:
    """Exact arithmetic with + - * / // % ** and parentheses. Nothing of the text is evaluated."""

    name = "calculator"
    longest = 200  # characters
    bits = 4096  # of a numerator or a denominator; bounds the time as well

    _spellings = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-", "^": "**"})
    _allowed = re.compile(r"[0-9+\-*/%(). ]+")
    _operators: Mapping[type, Callable[[Any, Any], Any]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
    }

    def call(self, text: str) -> str:
        return self.show(self.value(text))

    def value(self, text: str) -> Fraction:
        text = " ".join(text.split()).translate(self._spellings)
        if len(text) > self.longest:
            raise ToolError(f"more than {self.longest} characters")
        if not self._allowed.fullmatch(text):
            raise ToolError("only numbers, + - * / // % ** and parentheses")
        try:
            return self._value(ast.parse(text, mode="eval").body)
        except (SyntaxError, RecursionError, MemoryError):
            raise ToolError("not an arithmetic expression") from None
        except ZeroDivisionError:
            raise ToolError("division by zero") from None

    def show(self, value: Fraction) -> str:
        """Whole numbers in full, others as decimals of 12 digits."""
        if value.denominator == 1:
            return str(value.numerator)
        try:
            return f"{float(value):.12g}"
        except OverflowError:
            raise ToolError("the result is too large") from None

    def _value(self, node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return self._bounded(Fraction(str(node.value)))  # 0.1 is a tenth
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            value = self._value(node.operand)
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.BinOp):
            left, right = self._value(node.left), self._value(node.right)
            if isinstance(node.op, ast.Pow):
                return self._power(left, right)
            if type(node.op) in self._operators:
                return self._bounded(Fraction(self._operators[type(node.op)](left, right)))
        raise ToolError("not an arithmetic expression")

    def _power(self, base: Fraction, exponent: Fraction) -> Fraction:
        if exponent.denominator != 1:
            raise ToolError("exponents must be whole numbers")
        if _bits(base) * abs(exponent.numerator) > self.bits:
            raise ToolError("the result is too large")
        return self._bounded(base**exponent.numerator)

    def _bounded(self, value: Fraction) -> Fraction:
        if _bits(value) > self.bits:
            raise ToolError("the result is too large")
        return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


class ToolEnvironment:
    """A question and tools. A turn that calls none is the answer, and ends the episode.

    With one tool, a call is its text; with several, it begins with the tool's name.

    Args:
        judge: reward in [0, 1] of the last turn's text.
    """

    def __init__(self, question: str, tools: Sequence[Tool], judge: Callable[[str], float]) -> None:
        self._question, self._judge = question, judge
        self._tools = {tool.name: tool for tool in tools}

    def reset(self, seed: int) -> str:
        return self._question

    def step(self, text: str) -> Step:
        calls = _CALL.findall(text)
        if not calls:
            return Step("", self._judge(text), True)
        results = [self._call(call) for call in calls[:CALLS_PER_TURN]]
        if len(calls) > CALLS_PER_TURN:
            results.append(f"error: more than {CALLS_PER_TURN} calls in one turn")
        return Step("\n".join(f"<result>{result}</result>" for result in results), 0.0, False)

    def _call(self, text: str) -> str:
        text = text.strip()
        name = next(iter(self._tools))
        if len(self._tools) > 1:
            name, _, text = text.partition(" ")
        try:
            if name not in self._tools:
                raise ToolError(f"no such tool; there are {', '.join(self._tools)}")
            return self._tools[name].call(text)
        except ToolError as err:
            return f"error: {err}"


class CalculatorTask:
    """Arithmetic that is hard without a calculator. Its tool also serves any numeric question:
    lines of a JSONL file with an answer and {"task": "calculator"}.
    """

    def __init__(self, terms: int) -> None:
        if not 2 <= terms <= 9:
            raise UserError(f"task calculator{terms}", expected="calculator2 to calculator9")
        self.terms, self.name = terms, f"calculator{terms}"
        self._calculator = Calculator()

    def example(self, index: int, seed: int, split: Split) -> Example:
        def draw(attempt: int) -> Example:
            rng = random.Random(f"{self.name}/{seed}/{index}/{attempt}")
            question = str(rng.randrange(10, 1000))
            for _ in range(self.terms - 1):
                question += f" {rng.choice('+-*')} {rng.randrange(10, 1000)}"
            return Example(
                INSTRUCTIONS.format(question=question),
                self._calculator.call(question),
                {"question": question},
            )

        return draw_in_split(draw, split)

    def verify(self, response: str, answer: str, meta: Mapping[str, Any]) -> float:
        """1 if the number in the last <answer> is right; without one, the last number counts."""
        tagged = _ANSWER.findall(response)
        found = _NUMBER.findall(tagged[-1] if tagged else response[-1000:])
        wanted = _NUMBER.findall(answer)
        if not found or not wanted:
            return 0.0
        try:
            return float(_fraction(found[-1]) == _fraction(wanted[-1]))
        except ZeroDivisionError:
            return 0.0

    def environment(self, prompt: Prompt) -> ToolEnvironment:
        def judge(text: str) -> float:
            return self.verify(text, prompt.answer or "", prompt.meta)

        return ToolEnvironment(prompt.text, [self._calculator], judge)


def _fraction(text: str) -> Fraction:
    """Of "1,234", "1.5" or "3/4"."""
    whole, _, below = text.replace(",", "").partition("/")
    return Fraction(whole) / Fraction(below or 1)
