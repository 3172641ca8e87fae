"""What needs a forward pass of the student before its update: log-probs of the sampled tokens.

The old log-probs are those at the step's first weights; where a rollout is taken several optimizer
steps, losses on sampled tokens have their ratio to them. Importance weights are
p_trainer(y) / p_engine(y), both at the weights that sampled y: the old ones over the engine's.

Shapes: T the places of a micro-batch that the loss looks at.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megaopd.errors import UserError
from megaopd.losses.importance import tis_weights
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.parallel import Grid, sum_from_last_stage
from megaopd.trainer.batch import MicroBatch
from megaopd.trainer.log_probs import token_log_probs


def with_old_log_probs(
    model: Any,
    output_weight: Any,
    grid: Grid,
    micro_batches: Sequence[MicroBatch],
    objective: ObjectiveConfig,
    *,
    vocab: int,
    softcap: float | None = None,
    ratio: bool = False,
) -> list[MicroBatch]:
    """The micro-batches with importance weights as objective.tis says; a collective.

    ratio: and with the old log-probs themselves.

    Denominators count the tokens that survive (METHODS 0.5): of the whole step with token-mean, of
    the sample with seq-mean-token-mean; the other reductions divide by no number of tokens.

    Raises:
        UserError: samples without the log-probs that they were drawn with.
    """
    weighted = objective.tis != "off"
    if weighted and not all(micro.has_rollout_log_probs for micro in micro_batches):
        raise UserError(
            f"objective.tis = {objective.tis} without rollout log-probs",
            expected="samples with the log-probs of the law that they were drawn from",
            fix="set objective.tis=off",
        )
    made = token_log_probs(
        model,
        output_weight,
        grid,
        micro_batches,
        vocab=vocab,
        chunk_size=objective.chunk_size or None,
        softcap=softcap,
    )
    micro_batches = list(micro_batches)
    if weighted:
        micro_batches = _weighted(micro_batches, made, objective, grid)
    if not ratio:
        return micro_batches
    pairs = zip(micro_batches, made, strict=True)
    return [replace(micro, old_log_probs_T=old_T) for micro, old_T in pairs]


def _weighted(
    micro_batches: Sequence[MicroBatch],
    made: Sequence[Any],
    objective: ObjectiveConfig,
    grid: Grid,
) -> list[MicroBatch]:
    """With importance weights; made: the old log-probs [T] of each, None off the last stage."""
    import torch

    micro_batches = [
        weigh(micro, old_T, objective, grid)
        for micro, old_T in zip(micro_batches, made, strict=True)
    ]
    if objective.loss_agg != "token-mean":
        return micro_batches
    local = torch.zeros(2, dtype=torch.float64, device=micro_batches[0].tokens.device)
    for micro in micro_batches if grid.is_last_stage else ():
        kept = micro.importance_weights_T > 0
        local += torch.stack([micro.weights_T.sum(), micro.weights_T[kept].sum()])
    total, kept = sum_from_last_stage(local, grid).tolist()
    return [_scaled(micro, total / kept if kept else 0.0) for micro in micro_batches]


def weigh(micro: MicroBatch, old_T: Any, objective: ObjectiveConfig, grid: Grid) -> MicroBatch:
    """One micro-batch with its weights, token-mean's denominator left as it was.

    A sample's tokens may be spread over the context-parallel ranks: each of them gets all.

    old_T [T]: the trainer's log-probs; None off the last stage, where nothing is done.
    """
    import torch
    import torch.distributed as dist

    if old_T is None:
        return micro
    count, length = micro.table

    def by_sample(x_T: Any) -> Any:
        flat = x_T.new_zeros(count * length + 1)
        flat[micro.slot_T] = x_T
        table = flat[:-1].view(count, length)
        if grid.cp_size > 1:
            dist.all_reduce(table, group=grid.groups.cp)
        return table

    mask = by_sample(micro.mask_T.to(torch.int32)) > 0
    weight, found = tis_weights(
        by_sample(old_T), by_sample(micro.rollout_log_probs_T), mask, mode=objective.tis
    )
    sums = weight.double().sum(), weight.double().square().sum()
    counted = (mask.any(1) if objective.tis in ("seq", "reject") else mask).sum().double()
    if objective.loss_agg == "seq-mean-token-mean":
        weight = weight * (mask.sum(1) / (weight > 0).sum(1).clamp_min(1))[:, None]
    padded = torch.nn.functional.pad(weight.reshape(-1), (0, 1))
    sums = torch.stack([*sums, found["clip_fraction"].double() * counted, counted])
    return replace(
        micro,
        importance_weights_T=micro.weights_T * padded[micro.slot_T].to(micro.weights_T),
        importance_sums=sums / grid.cp_size,  # each context-parallel rank counts whole samples
    )


def _scaled(micro: MicroBatch, factor: float) -> MicroBatch:
    if micro.importance_weights_T is None:
        return micro
    return replace(micro, importance_weights_T=micro.importance_weights_T * factor)
