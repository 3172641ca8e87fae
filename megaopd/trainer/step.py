"""One pass over the micro-batches of a step through Megatron's pipeline schedules.

The loss sits behind the last stage's hidden states: it applies the output layers of student and
teacher chunk by chunk (losses/fused_head.py) and never holds full logits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megaopd import faults, watchdog
from megaopd.losses import Objective, OutputLayer, fused_linear_objectives
from megaopd.losses.importance import bounded_exp
from megaopd.objectives.names import LIST_STATS
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.objectives.terms import TERMS, WeightedTerm, make_terms
from megaopd.parallel import Grid, as_chunks, sum_from_last_stage
from megaopd.trainer.batch import MicroBatch
from megaopd.trainer.ratios import RATIO_SUMS, ratio_rows, watches_ratio

# Sums over the tokens of the step, in this order; token means are made of them at the end. What an
# objective does not have is 0, so that every rank reduces the same vector.
STATS = ("student_log_prob", "student_entropy", "teacher_log_prob", "teacher_entropy", *LIST_STATS)
ROLLOUT_SUMS = ("rollout_abs_diff", "rollout_k3", "rollout_ratio", "rollout_ratio_squared")
IMPORTANCE_SUMS = ("weight", "weight_squared", "outside", "counted")
COUNTS = tuple(f"{name}_tokens" for name in TERMS)  # of each term's family
SUMS = (
    "loss", "tokens", *TERMS, *COUNTS, *STATS, "teacher_prefers", *ROLLOUT_SUMS, *RATIO_SUMS,
    *IMPORTANCE_SUMS,
)  # fmt: skip
# Tokens by |log p - log q| of the sampled one, in bins of this many nats; the last takes the rest.
BINS, BIN_NATS = 64, 0.25


@dataclass(frozen=True)
class FrozenLaw:
    """A model that the objective looks at and does not train, on the last stage.

    hidden: one [T, Ht] per micro-batch, or a function that gives it when its turn comes.
    weight, softcap: give the output layer's shard [Vp, Ht] and the logits' soft-cap for a
        micro-batch, on the student's partition of the vocabulary.
    """

    hidden: Sequence[Any]
    weight: Callable[[MicroBatch], Any]
    softcap: Callable[[MicroBatch], float | None]

    def at(self, index: int, micro: MicroBatch) -> OutputLayer | None:
        """Its output layer on a micro-batch's rows; None where it gave no hidden states."""
        hidden: Any = self.hidden[index]
        hidden = hidden() if callable(hidden) else hidden
        if hidden is None:
            return None
        return OutputLayer(hidden, self.weight(micro), softcap=self.softcap(micro))

    def held(self) -> "FrozenLaw":
        """The same with all hidden states here, to be looked at more than once."""
        hidden: list[Any] = [h() if callable(h) else h for h in self.hidden]
        return replace(self, hidden=hidden)


