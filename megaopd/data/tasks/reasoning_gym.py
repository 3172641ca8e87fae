"""Any task of the reasoning-gym library: generated questions and the library's own scorers.

Some of its scorers call eval (sympy's parse_expr is one) on the answer. Text that a model wrote is
not evaluated here: those tasks score only answers that match a harmless pattern, or are refused.
"""

import difflib
import math
import random
import re
from collections.abc import Mapping
from typing import Any

from megaopd.data.tasks.base import Example, Split, draw_in_split, stable_hash
from megaopd.errors import UserError

# No names can be called, no attribute reached, no power taken.
_ARITHMETIC = re.compile(r"(?!.*\*\*)[0-9+\-*/() .]{1,300}")
_LISTS = re.compile(r"(?!.*\bfor\b)[\w\s,\[\]'\"]{0,20000}", re.DOTALL)
SAFE_ANSWERS: dict[str, re.Pattern[str]] = {
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "binary_matrix": _LISTS,
    "n_queens": _LISTS,
    "spiral_matrix": _LISTS,
    "string_insertion": _LISTS,
}
_SIZE = 1000  # read only by tasks that count their items
# Their answers need function names, and with those eval can run anything.
REFUSED = ("intermediate_integration", "polynomial_multiplication", "simple_integration")


class ReasoningGymTask:
    """One reasoning-gym dataset with its default configuration."""

    def __init__(self, name: str) -> None:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        self.name, self.dataset_name = f"reasoning_gym:{name}", name
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, 3)
            raise UserError(
                f"no reasoning-gym task {name!r}",
                expected=f"one of its {len(DATASETS)} tasks",
                fix="did you mean " + ", ".join(near or ["chain_sum"]) + "?",
            )
        if name in REFUSED:
            raise UserError(
                f"reasoning-gym task {name!r} scores with eval on the model's text",
                expected="a task whose scorer does not run what the model wrote",
            )
        try:
            # Seed 0 always: item i of seed s is item i+1 of seed s-1, so seeds would overlap.
            self._dataset: Any = reasoning_gym.create_dataset(name, seed=0, size=_SIZE)
        except (AssertionError, TypeError, ValueError) as err:
            raise UserError(f"reasoning-gym task {name!r} needs settings: {err}") from err

    def example(self, index: int, seed: int, split: Split) -> Example:
        """Question `index`: the item that a hash of (seed, index) points at, within the split."""

        def draw(attempt: int) -> Example:
            item = stable_hash(self.name, seed, index, attempt) % 2**31
            entry = self._entry(item)
            meta = {"question": entry["question"], "metadata": entry["metadata"]}
            return Example(entry["question"], str(entry["answer"]), meta)

        return draw_in_split(draw, split)

    def _entry(self, item: int) -> dict[str, Any]:
        state = random.getstate()
        random.seed(item)  # list_functions draws from the global generator
        try:
            return self._dataset[item]
        except IndexError:  # a few tasks hold a list of `size` items
            return self._dataset[item % _SIZE]
        finally:
            random.setstate(state)

    def verify(self, response: str, answer: str, meta: Mapping[str, Any]) -> float:
        """The library's score of the text in the last <answer> tag, or of the whole response."""
        from reasoning_gym.utils import extract_answer

        text = extract_answer(response) if "<answer>" in response else response.strip()
        safe = SAFE_ANSWERS.get(self.dataset_name)
        if text is None or (safe is not None and not safe.fullmatch(text)):
            return 0.0
        entry = {"question": meta.get("question", ""), "answer": answer, **meta}
        try:
            score = float(self._dataset.score_answer(text, entry))
        except Exception:
            # A hundred third-party scorers, any of which may trip over a model's text.
            return 0.0
        return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0
