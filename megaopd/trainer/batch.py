"""One optimizer step's samples, cut into the micro-batches of this data-parallel rank.

A micro-batch is B padded samples, or one row of packed samples. Under context parallelism a rank
holds its part of every sequence.

Shapes: N samples, L longest padded sample, B rows, S positions of a row (S/CP under context
parallelism), T = the places of a micro-batch that the loss looks at. Hidden states arrive
sequence-first, [S, B, H], so place s*B + b is that of position s of row b.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from megaopd import platform
from megaopd.data.balance import Plan, packed_plan, padded_plan
from megaopd.data.packing import (
    PaddedBatch,
    Rows,
    packed_rows,
    pad_batch,
    padded_rows,
    round_up,
    split_source,
)
from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.losses import ListedTeacher, loss_weights
from megaopd.parallel import Grid, zigzag
from megaopd.trainer.scores import RemoteScores


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass and its loss need; tensors on this rank's device."""

    tokens: Any  # [B, S] int64
    position_ids: Any  # [B, S] int64
    rows: Any  # [T] int64: rows of [S*B, H] with a label, or None for all of them
    labels_T: Any  # [T] int64: the token that each row predicts
    weights_T: Any  # [T] float32: mask / denominator of the whole step, all samples alike
    mask_T: Any  # [T] bool
    rollout_log_probs_T: Any  # [T] float32, 0 where the rollout gave none
    has_rollout_log_probs: bool
    padding: Any = None  # [B, S] bool: places that hold no token of a sample; None: all do
    packed_seq_params: Any = None  # megatron's cu_seqlens of a packed row; None: padded rows
    # Which token of which sample: sample * L + position of the `table` samples; n * L is padding.
    slot_T: Any = None  # [T] int64
    table: tuple[int, int] = (0, 0)  # n samples, L; all of a sample's tokens over its CP ranks
    payload: str = "hidden"  # what of the teacher reaches the loss (objectives.validate.PAYLOADS)
    remote: ListedTeacher | None = None  # [T] rows of a teacher on servers; on the last stage
    # What a teacher with sequences or a layout of its own needs to know (trainer/teachers).
    sources_T: Any = None  # [T] int64 on the CPU: data.packing.source of each row; -1: padding
    samples: tuple[Sample, ...] = ()  # of the step, as `sources_T` numbers them
    teacher: str = ""  # which of several teachers scores this micro-batch
    # Made before the update where the objective asks for it (importance.py), on the last stage.
    importance_weights_T: Any = None  # [T] float32: weights_T x importance weight / what survives
    importance_sums: Any = None  # [4] float64: sum w, sum w^2, clipped or dropped, counted
    # Of labels_T by the student before the step's first update, where a ratio to it is wanted.
    old_log_probs_T: Any = None  # [T] float32, on the last stage
    # weights_T of each loss family (a term of the objective), where samples differ in theirs.
    families: Mapping[str, Any] = field(default_factory=dict)
    sampled_T: Any = None  # [T] bool: of mask_T what the student sampled; None: all of it
    advantage_T: Any = None  # [T] float32: of each token's sample; None: no sample has one
    returns_T: Any = None  # [T] float32: of what follows each token; on the last stage

    def family(self, name: str) -> Any:
        """[T]: the weights of a loss family; 0 where samples say which terms see them, and none
        says this one."""
        if not self.families or not name:
            return self.weights_T
        own = self.families.get(name)
        return self.weights_T.new_zeros(self.weights_T.shape) if own is None else own

    def term_weights(self, name: str = "", *, importance: bool) -> Any:
        """[T]: the token weights of a term, with importance weights where there are any."""
        own = self.family(name)
        if not importance or self.importance_weights_T is None:
            return own
        if own is self.weights_T:
            return self.importance_weights_T
        ratio = self.importance_weights_T / self.weights_T
        return own * ratio.nan_to_num(0.0, 0.0, 0.0)  # 0 / 0 where no token counts

    def select(self, hidden: Any) -> Any:
        """[S(/TP), B, H] -> [T, H]: the rows that the loss looks at."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if self.rows is None else flat.index_select(0, self.rows)


@dataclass(frozen=True)
class StepCounts:
    """Of a whole step, for micro-batches that are made of a part of its samples."""

    samples: int
    tokens: int = 0  # that the student sampled; 0: those of the part
    longest: int = 0  # tokens of the longest sample: micro-batches of a step have one shape
    families: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # samples and tokens

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "StepCounts":
        tokens = [sum(s.loss_mask or (1,) * len(s.response_ids)) for s in samples]
        families = {
            name: (sum(inside), sum(n for n, own in zip(tokens, inside, strict=True) if own))
            for name, inside in _members(samples).items()
        }
        return cls(len(samples), sum(tokens), max(len(s.tokens) for s in samples), families)


def _members(samples: Sequence[Sample]) -> dict[str, list[bool]]:
    """Which samples each loss family has; {}: no sample says, and every term sees all of them."""
    named = [s.weights for s in samples if s.weights is not None]
    names = dict.fromkeys(name for weights in named for name in weights)
    return {name: [name in (s.weights or {}) for s in samples] for name in names}


def mini_batches_of(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """The samples of a step in `count` parts (fewer where there are fewer prompts), in order.

    Each kind is dealt out by whole prompts, so that a part has its share of every loss family.
    """
    if count == 1:
        return [list(samples)]
    parts: list[list[Sample]] = [[] for _ in range(count)]
    for kind in dict.fromkeys(s.kind for s in samples):
        prompts = dict.fromkeys(s.prompt.id for s in samples if s.kind == kind)
        place = {prompt: i * count // len(prompts) for i, prompt in enumerate(prompts)}
        for sample in samples:
            if sample.kind == kind:
                parts[place[sample.prompt.id]].append(sample)
    return [part for part in parts if part]


def make_micro_batches(
    samples: Sequence[Sample],
    *,
    grid: Grid,
    micro_batch_size: int,
    pad_id: int,
    loss_agg: str,
    max_sequence: int = 0,
    micro_batch_tokens: int = 0,
    remote: RemoteScores | None = None,
    whole: StepCounts | None = None,
) -> list[MicroBatch]:
    """Pad all samples of the step, weigh their tokens together, and keep this rank's share.

    The weights are made from every sample of the step, on every rank alike: no communication, and
    the step's loss and gradient do not depend on how it is cut into ranks and micro-batches.

    Padded samples that do not divide are filled up with masked copies, packed ones with empty rows.

    Args:
        micro_batch_tokens: pack samples into rows of that many tokens (rounded up to what the
            layout needs); 0: pad each to the longest.
        remote: scores of a teacher on servers; tokens that it did not score are masked.
        whole: of the step, where `samples` are a part of it.

    Raises:
        UserError: a sample is longer than max_sequence or than micro_batch_tokens.
    """
    count = len(samples)
    whole = whole or StepCounts(count)
    longest = max(len(sample.tokens) for sample in samples)
    if max_sequence and longest > max_sequence:
        raise UserError(
            f"a sample of {longest} tokens with trainer.max_sequence = {max_sequence}",
            expected="samples that fit",
            fix="raise trainer.max_sequence, or lower rollout.max_new_tokens",
        )
    budget = round_up(micro_batch_tokens, grid.sequence_multiple)
    plan = plan_step(
        samples,
        grid=grid,
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
    )
    fill = max((i + 1 for rank in plan for one in rank for i in one), default=count) - count
    # Nothing of the copies was sampled: no spans.
    masked = replace(samples[0], loss_mask=(0,) * len(samples[0].response_ids), spans=())
    samples = [*samples, *[masked] * fill]
    multiple = grid.sequence_multiple
    length = round_up(max(longest, whole.longest), multiple)
    batch = pad_batch(samples, pad_id=pad_id, multiple_of=multiple, length=length)
    if remote is not None:
        batch = replace(batch, loss_mask=remote.keep_scored(batch.loss_mask, samples))
    weights = _token_weights(batch.loss_mask, samples, whole, loss_agg, max_sequence)
    lengths, width = segment_lengths(samples, grid), batch.tokens.shape[1]
    made = []
    for which in plan[grid.dp_rank]:
        if budget:
            rows = packed_rows(which, lengths, length=width, budget=budget)
        else:
            rows = padded_rows(which, width)
        micro = _cut(batch, weights, which, rows, grid, pad_id)
        micro = replace(micro, samples=tuple(samples))
        micro = _with_sample_numbers(micro, samples)
        if remote is not None:
            listed = remote.listed(which, samples, width)
            micro = replace(micro, payload=remote.payload, remote=_select(listed, micro.slot_T))
        made.append(micro)
    if any(sample.log_probs is None for sample in samples if sample.kind == "rollout"):
        return made
    return [replace(micro, has_rollout_log_probs=True) for micro in made]


def _token_weights(
    mask: Any, samples: Sequence[Sample], whole: StepCounts, loss_agg: str, max_sequence: int
) -> dict[str, Any]:
    """Weights [N, L] by loss family, each with its own denominator; "" for all samples alike."""
    import torch

    def weights(mask: Any, count: int, tokens: int, factors: Any = None) -> Any:
        options: dict[str, Any] = {"num_samples": max(count, 1)}
        if loss_agg == "token-mean":
            options = {"denominator": tokens or None}
        if loss_agg == "seq-mean-token-sum-norm":
            options["max_length"] = max_sequence
        return loss_weights(mask, loss_agg=loss_agg, sample_weights=factors, **options)

    made = {"": weights(mask, whole.samples, whole.tokens)}
    for name, inside in _members(samples).items():
        own = torch.tensor(inside)
        factors = torch.tensor([(s.weights or {}).get(name, 0.0) for s in samples])
        # Samples that fill up a micro-batch have their original's weights, and no tokens.
        live = int((own & mask.any(1)).sum())
        count, tokens = whole.families.get(name, (live, 0))
        made[name] = weights(mask & own[:, None], count, tokens, factors)
    return made


def _with_sample_numbers(micro: MicroBatch, samples: Sequence[Sample]) -> MicroBatch:
    """Each token with what its sample carries: who wrote it, and its advantage."""
    import torch

    number, _ = split_source(micro.sources_T)
    known, number = number >= 0, number.clamp_min(0)
    device = micro.tokens.device
    changes: dict[str, Any] = {}
    if any(s.kind != "rollout" for s in samples) and any(s.kind == "rollout" for s in samples):
        sampled = torch.tensor([s.kind == "rollout" for s in samples])[number] & known
        changes["sampled_T"] = sampled.to(device) & micro.mask_T
    if any(s.advantage for s in samples):
        advantage = torch.tensor([s.advantage for s in samples])[number] * known
        changes["advantage_T"] = advantage.to(device)
    return replace(micro, **changes) if changes else micro


def plan_step(
    samples: Sequence[Sample], *, grid: Grid, micro_batch_size: int, micro_batch_tokens: int = 0
) -> Plan:
    """[data-parallel rank][micro-batch] -> indices of samples, the same on every rank.

    Indices from len(samples) on are the masked copies that fill up padded micro-batches.
    """
    if not micro_batch_tokens:
        return padded_plan(
            len(samples),
            ranks=grid.dp_size,
            micro_batch_size=micro_batch_size,
            micro_batches_of=grid.micro_batches_of,
        )
    return packed_plan(
        segment_lengths(samples, grid),
        ranks=grid.dp_size,
        budget=round_up(micro_batch_tokens, grid.sequence_multiple),
        micro_batches_of=grid.micro_batches_of,
    )


def segment_lengths(samples: Sequence[Sample], grid: Grid) -> list[int]:
    """Tokens that each sample takes up in a packed row."""
    return [round_up(len(sample.tokens), grid.segment_multiple) for sample in samples]


def shares_of(plan: Plan, count: int) -> list[list[int]]:
    """Which of `count` samples are each data-parallel rank's, in the order of its micro-batches."""
    return [[i for one in rank for i in one if i < count] for rank in plan]


