"""Token weights: each reduction against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaopd.errors import UserError
from megaopd.losses import LOSS_AGG, loss_weights

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("loss_agg", "options", "expected"),
    [
        ("token-mean", {}, [[1 / 4, 1 / 4, 1 / 4, 0], [0, 1 / 4, 0, 0], [0] * 4]),
        ("token-mean", {"denominator": 8}, [[1 / 8, 1 / 8, 1 / 8, 0], [0, 1 / 8, 0, 0], [0] * 4]),
        ("seq-mean-token-mean", {}, [[1 / 9, 1 / 9, 1 / 9, 0], [0, 1 / 3, 0, 0], [0] * 4]),
        ("seq-mean-token-sum", {}, [[1 / 3, 1 / 3, 1 / 3, 0], [0, 1 / 3, 0, 0], [0] * 4]),
        (
            "seq-mean-token-sum-norm",
            {"max_length": 10, "num_samples": 2},
            [[0.05, 0.05, 0.05, 0], [0, 0.05, 0, 0], [0] * 4],
        ),
    ],
)
def test_definitions(loss_agg, options, expected):
    weights = loss_weights(MASK, loss_agg=loss_agg, **options)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_list_of_masks_is_padded_on_the_right():
    weights = loss_weights([MASK[0, :3], MASK[1, :2], MASK[2, :1]])
    torch.testing.assert_close(weights, loss_weights(MASK)[:, :3])


def test_sample_weights_scale_rows_and_no_denominator():
    weights = loss_weights(MASK, sample_weights=torch.tensor([2.0, 0.0, 1.0]))
    torch.testing.assert_close(weights, loss_weights(MASK) * torch.tensor([[2.0], [0.0], [1.0]]))


@pytest.mark.parametrize("loss_agg", LOSS_AGG)
def test_a_step_without_tokens_is_zero(loss_agg):
    options = {"max_length": 4} if loss_agg.endswith("norm") else {}
    assert loss_weights(torch.zeros(3, 4), loss_agg=loss_agg, **options).abs().sum() == 0
    assert loss_weights(torch.zeros(0, 4), loss_agg=loss_agg, **options).shape == (0, 4)
    assert loss_weights([], loss_agg=loss_agg, **options).numel() == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=8))
def test_means_are_means(rows):
    mask = torch.tensor(rows)
    total = loss_weights(mask).sum().item()
    assert total == pytest.approx(1.0 if mask.any() else 0.0, abs=1e-5)
    by_sample = loss_weights(mask, loss_agg="seq-mean-token-mean").sum(1)
    torch.testing.assert_close(by_sample, mask.any(1).float() / len(rows))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_agg": "mean"}, "'token-mean', 'seq-mean-token-mean'"),
        ({"loss_agg": "seq-mean-token-sum-norm"}, "without max_length"),
        ({"num_samples": 3}, "num_samples=3"),
        ({"loss_agg": "seq-mean-token-sum", "denominator": 3.0}, "denominator=3.0"),
        ({"denominator": 0.0}, "> 0"),
        ({"sample_weights": torch.ones(2)}, "sample_weights of shape"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(UserError, match=words):
        loss_weights(MASK, **options)
