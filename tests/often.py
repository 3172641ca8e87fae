"""Which cases of a matrix run every time; the others run with launch/test.sh --full."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def often(cases: Iterable[Any], keep: Sequence[Any]) -> list[Any]:
    """The cases (tuples of arguments, or one argument) for parametrize; slow but for `keep`."""
    cases = list(cases)
    assert all(one in cases for one in keep), f"{keep} of {cases}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in keep else pytest.mark.slow,
        )
        for case in cases
    ]
