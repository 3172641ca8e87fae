"""The student's own log-probs of given tokens: a forward pass without gradients.

Shapes: T the rows of a micro-batch that the loss looks at.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from megaopd.data.types import Prompt, Sample
from megaopd.losses import fused_linear_log_prob
from megaopd.parallel import Grid, sum_from_last_stage
from megaopd.trainer.batch import MicroBatch, make_micro_batches
from megaopd.trainer.step import forward_micro_batch, run_schedule


def token_log_probs(
    model: Any,
    output_weight: Any,
    grid: Grid,
    micro_batches: Sequence[MicroBatch],
    *,
    vocab: int,
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> list[Any]:
    """[T] log-probs of labels_T at temperature 1 per micro-batch; None where not last stage.

    A collective over the model's ranks.
    """
    import torch

    def forward_step(iterator: Iterator[MicroBatch], stage: Any) -> tuple[Any, Any]:
        micro = next(iterator)
        return forward_micro_batch(stage, micro), partial(log_prob, micro)

    def log_prob(micro: MicroBatch, hidden: Any, non_loss_data: bool = True) -> Any:
        return fused_linear_log_prob(
            micro.select(hidden),
            output_weight(),
            micro.labels_T,
            group=grid.groups.tp,
            vocab_size=vocab,
            chunk_size=chunk_size,
            sequence_parallel=grid.config.sequence,
            softcap=softcap,
        )

    with torch.no_grad():
        made = run_schedule(
            model, grid, micro_batches, forward_step, forward_only=True, collect=True
        )
    return made or [None] * len(micro_batches)


def sequence_log_probs(
    model: Any,
    output_weight: Any,
    grid: Grid,
    token_ids: Sequence[int],
    *,
    vocab: int,
    softcap: float | None = None,
) -> tuple[float, ...]:
    """Log-probs of token_ids[1:], each given what stands before it, on every rank; a collective."""
    import torch

    prompt = Prompt("probe", tuple(token_ids[:1]), "", None, "")
    sample = Sample(prompt, tuple(token_ids[1:]), None, "length", weight_version=0)
    micro_batches = make_micro_batches(
        [sample] * grid.dp_size,
        grid=grid,
        micro_batch_size=1,
        pad_id=token_ids[0],
        loss_agg="token-mean",
    )
    made = token_log_probs(model, output_weight, grid, micro_batches, vocab=vocab, softcap=softcap)
    device = micro_batches[0].tokens.device
    found = torch.zeros(len(token_ids) - 1, dtype=torch.float64, device=device)
    for micro, log_probs in zip(micro_batches, made, strict=True):
        if log_probs is not None:  # micro-batches hold one sample each; the fill-up ones no token
            found[micro.slot_T[micro.mask_T]] += log_probs[micro.mask_T].double()
    return tuple((sum_from_last_stage(found, grid) / grid.dp_size).tolist())
