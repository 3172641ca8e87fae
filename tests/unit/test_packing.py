"""Sample checks, and the row at which everything of a response token stands."""

import math
import random

import pytest
import torch

from megaopd.data.balance import packed_plan, padded_plan
from megaopd.data.packing import packed_rows, pad_batch, padded_rows
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


@pytest.mark.parametrize("micro_batches_of", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_packed_plans_keep_to_the_budget_and_balance(ranks, micro_batches_of):
    rng = random.Random(ranks)
    for _ in range(20):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 60))]
        plan = packed_plan(lengths, ranks=ranks, budget=128, micro_batches_of=micro_batches_of)
        assert plan == packed_plan(
            lengths, ranks=ranks, budget=128, micro_batches_of=micro_batches_of
        )
        counts = {len(rank) for rank in plan}
        assert len(counts) == 1 and counts.pop() % micro_batches_of == 0
        assert sorted(i for rank in plan for one in rank for i in one) == list(range(len(lengths)))
        loads = [[sum(lengths[i] for i in one) for one in rank] for rank in plan]
        assert max(max(rank) for rank in loads) <= 128
        # No more rows than a bin-packing bound: at most one in the optimum's neighbourhood is lost.
        rows, step = len(plan[0]) * ranks, ranks * micro_batches_of
        best = -(-sum(lengths) // (128 * step)) * step
        assert rows <= max(step, math.ceil(1.5 * best / step) * step + step)
        totals = [sum(rank) for rank in loads]
        assert max(totals) - min(totals) <= 128


def test_even_bins_by_longest_first_and_tight_ones_where_they_must_be():
    # 5 | 4, 3 | 5 3 | 4 3 3: the fuller bin goes to the first rank.
    assert packed_plan([5, 4, 3, 3, 3], ranks=2, budget=20, micro_batches_of=1) == [
        [[1, 2, 4]],
        [[0, 3]],
    ]
    # 6+4 and 5+3+2 fit; longest first into the emptier bin does not: 6+3, 5+4, and no room for 2.
    assert packed_plan([6, 5, 4, 3, 2], ranks=1, budget=10, micro_batches_of=1) == [
        [[0, 2], [1, 3, 4]]
    ]
    assert packed_plan([3], ranks=2, budget=4, micro_batches_of=2) == [[[0], []], [[], []]]
    with pytest.raises(UserError, match="a sample of 21 tokens with micro-batches of 20"):
        packed_plan([5, 21], ranks=1, budget=20, micro_batches_of=1)


def test_padded_plans_are_filled_up_with_copies():
    assert padded_plan(5, ranks=2, micro_batch_size=2, micro_batches_of=1) == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
    ]
    assert padded_plan(3, ranks=1, micro_batch_size=1, micro_batches_of=2) == [[[0], [1], [2], [3]]]


def test_packed_rows_point_at_the_padded_samples():
    rows = packed_rows([2, 0], [4, 2, 6], length=8, budget=16)
    assert rows.bounds == (0, 6, 10, 16)
    assert rows.source.tolist() == [[16, 17, 18, 19, 20, 21, 0, 1, 2, 3, *[-1] * 6]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]
    # Padding is cut into sequences no longer than the longest sample; an empty row is padding only.
    assert packed_rows([1], [4, 2], length=4, budget=8).bounds == (0, 2, 4, 6, 8)
    empty = packed_rows([], [4, 2], length=4, budget=5)
    assert empty.bounds == (0, 2, 4, 5) and empty.source.tolist() == [[-1] * 5]
    assert padded_rows([1, 2], 3).source.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert padded_rows([1, 2], 3).bounds is None
