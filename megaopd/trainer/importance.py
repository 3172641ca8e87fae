"""Importance weights of the sampled tokens, from a forward pass of the student before its update.

The ratio p_trainer(y) / p_engine(y) at the weights that sampled y. With one optimizer step per
rollout these are the current ones, so that one pass serves the whole step.

Shapes: B micro-batch, S sequence, T the rows that the loss looks at.
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


def with_importance_weights(
    model: Any,
    output_weight: Any,
    grid: Grid,
    micro_batches: Sequence[MicroBatch],
    objective: ObjectiveConfig,
    *,
    vocab: int,
    softcap: float | None = None,
) -> list[MicroBatch]:
    """The micro-batches with importance weights as objective.tis says; a collective.

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

    made = token_log_probs(
        model,
        output_weight,
        grid,
        micro_batches,
        vocab=vocab,
        chunk_size=objective.chunk_size or None,
        softcap=softcap,
    )
    micro_batches = [
        weigh(micro, old_T, objective) for micro, old_T in zip(micro_batches, made, strict=True)
    ]
    if objective.loss_agg != "token-mean":
        return micro_batches
    local = torch.zeros(2, dtype=torch.float64, device=micro_batches[0].tokens.device)
    for micro in micro_batches if grid.is_last_stage else ():
        kept = micro.importance_weights_T > 0
        local += torch.stack([micro.weights_T.sum(), micro.weights_T[kept].sum()])
    total, kept = sum_from_last_stage(local, grid).tolist()
    return [_scaled(micro, total / kept if kept else 0.0) for micro in micro_batches]


def weigh(micro: MicroBatch, old_T: Any, objective: ObjectiveConfig) -> MicroBatch:
    """One micro-batch with its weights, token-mean's denominator left as it was.

    old_T [T]: the trainer's log-probs; None off the last stage, where nothing is done.
    """
    import torch

    if old_T is None:
        return micro
    count, length = micro.tokens.shape
    rows = micro.rows
    if rows is None:
        rows = torch.arange(count * length, device=old_T.device)

    def by_sample(x_T: Any) -> Any:
        flat = x_T.new_zeros(count * length)
        flat[rows] = x_T
        return flat.view(length, count).t()  # row s*B + b is token s of sequence b

    mask = by_sample(micro.mask_T)
    weight, found = tis_weights(
        by_sample(old_T), by_sample(micro.rollout_log_probs_T), mask, mode=objective.tis
    )
    sums = weight.double().sum(), weight.double().square().sum()
    counted = (mask.any(1) if objective.tis in ("seq", "reject") else mask).sum().double()
    if objective.loss_agg == "seq-mean-token-mean":
        weight = weight * (mask.sum(1) / (weight > 0).sum(1).clamp_min(1))[:, None]
    weight_T = weight.t().reshape(-1)[rows].to(micro.weights_T)
    return replace(
        micro,
        importance_weights_T=micro.weights_T * weight_T,
        importance_sums=torch.stack([*sums, found["clip_fraction"].double() * counted, counted]),
    )


def _scaled(micro: MicroBatch, factor: float) -> MicroBatch:
    if micro.importance_weights_T is None:
        return micro
    return replace(micro, importance_weights_T=micro.importance_weights_T * factor)
