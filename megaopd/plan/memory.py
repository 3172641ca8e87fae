"""Bytes on the ranks of each pipeline stage: what stays, and the phases that come on top of it.

The update has four phases that never overlap: the teacher's forward pass, the student's forward and
backward passes, and the optimizer. A rank needs what stays plus the largest of them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megaopd.plan.hardware import SLEEPING_SERVER
from megaopd.plan.head import head_bytes, waiting_hidden
from megaopd.plan.job import Job, Side
from megaopd.plan.layer import (
    RNG_STATE,
    Sizes,
    backward_peak,
    forward_peak,
    inference_peak,
    layer_modules,
    saved_bytes,
)


@dataclass(frozen=True)
class Weights:
    """Numbers of a stage on one rank."""

    dense: int  # shared by all data-parallel and context-parallel ranks
    experts: int  # shared by fewer: experts are split over those ranks

    @property
    def all(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class StageMemory:
    """Bytes on every rank of one pipeline stage, the student's or (own) that of a teacher on ranks
    of its own."""

    stage: int
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    teacher_weights: float = 0.0
    rollout: float = 0.0
    buffers: float = 0.0  # sequence-parallel gathers and position tables, kept between steps
    batch: float = 0.0  # the step's token ids and numbers
    hidden: float = 0.0  # the teacher's hidden states of the step
    in_flight: float = 0.0  # micro-batches whose backward pass is still to come
    saved: float = 0.0  # activations of one of them
    teacher_phase: float = 0.0
    forward_phase: float = 0.0  # activations in flight included
    backward_phase: float = 0.0
    optimizer_phase: float = 0.0
    reserve: float = 0.0
    own: bool = False

    @property
    def resident(self) -> float:
        """What is there in every phase."""
        kept = self.weights + self.gradients + self.optimizer + self.teacher_weights
        return kept + self.rollout + self.buffers + self.batch

    @property
    def phases(self) -> dict[str, float]:
        return {
            "teacher": self.teacher_phase,
            "forward": self.forward_phase + self.hidden,
            "backward": self.backward_phase + self.hidden,
            "optimizer": self.optimizer_phase + self.hidden,
        }

    @property
    def name(self) -> str:
        return f"teacher {self.stage}" if self.own else f"stage {self.stage}"

    @property
    def worst(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak(self) -> float:
        """Of live tensors."""
        return self.resident + max(self.phases.values())

    @property
    def total(self) -> float:
        return self.peak + self.reserve


def stage_weights(side: Side, stage: int, *, vocab_rows: int, scorer: bool = False) -> Weights:
    """The weights of a stage on one tensor rank; of the experts, those that it holds whole.

    scorer: without the output layer, which is elsewhere.
    """
    arch, tensor = side.arch, side.tensor
    dense = experts = 0
    for layer in side.stage_layers(stage):
        numbers = side.model.layer(layer)
        dense += numbers.whole + numbers.split // tensor
        experts += numbers.expert * (numbers.experts // side.layout.expert)
    ends = side.layout.pipeline - 1
    table = vocab_rows // tensor * arch.hidden
    if stage == 0:
        dense += table
    if stage == ends:
        # A tied output layer of a stage of its own is a copy.
        dense += arch.hidden + (0 if scorer or (arch.tied and ends == 0) else table)
    return Weights(dense, experts)


def in_flight(layout_pipeline: int, virtual: int, stage: int, micro_batches: int) -> float:
    """Micro-batches of a whole stage whose activations exist at once: 1F1B, or interleaved."""
    if layout_pipeline == 1:
        return 1
    behind = layout_pipeline - stage - 1
    if virtual == 1:
        return min(micro_batches, behind + 1)
    chunks = min(micro_batches * virtual, 2 * behind + (virtual - 1) * layout_pipeline + 1)
    return chunks / virtual


def stage_memory(job: Job, stage: int, *, reserve: float = 0.0) -> StageMemory:
    """What a rank of this stage of the student holds."""
    side, world = job.student, job.world
    weights = stage_weights(side, stage, vocab_rows=job.vocab_rows)
    shards = side.data(world) * side.layout.context if job.distributed else 1
    expert_shards = side.expert_data(world) if job.distributed else 1
    own = weights.dense / shards + weights.experts / expert_shards
    master = 4 if side.itemsize < 4 else 0
    last = stage == side.layout.pipeline - 1
    waiting = waiting_hidden(job) if last else 0.0
    flight = in_flight(side.layout.pipeline, side.layout.virtual, stage, job.micro_batches)
    saved, forward, backward = _passes(job, stage, flight)
    teacher = teacher_resident = 0.0
    if job.teacher:
        teacher_resident, teacher = _teacher(job, stage)
    return StageMemory(
        stage=stage,
        weights=weights.all * side.itemsize,
        gradients=weights.all * 4,
        optimizer=own * (8 + master),
        teacher_weights=teacher_resident,
        rollout=_rollout(job),
        buffers=_buffers(job, stage),
        batch=job.micro_batches * job.micro_batch * (16 * job.padded_sequence + 25 * job.rows),
        hidden=waiting,
        in_flight=flight,
        saved=saved,
        teacher_phase=teacher + waiting,
        forward_phase=forward,
        backward_phase=backward,
        # The CPU's Adam divides into a new tensor; fused ones work in place.
        optimizer_phase=4 * own if job.spec == "local" else 0.0,
        reserve=reserve,
    )


def _passes(job: Job, stage: int, flight: float) -> tuple[float, float, float]:
    """(saved bytes of one micro-batch, peak of the forward pass, of the backward pass)."""
    side, sizes = job.student, Sizes.of(job, job.student)
    kinds = [side.arch.is_sparse(layer) for layer in side.stage_layers(stage)]
    by_kind = {kind: layer_modules(job, side, sparse=kind) for kind in set(kinds)}
    full = side.recompute == "full"
    # A recomputed layer keeps its input and four states of random number generators.
    state = 4 * RNG_STATE if job.spec == "local" else 0
    kept = {
        kind: sizes.stream + state if full else saved_bytes(modules)
        for kind, modules in by_kind.items()
    }
    if side.recompute == "selective":
        lse = 4 * sizes.t * sizes.heads
        kept = {kind: size - lse + state for kind, size in kept.items()}
    saved = sum(kept[kind] for kind in kinds)
    first, last = stage == 0, stage == side.layout.pipeline - 1
    table = job.vocab_rows / side.tensor * side.arch.hidden * side.itemsize
    saved += 8 * sizes.t if first else 0.0
    saved += 0 if last else sizes.stream  # what went to the next stage waits for its gradient
    closing = _final_norm(sizes, job) if last else 0.0
    others = (flight - 1) * saved
    top = by_kind[kinds[-1]]
    forward = backward = others + saved + sizes.stream
    if last:
        head = head_bytes(job)
        forward = others + saved + closing + head.peak + sizes.stream
        backward = others + saved + closing + head.gradient + 3 * sizes.stream
    bottom = max(backward_peak(by_kind[kind]) for kind in kinds)
    if full:
        # One layer is made again, with its output, while all inputs are still there.
        rebuilt = max(bottom, forward_peak(top)) + 2 * sizes.stream
        backward = max(backward, others + saved + rebuilt - sizes.stream)
        forward = max(forward, others + saved + max(map(forward_peak, by_kind.values())))
        # What routers hold on to is let go layer by layer on the way forward, and is back at the
        # end of the way backward, where the layers' inputs are among it.
        held = _held_by_routers(job, stage)
        forward, backward = forward - held, max(backward - held, others + rebuilt)
    else:
        backward = max(backward, others + saved - kept[kinds[-1]] + backward_peak(top))
    if first:
        # The embedding's gradient is dense; tied, the output layer's comes on top.
        twice = 2 if side.arch.tied and last else 1
        backward = max(backward, others + 2 * sizes.stream + twice * table)
    return saved, forward, backward


def _held_by_routers(job: Job, stage: int) -> float:
    """Recomputed layers of experts, between two passes: megatron-core's dispatcher keeps the
    weights of its last tokens, whose graph ends in the layer's input and that one's gradient."""
    if job.student.recompute != "full":
        return 0.0
    return 2.0 * Sizes.of(job, job.student).stream * job.student.sparse_layers(stage)


def _final_norm(sizes: Sizes, job: Job) -> float:
    """Saved by the last norm; its output goes to the loss."""
    if job.spec == "te":
        return sizes.stream + 4 * sizes.ts
    return 8 * sizes.ts * sizes.hidden + 4 * sizes.ts


def _teacher(job: Job, stage: int) -> tuple[float, float]:
    """(weights, peak of the forward pass) of the teacher on a rank that holds this stage.

    A teacher of another pipeline size has other stages on the same ranks: the heaviest counts.
    """
    side = job.teacher
    assert side is not None
    last = stage == job.student.layout.pipeline - 1
    if not job.regrouped:
        weights, peak = _scorer(job, [stage])
        return weights, peak + (0 if last else Sizes.of(job, side).stream)
    output = job.vocab_rows / job.student.tensor * side.arch.hidden * side.itemsize if last else 0.0
    if job.teacher_world:
        return output, 0.0
    weights, peak = _scorer(job, range(side.layout.pipeline))
    return output + weights, peak + _scored(job)


def _scorer(job: Job, stages: Iterable[int]) -> tuple[float, float]:
    """(weights, peak of the forward pass) of the heaviest of these stages of the teacher."""
    side = job.teacher
    assert side is not None
    rows = job.table_rows(side)
    weights = max(stage_weights(side, s, vocab_rows=rows, scorer=job.regrouped).all for s in stages)
    peak = max(
        inference_peak(job, side, sparse=sparse)
        for s in stages
        for sparse in {side.arch.is_sparse(layer) for layer in side.stage_layers(s)}
    )
    return weights * side.itemsize, peak


def _scored(job: Job) -> float:
    """Rows on a rank of a regrouped teacher's last stage: its share of the step's, till they go."""
    side, student = job.teacher, job.student
    assert side is not None
    rows = job.local_rows(student) * student.ranks_of_sequence * student.layout.context
    step = job.micro_batches * student.data(job.world) * rows
    receivers = student.data(job.world) * student.tensor * student.layout.context
    sharers = side.data(job.world) * min(side.tensor, receivers)
    return step / sharers * side.arch.hidden * side.itemsize


def _under_way(job: Job) -> float:
    """Rows on a rank of a separate teacher's last stage: a window of them for each receiver."""
    side, student = job.teacher, job.student
    assert side is not None
    data, own = student.data(job.world), side.data(job.teacher_world)
    served = data // math.gcd(data, own) * student.tensor * student.layout.context
    receivers = math.ceil(served / side.tensor)
    rows = job.local_rows(student) / (student.tensor // student.ranks_of_sequence)
    window = min(job.window, job.micro_batches)
    return window * receivers * rows * side.arch.hidden * side.itemsize


def teacher_memory(job: Job, stage: int, *, reserve: float = 0.0) -> StageMemory:
    """What a rank of this stage of a teacher on ranks of its own holds."""
    side = job.teacher
    assert side is not None
    weights, peak = _scorer(job, [stage])
    sizes, last = Sizes.of(job, side), stage == side.layout.pipeline - 1
    waiting = _under_way(job) if last else 0.0
    whole = sizes.full if last and side.layout.sequence else 0.0  # gathered, to pick rows from
    return StageMemory(
        stage=stage,
        teacher_weights=weights,
        buffers=4 * job.padded_sequence * side.arch.head_dim + (sizes.stream if stage else 0.0),
        batch=8 * sizes.t,
        hidden=waiting,
        teacher_phase=peak + whole + waiting + (0 if last else sizes.stream),
        reserve=reserve,
        own=True,
    )


def _buffers(job: Job, stage: int) -> float:
    """The gather buffer of sequence parallel, each model's table of angles, and received states.

    A later stage holds on to the last input that it received, the student's with its gradient;
    recomputed layers of experts to theirs. Frozen weights gather into no buffer that stays.
    """
    sizes = Sizes.of(job, job.student)
    kept = 4 * job.padded_sequence * job.student.arch.head_dim + sizes.gathered
    kept += 2 * sizes.stream if stage > 0 else 0
    if job.teacher and not job.teacher_world:
        later = job.teacher.layout.pipeline > 1 if job.regrouped else stage > 0
        kept += 4 * job.padded_sequence * job.teacher.arch.head_dim
        kept += Sizes.of(job, job.teacher).stream if later else 0
    return kept + _held_by_routers(job, stage)


def _rollout(job: Job) -> float:
    """An embedded engine: the whole student and a key/value cache on every rank; or a sleeper.

    The cache is counted as if it stayed: the caching allocator keeps its blocks.
    """
    if job.rollout == "colocated":
        return SLEEPING_SERVER
    if job.rollout != "embedded":
        return 0.0
    side = job.student
    cache = 2 * side.arch.layers * side.model.key * side.itemsize
    tokens = job.rollout_batch * math.ceil(job.sequence)
    return side.model.parameters() * side.itemsize + cache * tokens
