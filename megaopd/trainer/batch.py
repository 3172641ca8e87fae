"""One optimizer step's samples, cut into the micro-batches of this data-parallel rank.

Shapes: N samples, B micro-batch, S sequence, T = the rows of a micro-batch that the loss looks at.
Hidden states arrive sequence-first, [S, B, H], so row s*B + b belongs to token s of sequence b.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megaopd import platform
from megaopd.data.packing import pad_batch
from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.losses import ListedTeacher, loss_weights
from megaopd.parallel import Grid
from megaopd.trainer.scores import RemoteScores


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass and its loss need; tensors on this rank's device."""

    tokens: Any  # [B, S] int64
    position_ids: Any  # [B, S] int64
    rows: Any  # [T] int64: rows of [S*B, H] with a label, or None for all of them
    labels_T: Any  # [T] int64: the token that each row predicts
    weights_T: Any  # [T] float32: mask x sample weight / denominator of the whole step
    mask_T: Any  # [T] bool
    rollout_log_probs_T: Any  # [T] float32, 0 where the rollout gave none
    has_rollout_log_probs: bool
    payload: str = "hidden"  # what of the teacher reaches the loss (objectives.validate.PAYLOADS)
    remote: ListedTeacher | None = None  # [T] rows of a teacher on servers; on the last stage
    # Made before the update where the objective asks for it (importance.py), on the last stage.
    importance_weights_T: Any = None  # [T] float32: weights_T x importance weight / what survives
    importance_sums: Any = None  # [4] float64: sum w, sum w^2, clipped or dropped, counted

    def term_weights(self, *, importance: bool) -> Any:
        """[T]: the token weights of a term, with importance weights where there are any."""
        reweighed = importance and self.importance_weights_T is not None
        return self.importance_weights_T if reweighed else self.weights_T

    def select(self, hidden: Any) -> Any:
        """[S(/TP), B, H] -> [T, H]: the rows that the loss looks at."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if self.rows is None else flat.index_select(0, self.rows)


def make_micro_batches(
    samples: Sequence[Sample],
    *,
    grid: Grid,
    micro_batch_size: int,
    pad_id: int,
    loss_agg: str,
    max_sequence: int = 0,
    remote: RemoteScores | None = None,
) -> list[MicroBatch]:
    """Pad all samples of the step, weigh their tokens together, and keep this rank's share.

    The weights are made from every sample of the step, on every rank alike: no communication, and
    the step's loss and gradient do not depend on how it is cut into ranks and micro-batches.

    A number of samples that does not divide is filled up with masked copies.

    Args:
        remote: scores of a teacher on servers; tokens that it did not score are masked.

    Raises:
        UserError: a sample is longer than max_sequence.
    """
    count = len(samples)
    fill = -count % (micro_batch_size * grid.dp_size)
    # Nothing of the copies was sampled: no spans.
    masked = replace(samples[0], loss_mask=(0,) * len(samples[0].response_ids), spans=())
    samples = [*samples, *[masked] * fill]
    longest = max(len(sample.tokens) for sample in samples)
    if max_sequence and longest > max_sequence:
        raise UserError(
            f"a sample of {longest} tokens with trainer.max_sequence = {max_sequence}",
            expected="samples that fit",
            fix="raise trainer.max_sequence, or lower rollout.max_new_tokens",
        )
    batch = pad_batch(samples, pad_id=pad_id, multiple_of=grid.sequence_multiple)
    if remote is not None:
        batch = replace(batch, loss_mask=remote.keep_scored(batch.loss_mask, samples))
    options: dict[str, Any] = {} if loss_agg == "token-mean" else {"num_samples": count}
    if loss_agg == "seq-mean-token-sum-norm":
        options["max_length"] = max_sequence
    weights = loss_weights(batch.loss_mask, loss_agg=loss_agg, **options)
    has_log_probs = all(sample.log_probs is not None for sample in samples)
    made = []
    share = share_of(grid.dp_rank, count, micro_batch_size=micro_batch_size, grid=grid)
    for i in share[::micro_batch_size]:
        which = range(i, i + micro_batch_size)
        micro = _cut(batch, weights, slice(which.start, which.stop), grid, has_log_probs)
        if remote is not None:
            listed = remote.listed(which, samples, batch.tokens.shape[1])
            micro = replace(micro, payload=remote.payload, remote=_select(listed, micro.rows))
        made.append(micro)
    return made


def share_of(dp_rank: int, count: int, *, micro_batch_size: int, grid: Grid) -> range:
    """Which of `count` samples, filled up with copies, are a data-parallel rank's."""
    share = (count + -count % (micro_batch_size * grid.dp_size)) // grid.dp_size
    return range(dp_rank * share, (dp_rank + 1) * share)


def _select(listed: ListedTeacher | None, rows: Any) -> ListedTeacher | None:
    """The rows that the loss looks at, on this rank's device."""
    if listed is None:
        return None

    def pick(x: Any) -> Any:
        if x is None:
            return None
        x = x.to(platform.device())
        return x if rows is None else x.index_select(0, rows)

    return ListedTeacher(
        pick(listed.ids), pick(listed.log_q), pick(listed.label_log_q), listed.support
    )


def _cut(batch: Any, weights: Any, which: slice, grid: Grid, has_log_probs: bool) -> MicroBatch:
    device = platform.device()
    rows_first = [
        tensor[which].t().reshape(-1)
        for tensor in (batch.labels, weights, batch.loss_mask, batch.rollout_log_probs)
    ]
    rows = None
    if not grid.config.sequence:  # a rank of a sequence-parallel group holds a part of the rows
        rows = rows_first[2].nonzero().squeeze(1)
        rows_first = [tensor.index_select(0, rows) for tensor in rows_first]
        rows = rows.to(device)
    labels, weights_T, mask, log_probs = (tensor.to(device) for tensor in rows_first)
    return MicroBatch(
        tokens=batch.tokens[which].to(device),
        position_ids=batch.position_ids[which].to(device),
        rows=rows,
        labels_T=labels,
        weights_T=weights_T,
        mask_T=mask,
        rollout_log_probs_T=log_probs,
        has_rollout_log_probs=has_log_probs,
    )
