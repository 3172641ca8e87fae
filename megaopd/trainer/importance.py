"""Importance weights of the sampled tokens, from a forward pass of the student before its update.

The ratio p_trainer(y) / p_engine(y), both at the weights that sampled y: those before the step's
first update.

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


def with_importance_weights(
    grid: Grid,
    micro_batches: Sequence[MicroBatch],
    log_probs: Sequence[Any],
    objective: ObjectiveConfig,
) -> list[MicroBatch]:
    """The micro-batches with importance weights as objective.tis says; a collective.

    Args:
        log_probs: the student's own, of log_probs.token_log_probs.

    Denominators count the tokens that survive (METHODS 0.5): of the whole step with token-mean, of
    the sample with seq-mean-token-mean; the other reductions divide by no number of tokens.

    Raises:
        UserError: samples without the log-probs that they were drawn with.
    """
    import torch

    if not all(micro.has_rollout_log_probs for micro in micro_batches):
        raise UserError(
            f"objective.tis = {objective.tis} without rollout log-probs",
            expected="samples with the log-probs of the law that they were drawn from",
            fix="set objective.tis=off",
        )

    micro_batches = [
        weigh(micro, old_T, objective, grid)
        for micro, old_T in zip(micro_batches, log_probs, strict=True)
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

    if old_T is None:
        return micro
    mask = by_sample(micro.mask_T.to(torch.int32), micro, grid) > 0
    weight, found = tis_weights(
        by_sample(old_T, micro, grid),
        by_sample(micro.rollout_log_probs_T, micro, grid),
        mask,
        mode=objective.tis,
    )
    sums = weight.double().sum(), weight.double().square().sum()
    counted = (mask.any(1) if objective.tis in ("seq", "reject") else mask).sum().double()
    if objective.loss_agg == "seq-mean-token-mean":
        weight = weight * (mask.sum(1) / (weight > 0).sum(1).clamp_min(1))[:, None]
    sums = torch.stack([*sums, found["clip_fraction"].double() * counted, counted])
    return replace(
        micro,
        importance_weights_T=micro.weights_T * by_token(weight, micro).to(micro.weights_T),
        importance_sums=sums / grid.cp_size,  # each context-parallel rank counts whole samples
    )


def by_sample(x_T: Any, micro: MicroBatch, grid: Grid) -> Any:
    """[T] of a micro-batch's rows -> [n, L] of its samples, of all context-parallel ranks."""
    import torch.distributed as dist

    count, length = micro.table
    flat = x_T.new_zeros(count * length + 1)
    flat[micro.slot_T] = x_T
    table = flat[:-1].view(count, length)
    if grid.cp_size > 1:
        dist.all_reduce(table, group=grid.groups.cp)
    return table


def by_token(table_nL: Any, micro: MicroBatch) -> Any:
    """Back: [n, L] -> [T], 0 at padding."""
    import torch

    return torch.nn.functional.pad(table_nL.reshape(-1), (0, 1))[micro.slot_T]


def _scaled(micro: MicroBatch, factor: float) -> MicroBatch:
    if micro.importance_weights_T is None:
        return micro
    return replace(micro, importance_weights_T=micro.importance_weights_T * factor)
