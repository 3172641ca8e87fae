"""A Sample refuses what an engine must not hand out."""

import math
from dataclasses import replace
from typing import Any

import pytest

from megaopd.data.types import Prompt, Sample, Span
from megaopd.rollout.episode import sample_metrics

PROMPT = Prompt("p", (1, 2), "ab", None, "")


def sample(**changes: Any) -> Sample:
    whole: dict[str, Any] = {
        "prompt": PROMPT,
        "response_ids": (5, 6, 7, 8),
        "log_probs": (-1.0, -0.5, 0.0, -2.0),
        "finish_reason": "stop",
        "weight_version": 3,
    }
    return Sample(**{**whole, **changes})


def test_plain():
    made = sample()
    assert made.tokens == (1, 2, 5, 6, 7, 8)
    assert made.newest_version == made.weight_version == 3


def test_a_prompt_has_tokens():
    with pytest.raises(ValueError, match="no tokens"):
        replace(PROMPT, token_ids=())


def test_spans_in_order_over_all_tokens():
    made = sample(spans=(Span(3, 0, 1), Span(4, 1, 4)))
    assert (made.weight_version, made.newest_version) == (3, 4)
    sample(spans=(Span(3, 0, 2), Span(3, 2, 2), Span(4, 2, 4)))  # an empty one does no harm
    # The versions need not rise: a request may move to a server that is behind.
    sample(spans=(Span(4, 0, 2), Span(3, 2, 4)))


@pytest.mark.parametrize(
    "spans",
    [
        (Span(3, 0, 3),),  # a token of unknown weights
        (Span(3, 0, 2), Span(3, 3, 4)),  # a gap
        (Span(3, 0, 3), Span(3, 2, 4)),  # an overlap
        (Span(3, 2, 4), Span(3, 0, 2)),  # out of order
        (Span(3, 0, 5),),  # beyond the end
        (Span(3, 4, 0),),  # backwards
        (Span(3, -1, 3),),
        (Span(4, 0, 4),),  # not what weight_version says
        (Span(2, 0, 2), Span(3, 2, 4)),
    ],
)
def test_spans_that_do_not_fit(spans):
    with pytest.raises(ValueError, match="sample of p: spans"):
        sample(spans=spans)


def test_spans_cover_the_sampled_tokens_and_no_others():
    mask = (1, 0, 0, 1)
    sample(loss_mask=mask, spans=(Span(3, 0, 1), Span(5, 3, 4)))
    with pytest.raises(ValueError, match="2 sampled tokens"):
        sample(loss_mask=mask, spans=(Span(3, 0, 4),))


def test_no_tokens_no_spans():
    made = sample(response_ids=(), log_probs=(), finish_reason="abort")
    assert made.spans == () and made.tokens == (1, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.01])
def test_log_probs_are_finite_and_at_most_zero(value):
    with pytest.raises(ValueError, match="at token 1"):
        sample(log_probs=(-1.0, value, -1.0, -1.0))
    sample(log_probs=(1e-6, -1.0, -1.0, -1.0))  # rounding


def test_lengths():
    with pytest.raises(ValueError, match="3 log-probs for 4 tokens"):
        sample(log_probs=(-1.0,) * 3)
    with pytest.raises(ValueError, match="5 mask values for 4 tokens"):
        sample(loss_mask=(1,) * 5)
    assert sample(log_probs=None).log_probs is None


def test_the_metrics_of_samples():
    """The probability of an end token is that of responses that have one."""
    prompt, end = Prompt("p", (1,), "", None, ""), 9
    made = [
        Sample(prompt, (3, end), (-1.0, math.log(0.5)), "stop", 0, reward=1.0),
        Sample(prompt, (4, 4, end), (-1.0, -2.0, math.log(0.25)), "stop", 0),
        Sample(prompt, (5, 5, 5, 5), (-0.1,) * 4, "length", 0, reward=0.0),
    ]
    injected = Sample(prompt, (3, end), (-1.0, 0.0), "stop", 0, loss_mask=(1, 0))
    assert "eos_prob" not in sample_metrics([injected], [end])
    found = sample_metrics(made, [end])
    assert found["eos_prob"] == pytest.approx(0.375) and found["response_length"] == 3.0
    assert found["truncated"] == pytest.approx(1 / 3) and found["reward"] == 0.5
    assert "eos_prob" not in sample_metrics(made[2:], [end])
