"""Figures of an evaluation."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaopd.errors import UserError
from megaopd.report.statistics import by_prompt, figure, pass_at_k, repetition
from megaopd.schema import EvalConfig


@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_every_draw(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations(range(n), k))
    hit = sum(any(i < c for i in draw) for draw in draws)
    assert pass_at_k(n, c, k) == pytest.approx(hit / len(draws))


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = [1.0] * 300 + [0.0] * 700
    found = figure(values)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert (found.value, found.prompts) == (pytest.approx(0.3), 1000)
    assert found.low == pytest.approx(0.3 - half, abs=4e-3)
    assert found.high == pytest.approx(0.3 + half, abs=4e-3)
    assert figure(values) == found, "the resampling is seeded"


def test_repetition_is_of_trigrams():
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2]) == 0.0
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert repetition([7] * 12) == pytest.approx(9 / 10)


def test_by_prompt():
    assert by_prompt([1.0, 0.0, 1.0, 1.0], 2) == [0.5, 1.0]


@pytest.mark.parametrize("values", [{"pass_k": (2,)}, {"pass_k": (0,)}, {"samples": -1}])
def test_what_cannot_be_estimated_is_refused(values):
    with pytest.raises(UserError, match=r"eval\.(pass_k|samples)"):
        EvalConfig(**values)