def _select(listed: ListedTeacher | None, slot_T: Any) -> ListedTeacher | None:
    """The rows that the loss looks at, on this rank's device."""
    if listed is None:
        return None

    def pick(x: Any) -> Any:
        return None if x is None else x.to(platform.device()).index_select(0, slot_T)

    return ListedTeacher(
        pick(listed.ids), pick(listed.log_q), pick(listed.label_log_q), listed.support
    )


def _cut(
    batch: PaddedBatch,
    weights: Mapping[str, Any],
    which: Sequence[int],
    rows: Rows,
    grid: Grid,
    pad_id: int,
) -> MicroBatch:
    """This rank's part of the rows, with everything that belongs to their tokens."""
    import torch

    device, width = platform.device(), batch.tokens.shape[1]
    source, position_ids = rows.source, rows.position_ids
    if grid.cp_size > 1:
        own = zigzag(rows.bounds or (0, source.shape[1]), grid.cp_rank, grid.cp_size)
        source, position_ids = source[:, own], position_ids[:, own]
    flat = source.t().reshape(-1)

    def take(table_NL: Any, places: Any, fill: Any) -> Any:
        picked = table_NL.reshape(-1)[places.clamp_min(0)]
        return torch.where(places >= 0, picked, torch.full_like(picked, fill))

    mask = take(batch.loss_mask, flat, False)
    kept = None
    if not grid.config.sequence:  # a rank of a sequence-parallel group holds a part of the rows
        kept = mask.nonzero().squeeze(1)
        flat, mask = flat[kept], mask[kept]
        kept = kept.to(device)
    place = torch.full((len(batch.tokens),), 0)
    place[list(which)] = torch.arange(len(which))
    slot = torch.where(
        flat >= 0, place[flat.clamp_min(0) // width] * width + flat % width, len(which) * width
    )
    return MicroBatch(
        tokens=take(batch.tokens, source, pad_id).to(device),
        position_ids=position_ids.contiguous().to(device),
        padding=(take(batch.sources, source, -1) < 0).to(device),
        rows=kept,
        labels_T=take(batch.labels, flat, pad_id).to(device),
        weights_T=take(weights[""], flat, 0.0).to(device),
        families={n: take(w, flat, 0.0).to(device) for n, w in weights.items() if n},
        mask_T=mask.to(device),
        rollout_log_probs_T=take(batch.rollout_log_probs, flat, 0.0).to(device),
        has_rollout_log_probs=False,
        packed_seq_params=_packed_seq_params(rows.bounds),
        slot_T=slot.to(device),
        sources_T=take(batch.sources, flat, -1),
        table=(len(which), width),
    )


def _packed_seq_params(bounds: Sequence[int] | None) -> Any:
    """megatron-core's description of a packed row, before it is cut over context-parallel ranks."""
    if bounds is None:
        return None
    import torch

    platform.install()
    from megatron.core.packed_seq_params import PackedSeqParams

    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=platform.device())
    longest = max(b - a for a, b in pairwise(bounds))
    return PackedSeqParams(  # pyright: ignore
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        # The same: padding behind a sequence is part of it. Transformer Engine asks for them.
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
