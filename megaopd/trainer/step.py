"""One pass over the micro-batches of a step through Megatron's pipeline schedules.

The loss sits behind the last stage's hidden states: it applies the output layers of student and
teacher chunk by chunk (losses/fused_head.py) and never holds full logits.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from megaopd import faults
from megaopd.losses import fused_linear_cross_entropy, fused_linear_divergence
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.parallel import Grid, sum_from_last_stage
from megaopd.trainer.batch import MicroBatch

# Sums over the tokens of the step, in this order; token means are made of them at the end.
SUMS = ("tokens", "divergence", "log_prob", "entropy")
TEACHER_SUMS = ("teacher_log_prob", "teacher_entropy")
ROLLOUT_SUMS = ("rollout_abs_diff", "rollout_k3")


def run_schedule(
    model: Any,
    grid: Grid,
    inputs: Sequence[Any],
    forward_step: Any,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """Run Megatron's schedule for this pipeline size over one item of `inputs` per micro-batch.

    Args:
        inputs: MicroBatch, or a tuple that starts with one; every micro-batch of one shape [B, S].
        collect: return what the loss function returns instead of treating it as a loss.

    Returns:
        On the last stage what the loss function gave for each micro-batch, elsewhere [].
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    first = inputs[0] if isinstance(inputs[0], MicroBatch) else inputs[0][0]
    micro_batch_size, sequence = first.tokens.shape
    config = model.config
    schedule = get_forward_backward_func(pp_size=grid.pp_size, vp_size=None)
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iter(inputs),
        model=[model],
        num_microbatches=len(inputs),
        seq_length=sequence,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect,
        pg_collection=grid.groups,
        p2p_communicator=P2PCommunicator(grid.groups.pp, config) if grid.pp_size > 1 else None,
    )


def objective_pass(
    model: Any,
    output_weight: Any,
    grid: Grid,
    micro_batches: Sequence[MicroBatch],
    objective: ObjectiveConfig,
    *,
    vocab: int,
    teacher_hidden: Sequence[Any] | None,
    teacher_weight: Any,
    forward_only: bool,
) -> dict[str, float]:
    """Forward (and backward) of the objective over all micro-batches; token means of its stats.

    Args:
        model: the student stage (wrapped in DDP where gradients are wanted).
        output_weight: callable that gives the student's [Vp, H] shard; used on the last stage.
        vocab: ids that are real in both models; logits of padded ids count for nothing.
        teacher_hidden: one [T, Ht] per micro-batch on the last stage, or None for sft.
        teacher_weight: callable that gives the teacher's [Vp, Ht] shard on the same partition.

    Returns:
        loss (the objective as weighted) and the token means of SUMS, equal on every rank.
    """
    given = teacher_hidden if teacher_hidden is not None else [None] * len(micro_batches)
    inputs = list(zip(micro_batches, given, strict=True))

    def forward_step(iterator: Iterator[Any], stage: Any) -> tuple[Any, Any]:
        micro, hidden_t = next(iterator)
        if not forward_only:
            faults.point("forward")
        output = stage(micro.tokens, micro.position_ids, None)
        return output, partial(loss_func, micro, hidden_t)

    def loss_func(micro: MicroBatch, hidden_t: Any, hidden: Any) -> tuple[Any, Any, Any]:
        import torch

        common = _loss_options(micro, grid, objective, vocab)
        hidden, weight = micro.select(hidden), output_weight()
        if hidden_t is None:
            result = fused_linear_cross_entropy(hidden, weight, micro.labels_T, **common)
        else:
            result = fused_linear_divergence(
                hidden,
                weight,
                hidden_t,
                teacher_weight(),
                kind=objective.loss,
                temperature=objective.temperature,
                labels=micro.labels_T,
                **common,
            )
        return result.loss, torch.zeros((), dtype=torch.int), _token_sums(result, micro)

    sums = run_schedule(model, grid, inputs, forward_step, forward_only=forward_only)
    return _reduce(sums, grid, teacher=teacher_hidden is not None, micro=micro_batches[0])


def _loss_options(
    micro: MicroBatch, grid: Grid, objective: ObjectiveConfig, vocab: int
) -> dict[str, Any]:
    """What every fused loss is given."""
    return {
        "token_weights": micro.weights_T,
        "vocab_size": vocab,
        "group": grid.groups.tp,
        "chunk_size": objective.chunk_size,
        "sequence_parallel": grid.config.sequence,
        "return_stats": True,
    }


def _token_sums(result: Any, micro: MicroBatch) -> Any:
    """[n] fp64 sums over this micro-batch's tokens: the weighted loss, then SUMS and the rest."""
    import torch

    mask = micro.mask_T.double()
    stats = result.stats
    log_prob = stats["student_log_prob"].double()
    rows = [mask, result.per_token.double() * mask]
    rows += [log_prob * mask, stats["student_entropy"].double() * mask]
    if "teacher_log_prob" in stats:
        rows += [stats["teacher_log_prob"].double() * mask]
        rows += [stats["teacher_entropy"].double() * mask]
    else:
        rows += [torch.zeros_like(mask)] * 2
    # Engine against trainer on the sampled token: k3 of the trainer's law over the engine's.
    diff = (log_prob - micro.rollout_log_probs_T.double()) * mask
    rows += [diff.abs(), torch.expm1(diff.clamp(-20, 20)) - diff]
    return torch.cat([result.loss.detach().double().reshape(1), torch.stack(rows).sum(1)])


def _reduce(sums: list[Any], grid: Grid, *, teacher: bool, micro: MicroBatch) -> dict[str, float]:
    import torch

    names = ["loss", *SUMS, *TEACHER_SUMS, *ROLLOUT_SUMS]
    device = micro.tokens.device
    local = torch.stack(sums).sum(0) if sums else torch.zeros(len(names), dtype=torch.float64)
    total = dict(zip(names, sum_from_last_stage(local.to(device), grid).tolist(), strict=True))
    tokens = total["tokens"]
    means = {name: value / max(tokens, 1.0) for name, value in total.items()}
    metrics = {"loss": total["loss"], "tokens": tokens, "entropy": means["entropy"]}
    if teacher:
        metrics["kl"] = means["divergence"]
        metrics["teacher_entropy"] = means["teacher_entropy"]
        metrics["log_ratio"] = means["log_prob"] - means["teacher_log_prob"]
    else:
        metrics["nll"] = means["divergence"]
    if micro.has_rollout_log_probs:
        metrics["rollout_log_prob_diff"] = means["rollout_abs_diff"]
        metrics["rollout_k3"] = means["rollout_k3"]
    return metrics