def run_schedule(
    model: Any,
    grid: Grid,
    inputs: Sequence[Any],
    forward_step: Any,
    *,
    forward_only: bool,
    collect: bool = False,
    balancing: bool = True,
) -> list[Any]:
    """Run Megatron's schedule for this pipeline size over one item of `inputs` per micro-batch.

    Args:
        model: this rank's stage, or the list of its chunks, first layers first.
        inputs: MicroBatch, or a tuple that starts with one; every micro-batch of one shape [B, S].
        collect: return what the loss function returns instead of treating it as a loss.

    Returns:
        On the last stage what the loss function gave for each micro-batch, elsewhere [].
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    first = inputs[0] if isinstance(inputs[0], MicroBatch) else inputs[0][0]
    micro_batch_size, sequence = first.tokens.shape
    chunks = as_chunks(model)
    for chunk in chunks:  # models/modules.py router
        share = 1.0 / (len(inputs) * grid.dp_size)
        chunk.config.aux_loss_share = share if balancing else 0.0
    config = chunks[0].config
    interleaved = len(chunks) > 1
    schedule = get_forward_backward_func(
        pp_size=grid.pp_size, vp_size=len(chunks) if interleaved else None
    )
    return schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(inputs) for _ in chunks] if interleaved else iter(inputs),
        model=chunks,
        num_microbatches=len(inputs),
        seq_length=sequence * grid.cp_size,  # of all context-parallel ranks
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect,
        pg_collection=grid.groups,
        p2p_communicator=P2PCommunicator(grid.groups.pp, config) if grid.pp_size > 1 else None,
    )


def forward_micro_batch(stage: Any, micro: MicroBatch) -> Any:
    """One pipeline stage on one micro-batch: whatever a forward pass needs is in the micro-batch.

    Returns:
        The stage's hidden states, [S(/CP)(/TP), B, H].
    """
    watchdog.beat()
    return stage(
        micro.tokens,
        micro.position_ids,
        None,
        packed_seq_params=micro.packed_seq_params,
        padding_mask=micro.padding,
    )


def objective_pass(
    model: Any,
    output_weight: Any,
    grid: Grid,
    micro_batches: Sequence[MicroBatch],
    objective: ObjectiveConfig,
    *,
    vocab: int,
    teacher: FrozenLaw | None,
    reference: FrozenLaw | None = None,
    forward_only: bool,
    softcap: float | None = None,
    only: str = "",
) -> dict[str, float]:
    """Forward (and backward) of the objective over all micro-batches; token means of its stats.

    Args:
        model: the student's stage or its chunks (wrapped in DDP where gradients are wanted).
        output_weight: callable that gives the student's [Vp, H] shard; used on the last stage.
        vocab: ids that are real in both models; logits of padded ids count for nothing.
        teacher: None without one, and for a teacher on servers, whose scores are in the
            micro-batches.
        reference: the base model that a geometric or linear target mixes with the teacher.
        softcap: of the student's logits (Architecture.final_softcap).
        only: the term that counts, of all of the objective's; empty: all.

    Returns:
        loss (the objective as weighted) and token means, equal on every rank: see `_metrics`.
    """
    terms = make_terms(objective)
    needs_base = objective.target in ("geometric", "linear")
    inputs = [(micro, index) for index, micro in enumerate(micro_batches)]

    def forward_step(iterator: Iterator[Any], stage: Any) -> tuple[Any, Any]:
        micro, index = next(iterator)
        if not forward_only:
            faults.point("forward")
        return forward_micro_batch(stage, micro), partial(loss_func, micro, index)

    def loss_func(micro: MicroBatch, index: int, hidden: Any) -> tuple[Any, Any, Any]:
        import torch

        weight = output_weight()
        taught = teacher.at(index, micro) if teacher is not None else None
        result = fused_linear_objectives(
            micro.select(hidden),
            weight,
            micro.remote if taught is None else taught,
            _weighted(terms, micro, only),
            base=reference.at(index, micro) if reference is not None and needs_base else None,
            labels=micro.labels_T if objective.passes_labels else None,
            inputs=_inputs(objective, micro),
            vocab_size=vocab,
            group=grid.groups.tp,
            chunk_size=objective.chunk_size or None,
            sequence_parallel=grid.config.sequence,
            softcap=softcap,
            # Nothing scales the loss after this: all factors are in the token weights.
            into_main_grad=not forward_only and getattr(weight, "main_grad", None) is not None,
            return_stats=True,
            stats_k=objective.stats_k or None,
        )
        return result.loss, torch.zeros((), dtype=torch.int), _token_sums(result, micro, objective)

    sums = run_schedule(
        model, grid, inputs, forward_step, forward_only=forward_only, balancing=not only
    )
    totals, bins = _reduce(sums, grid, device=micro_batches[0].tokens.device)
    return _metrics(totals, bins, objective, micro_batches[0])


def _weighted(
    terms: dict[str, WeightedTerm], micro: MicroBatch, only: str = ""
) -> dict[str, Objective]:
    """Each term with its token weights [T]; where only one counts, 0 for the others."""
    made = {}
    for name, one in terms.items():
        weights = one.coef * micro.term_weights(name, importance=one.importance)
        made[name] = Objective(one.term, weights if only in ("", name) else 0 * weights)
    return made


def _inputs(objective: ObjectiveConfig, micro: MicroBatch) -> dict[str, Any]:
    """What sampled terms take besides log-probs, [T] each."""
    import torch

    def given(x_T: Any) -> Any:
        return torch.zeros_like(micro.weights_T) if x_T is None else x_T

    inputs = {}
    if micro.old_log_probs_T is not None:
        inputs["old_log_prob"] = micro.old_log_probs_T
    if objective.rl:  # none: every group of the step has equal rewards
        inputs["advantage"] = given(micro.advantage_T)
    if objective.returns:  # none: the pass before the update was not made, as in an evaluation
        inputs["returns"] = given(micro.returns_T)
    return inputs


def _token_sums(result: Any, micro: MicroBatch, objective: ObjectiveConfig) -> Any:
    """[n + BINS] fp64 sums over this micro-batch's tokens, in the order of SUMS, and the bins."""
    import torch

    mask = micro.mask_T if micro.sampled_T is None else micro.sampled_T
    rows = dict(result.stats)
    if "student_log_prob" in rows:
        # Engine against trainer on the sampled token: k3 of the trainer's law over the engine's.
        old = micro.old_log_probs_T  # None: nothing has been updated since
        own = rows["student_log_prob"] if old is None else old
        diff = own.double() - micro.rollout_log_probs_T.double()
        diff = torch.where(mask, diff, 0.0)
        rows["rollout_abs_diff"] = diff.abs()
        rows["rollout_k3"] = torch.expm1(diff.clamp(-20, 20)) - diff
        rows["rollout_ratio"] = bounded_exp(diff)
        rows["rollout_ratio_squared"] = rows["rollout_ratio"].square()
    rows |= ratio_rows(objective, micro, rows)
    bins = torch.zeros(BINS, dtype=torch.float64, device=mask.device)
    if "student_log_prob" in rows and "teacher_log_prob" in rows:
        ratio = rows["student_log_prob"].double() - rows["teacher_log_prob"].double()
        # The only tokens that a biased top-k gradient raises: q > e p.
        rows["teacher_prefers"] = (ratio < -1.0).double()
        place = (ratio.abs() / BIN_NATS).nan_to_num(BINS, BINS).clamp(max=BINS - 1).long()
        bins.index_add_(0, place, mask.double())
    sums = {name: torch.where(mask, row.double(), 0.0).sum() for name, row in rows.items()}
    for name, row in result.terms.items():
        own = micro.family(name) > 0 if micro.families else micro.mask_T
        sums[name] = torch.where(own, row.double(), 0.0).sum()
        sums[f"{name}_tokens"] = own.sum().double()
    sums |= {"loss": result.loss.detach().double(), "tokens": mask.sum().double()}
    if micro.importance_sums is not None:
        sums |= zip(IMPORTANCE_SUMS, micro.importance_sums.unbind(), strict=True)
    zero = torch.zeros((), dtype=torch.float64, device=mask.device)
    return torch.cat([torch.stack([sums.get(name, zero) for name in SUMS]), bins])


