"""Numbers of whole sequences (losses/sequences.py), known before the update.

From the student's log-probs of the sampled tokens at the weights that sampled them, and the
teacher's: its output layer on hidden states that the update uses again, or what servers gave.

Shapes: T the places of a micro-batch that the loss looks at, N samples of the step.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megaopd.data.packing import split_source
from megaopd.losses import fused_linear_log_prob
from megaopd.losses.sequences import advantage_weights, posterior_weights, returns_to_go
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.parallel import Grid, sum_from_last_stage
from megaopd.trainer.batch import MicroBatch
from megaopd.trainer.importance import by_sample, by_token
from megaopd.trainer.step import FrozenLaw


def with_sequences(
    grid: Grid,
    micro_batches: Sequence[MicroBatch],
    log_probs: Sequence[Any],
    teacher: FrozenLaw | None,
    objective: ObjectiveConfig,
    *,
    vocab: int,
) -> tuple[list[MicroBatch], dict[str, float]]:
    """The micro-batches with returns or posterior advantages, and their metrics; a collective.

    Args:
        log_probs: the student's own, of log_probs.token_log_probs.
        teacher: its law with all hidden states (`FrozenLaw.held`); None for one on servers.
    """
    taught = [
        None if log_p is None else _teacher_log_probs(i, micro, teacher, objective, grid, vocab)
        for i, (micro, log_p) in enumerate(zip(micro_batches, log_probs, strict=True))
    ]
    found, metrics = list(micro_batches), dict[str, float]()
    if objective.returns:
        found = [
            micro if log_p is None else _with_returns(micro, log_q - log_p, objective.returns, grid)
            for micro, log_p, log_q in zip(found, log_probs, taught, strict=True)
        ]
    if objective.rl_weigh:
        found = [
            micro if log_p is None else _reweighed(micro, log_q - log_p, objective, grid)
            for micro, log_p, log_q in zip(found, log_probs, taught, strict=True)
        ]
    if objective.rl == "dpg":
        log_ratios = [
            None if log_p is None else log_q - log_p
            for log_p, log_q in zip(log_probs, taught, strict=True)
        ]
        found, metrics = _with_posterior(found, log_ratios, objective, grid)
    return found, metrics


def _teacher_log_probs(
    index: int,
    micro: MicroBatch,
    teacher: FrozenLaw | None,
    objective: ObjectiveConfig,
    grid: Grid,
    vocab: int,
) -> Any:
    """[T] log q of labels_T, on the last stage."""
    layer = None if teacher is None else teacher.at(index, micro)
    if layer is None:
        assert micro.remote is not None and micro.remote.label_log_q is not None
        return micro.remote.label_log_q
    softcap = layer.softcap
    assert not isinstance(softcap, str)
    return fused_linear_log_prob(
        layer.hidden,
        layer.weight,
        micro.labels_T,
        group=grid.groups.tp,
        vocab_size=vocab,
        chunk_size=objective.chunk_size or None,
        sequence_parallel=grid.config.sequence,
        softcap=softcap,
    )


def _with_returns(micro: MicroBatch, log_ratio_T: Any, how: str, grid: Grid) -> MicroBatch:
    import torch

    mask = by_sample(micro.mask_T.to(torch.int32), micro, grid) > 0
    table = returns_to_go(by_sample(log_ratio_T, micro, grid), mask, how)
    return replace(micro, returns_T=by_token(table, micro).to(micro.weights_T))


def _reweighed(
    micro: MicroBatch, log_ratio_T: Any, objective: ObjectiveConfig, grid: Grid
) -> MicroBatch:
    import torch

    if micro.advantage_T is None:  # every group of the step has equal rewards
        return micro
    mask = by_sample(micro.mask_T.to(torch.int32), micro, grid) > 0
    # A sample's advantage is that of any of its tokens.
    given = by_sample(micro.advantage_T, micro, grid)
    advantage = torch.where(mask, given, 0.0).sum(1)
    ratio = by_sample(log_ratio_T, micro, grid)
    table = advantage_weights(ratio, mask, advantage, objective.rl_weigh_clip)
    weight_T = by_token(table, micro).to(micro.advantage_T)
    return replace(micro, advantage_T=micro.advantage_T * weight_T)


def _with_posterior(
    micro_batches: Sequence[MicroBatch],
    log_ratios: Sequence[Any],
    objective: ObjectiveConfig,
    grid: Grid,
) -> tuple[list[MicroBatch], dict[str, float]]:
    """Advantages w - 1: a sample's weight under the posterior, over its group's mean.

    log_ratios: [T] of log pi_0 - log p. A prompt's samples may lie on several ranks: each sample's
    sum is known to all.
    """
    import torch

    samples = micro_batches[0].samples
    device = micro_batches[0].tokens.device
    sums = torch.zeros(len(samples), 2, dtype=torch.float64, device=device)
    numbers = [split_source(micro.sources_T)[0].to(device) for micro in micro_batches]
    for micro, number_T, log_ratio_T in zip(micro_batches, numbers, log_ratios, strict=True):
        if log_ratio_T is not None:
            own = micro.mask_T & (number_T >= 0)
            pair = torch.stack([log_ratio_T.double(), torch.ones_like(log_ratio_T).double()], 1)
            sums.index_add_(0, number_T[own], pair[own])
    log_ratio, tokens = sum_from_last_stage(sums, grid).unbind(1)
    rewards = torch.tensor([s.reward or 0.0 for s in samples], dtype=torch.float64, device=device)
    groups: dict[str, list[int]] = {}
    for i, (sample, count) in enumerate(zip(samples, tokens.tolist(), strict=True)):
        if sample.kind == "rollout" and count:
            groups.setdefault(sample.prompt.id, []).append(i)
    weights = posterior_weights(log_ratio + rewards / objective.reward_scale, list(groups.values()))
    known = [i for group in groups.values() for i in group]
    advantage = torch.zeros_like(weights)
    advantage[known] = weights[known] - 1.0
    made = [
        replace(micro, advantage_T=(advantage[n.clamp_min(0)] * (n >= 0)).to(micro.weights_T))
        for micro, n in zip(micro_batches, numbers, strict=True)
    ]
    live = weights[known]
    if not known:
        return made, {}
    ess = live.sum() ** 2 / (len(live) * live.square().sum())
    told = {"posterior/ess": ess, "posterior/log_ratio": log_ratio[known].mean()}
    return made, {name: float(value) for name, value in told.items()}
