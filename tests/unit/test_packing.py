"""Sample checks, and the row at which everything of a response token stands."""

import math

import pytest
import torch

from megaopd.data.packing import pad_batch
from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError

PAD = 99


def sample(prompt: list[int], response: list[int], **fields) -> Sample:
    fields.setdefault("log_probs", tuple(-0.5 - t for t in range(len(response))))
    return Sample(
        Prompt("p", tuple(prompt), "", None, ""),
        tuple(response),
        finish_reason="stop",
        weight_version=0,
        **fields,
    )


def test_rows_predict_response_tokens():
    samples = [
        sample([1, 2, 3], [4, 5]),
        sample([6], [7, 8, 9, 10, 11], loss_mask=(1, 1, 0, 0, 1)),
        sample([12, 13], [14], log_probs=None),
    ]
    batch = pad_batch(samples, pad_id=PAD, multiple_of=4)
    assert batch.tokens.shape == (3, 8)
    assert batch.lengths.tolist() == [5, 6, 3]
    assert batch.tokens[0].tolist() == [1, 2, 3, 4, 5, PAD, PAD, PAD]
    assert batch.labels[0].tolist() == [2, 3, 4, 5, PAD, PAD, PAD, PAD]
    assert batch.position_ids.tolist() == [list(range(8))] * 3
    assert batch.loss_mask.nonzero().tolist() == [[0, 2], [0, 3], [1, 0], [1, 1], [1, 4], [2, 1]]
    assert batch.labels[batch.loss_mask].tolist() == [4, 5, 7, 8, 11, 14]
    assert batch.rollout_log_probs[0].tolist() == [0, 0, -0.5, -1.5, 0, 0, 0, 0]
    assert batch.rollout_log_probs[1].tolist() == [-0.5, -1.5, -2.5, -3.5, -4.5, 0, 0, 0]
    assert not batch.rollout_log_probs[2].any()
    assert (batch.loss_mask.dtype, batch.rollout_log_probs.dtype, batch.tokens.dtype) == (
        torch.bool,
        torch.float32,
        torch.int64,
    )


def test_given_length_and_full_sequence():
    batch = pad_batch([sample([1, 2], [3, 4])], pad_id=PAD, length=4)
    assert batch.loss_mask.tolist() == [[False, True, True, False]]
    assert pad_batch([sample([1], [2])], pad_id=PAD, length=16).tokens.shape == (1, 16)
    assert not pad_batch([sample([1], [])], pad_id=PAD).loss_mask.any()
    assert pad_batch([], pad_id=PAD, length=8).tokens.shape == (0, 8)


def test_nothing_is_cut():
    with pytest.raises(UserError, match="a sample of 4 tokens for sequences of 3"):
        pad_batch([sample([1, 2], [3, 4])], pad_id=PAD, length=3)
    with pytest.raises(UserError, match="multiple of 4"):
        pad_batch([sample([1], [2])], pad_id=PAD, length=6, multiple_of=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"log_probs": (-1.0,)}, "1 log-probs for 2 tokens"),
        ({"log_probs": (-1.0, math.nan)}, "log-prob nan at token 1"),
        ({"log_probs": (-math.inf, -1.0)}, "log-prob -inf at token 0"),
        ({"log_probs": (-1.0, 0.01)}, "at most 0"),
        ({"loss_mask": (1,)}, "1 mask values for 2 tokens"),
    ],
)
def test_malformed_samples(fields, message):
    with pytest.raises(ValueError, match=message):
        sample([1], [2, 3], **fields)


def test_sample_tokens_and_rounding_above_zero():
    rounded = sample([1, 2], [3], log_probs=(1e-5,))
    assert rounded.tokens == (1, 2, 3)
    with pytest.raises(ValueError, match="no tokens"):
        sample([], [1])
