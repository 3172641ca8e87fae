"""Samples -> one padded batch of fixed shape, and the rows of tokens that are cut out of it.

Shapes: N samples, S positions, B rows of a micro-batch. Response token t of a sample with P prompt
tokens is predicted by the logits at row P-1+t, and everything per response token (mask, log-probs)
stands at that row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megaopd.data.types import Sample
from megaopd.errors import UserError


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded samples; every tensor is [N, S] but `lengths`."""

    tokens: torch.Tensor  # int64: prompt, response, padding
    position_ids: torch.Tensor  # int64: 0..S-1 in every row
    labels: torch.Tensor  # int64: labels[:, s] = tokens[:, s+1]; pad_id in the last column
    loss_mask: torch.Tensor  # bool: this logit row predicts a token the student sampled
    rollout_log_probs: torch.Tensor  # float32: of that token; 0 where absent
    lengths: torch.Tensor  # int64 [N]: prompt + response
    sources: torch.Tensor  # int64: which sample and row of it, see `source`; -1: padding


def source(sample: int, row: int = 0) -> int:
    """Row `row` of sample number `sample` as one number; row p predicts token p + 1."""
    return (sample << 32) + row


def split_source(sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples and the rows that `source` joined; of padding, sample -1."""
    return sources >> 32, sources & 0xFFFFFFFF


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not below `number`."""
    return -(-number // multiple) * multiple


def pad_batch(
    samples: Sequence[Sample], *, pad_id: int, multiple_of: int = 1, length: int | None = None
) -> PaddedBatch:
    """Pad samples on the right to the longest, rounded up to `multiple_of`, or to `length`.

    `multiple_of` is what tensor and context parallelism divide the sequence by.

    Raises:
        UserError: a sample is longer than `length`, or `length` is not a multiple. Nothing is cut:
            a shorter response would be a response that was never sampled.
    """
    longest = max((len(sample.tokens) for sample in samples), default=1)
    size = length if length is not None else round_up(longest, multiple_of)
    if longest > size:
        raise UserError(
            f"a sample of {longest} tokens for sequences of {size}",
            fix="raise trainer.max_sequence, or lower data.max_prompt_tokens or "
            "rollout.max_new_tokens",
        )
    if size % multiple_of:
        raise UserError(f"sequence length {size}", expected=f"a multiple of {multiple_of}")

    shape = (len(samples), size)
    tokens = torch.full(shape, pad_id, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    log_probs = torch.zeros(shape, dtype=torch.float32)
    sources = torch.full(shape, -1, dtype=torch.int64)
    for row, sample in enumerate(samples):
        count = len(sample.tokens)
        tokens[row, :count] = torch.tensor(sample.tokens)
        sources[row, :count] = source(row) + torch.arange(count)
        start = len(sample.prompt.token_ids) - 1
        rows = slice(start, start + len(sample.response_ids))
        mask = sample.loss_mask
        loss_mask[row, rows] = True if mask is None else torch.tensor(mask, dtype=torch.bool)
        if sample.log_probs is not None:
            log_probs[row, rows] = torch.tensor(sample.log_probs, dtype=torch.float32)

    labels = torch.full(shape, pad_id, dtype=torch.int64)
    labels[:, :-1] = tokens[:, 1:]
    return PaddedBatch(
        tokens=tokens,
        position_ids=torch.arange(size).expand(shape).contiguous(),
        labels=labels,
        loss_mask=loss_mask,
        rollout_log_probs=log_probs,
        lengths=torch.tensor([len(sample.tokens) for sample in samples], dtype=torch.int64),
        sources=sources,
    )


@dataclass(frozen=True)
class Rows:
    """The rows of one micro-batch, as places in the step's padded samples."""

    source: torch.Tensor  # int64 [B, S]: sample * L + position; -1: padding
    position_ids: torch.Tensor  # int64 [B, S]: from 0 in every sequence
    bounds: tuple[int, ...] | None  # 0, ..., S: where packed sequences begin and end; None: B rows


def padded_rows(which: Sequence[int], length: int) -> Rows:
    """One sample a row, each padded to `length`."""
    positions = torch.arange(length).expand(len(which), length).contiguous()
    return Rows(torch.tensor(which)[:, None] * length + positions, positions, None)


def packed_rows(which: Sequence[int], lengths: Sequence[int], *, length: int, budget: int) -> Rows:
    """Samples one behind the other in a single row of `budget` tokens.

    What is left over are sequences of padding, none longer than the longest sample: attention is
    quadratic in the length of a sequence.

    Args:
        lengths: tokens of each sample of the step, rounded up to what every sequence has to be a
            multiple of.
        length: L, the width of the step's padded samples.
    """
    sizes = [lengths[i] for i in which]
    left = budget - sum(sizes)
    assert left >= 0, "the plan keeps to the budget"
    most = max(sizes, default=min(lengths, default=budget))
    fill = [most] * (left // most) + ([left % most] if left % most else [])
    positions = [torch.arange(size) for size in (*sizes, *fill)]
    source = [i * length + at for i, at in zip(which, positions, strict=False)]
    source += [torch.full((size,), -1) for size in fill]
    bounds = (0, *torch.tensor([*sizes, *fill]).cumsum(0).tolist())
    return Rows(torch.cat(source)[None], torch.cat(positions)[None], bounds)