def _reduce(
    sums: list[Any], grid: Grid, *, device: Any
) -> tuple[dict[str, float], Sequence[float]]:
    """(SUMS, bins) of the whole step, the same on every rank."""
    import torch

    size = len(SUMS) + BINS
    local = torch.stack(sums).sum(0) if sums else torch.zeros(size, dtype=torch.float64)
    whole = sum_from_last_stage(local.to(device), grid).tolist()
    return dict(zip(SUMS, whole, strict=False)), whole[len(SUMS) :]


def _percentile(bins: Sequence[float], share: float) -> float:
    """The upper edge, in nats, of the bin that the share of tokens ends in."""
    total, seen = sum(bins), 0.0
    for i, count in enumerate(bins):
        seen += count
        if seen >= share * total:
            return (i + 1) * BIN_NATS
    return len(bins) * BIN_NATS


def _metrics(
    totals: dict[str, float], bins: Sequence[float], objective: ObjectiveConfig, micro: MicroBatch
) -> dict[str, float]:
    """Token means by the name that they are logged under; micro: any one of the step's.

    The loss's raw value is kl, nll or distill (objective.value_name). Entropies, log-probs and list
    statistics are those of the objective's temperature and target.
    """
    tokens = totals["tokens"]
    means = {name: value / max(tokens, 1.0) for name, value in totals.items()}
    means |= {n: totals[n] / max(totals[f"{n}_tokens"], 1.0) for n in TERMS}
    metrics = {"loss": totals["loss"], "tokens": tokens, "entropy": means["student_entropy"]}
    if objective.distils:
        metrics[objective.value_name] = means["distill"]
    if objective.needs_teacher:
        if micro.payload == "hidden":
            metrics["teacher_entropy"] = means["teacher_entropy"]
            metrics["entropy_gap"] = means["student_entropy"] - means["teacher_entropy"]
        if objective.passes_labels:
            metrics["log_ratio"] = means["student_log_prob"] - means["teacher_log_prob"]
            metrics["log_ratio_p99"] = _percentile(bins, 0.99)
            metrics["teacher_prefers"] = means["teacher_prefers"]
    if objective.sinkd_coef:
        metrics["sinkd"] = means["sinkd"]
    if objective.returns:
        metrics["return"] = -means["returns"]
    if objective.loss == "sft" or objective.sft_coef:
        metrics["nll"] = means["sft"]
    if objective.replay:
        metrics["replay"] = means["replay"]
    if objective.coef_steps or objective.coef != 1.0:
        metrics["coef"] = objective.coef
    if objective.target != "teacher":
        metrics["target_weight"] = objective.target_weight
    metrics |= {name: means[name] for name in objective.statistics_of(micro.payload)}
    # At another temperature the engine's log-probs are of another law.
    if micro.has_rollout_log_probs and objective.passes_labels and objective.temperature == 1.0:
        metrics["rollout_log_prob_diff"] = means["rollout_abs_diff"]
        metrics["rollout_k3"] = means["rollout_k3"]
        metrics["rollout_ess"] = _ess(totals, "rollout_ratio")
    if watches_ratio(objective):
        metrics |= {f"ratio/{name[6:]}": means[name] for name in RATIO_SUMS}
    if totals["counted"]:
        metrics["tis/ess"] = _ess(totals, "weight")
        metrics["tis/clip_fraction"] = totals["outside"] / totals["counted"]
    return metrics


def _ess(totals: dict[str, float], name: str) -> float:
    """(sum w)^2 / (tokens sum w^2) of the weights `name`: losses/importance.py's, of all ranks."""
    squares = totals["tokens"] * totals[f"{name}_squared"]
    return totals[name] ** 2 / squares if squares else 0.0
