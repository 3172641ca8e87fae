"""What one rank sends in one optimizer step, collective by collective.

Volumes are those of ring algorithms: R ranks that all-reduce n bytes send 2 (R-1)/R n each,
all-gather and reduce-scatter half of it, an all-to-all (R-1)/R of what they hold.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megaopd.plan.hardware import Gpu
from megaopd.plan.head import chunk_rows
from megaopd.plan.job import Job, Side
from megaopd.plan.layer import Sizes
from megaopd.plan.memory import stage_weights

# losses/chunk.py: one all-gather of 5 numbers a row for rkl; others cost a few more.
SCALAR_BYTES = 20


@dataclass(frozen=True)
class Traffic:
    """One kind of collective over a step, on a rank of the busiest stage."""

    name: str
    ranks: int
    sent: float  # bytes
    calls: float
    stride: int = 1  # distance of neighbours in the rank order: decides the link

    def crosses(self, gpu: Gpu) -> bool:
        """Whether the group reaches beyond a node."""
        return self.ranks * self.stride > gpu.per_node


def step_traffic(job: Job) -> list[Traffic]:
    """Everything that is sent for a rollout's samples in all epochs, and the weights for rollout
    servers; old log-probs are taken once."""
    passes, old = job.micro_batches * job.epochs, job.micro_batches * job.old_log_probs
    forwards = passes * (1 + (job.student.recompute == "full")) + old
    found = [
        *_tensor("student", job, job.student, forwards, passes),
        *_embedding("student", job, job.student, passes + old, passes),
        *_pipeline("student", job, job.student, passes * 2 + old),
        *_experts("student", job, job.student, forwards + passes),
        *_context("student", job, job.student, forwards + 2 * passes),
        *_data(job),
        *_loss(job, passes),
    ]
    if job.teacher:
        side = job.teacher
        # With fewer data-parallel ranks than the student's, each takes more micro-batches.
        own = math.ceil(passes * job.student.data(job.world) / side.data(job.teacher_ranks))
        found += [
            *_tensor("teacher", job, side, own, 0),
            *_embedding("teacher", job, side, own, 0),
            *_pipeline("teacher", job, side, own),
            *_experts("teacher", job, side, own),
            *_context("teacher", job, side, own),
            *_handover(job, passes),
        ]
    if job.rollout in ("colocated", "separate"):
        sent = job.student.model.parameters() * job.student.itemsize
        found.append(Traffic("weight sync (rank 0)", 2, sent, 1, job.world // 2))
    return [one for one in found if one.sent > 0]


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _tensor(who: str, job: Job, side: Side, forwards: int, backwards: int) -> Iterator[Traffic]:
    """Of split products: two all-reduces a layer and pass; or gathers and scatters in their place.

    Under sequence parallel backward gathers the products' inputs once more.
    """
    if side.tensor == 1:
        return
    sizes, layers = Sizes.of(job, side), side.arch.layers // side.layout.pipeline
    units = layers * (4 * forwards + (6 if side.layout.sequence else 4) * backwards)
    calls = units if side.layout.sequence else units / 2
    yield Traffic(f"{who} tensor", side.tensor, units * _ring(side.tensor) * sizes.full, calls)


def _embedding(who: str, job: Job, side: Side, forwards: int, backwards: int) -> Iterator[Traffic]:
    """Of the split embedding: an all-reduce; under sequence parallel a scatter, then a gather."""
    if side.tensor > 1:
        units = (forwards + backwards) if side.layout.sequence else 2 * forwards
        calls = units if side.layout.sequence else forwards
        sent = units * _ring(side.tensor) * Sizes.of(job, side).full
        yield Traffic(f"{who} embedding", side.tensor, sent, calls)


def _pipeline(who: str, job: Job, side: Side, passes: int) -> Iterator[Traffic]:
    if side.layout.pipeline > 1:
        sent = passes * side.layout.virtual * Sizes.of(job, side).stream
        ranks = job.teacher_ranks if side is job.teacher else job.world
        stride = ranks // side.layout.pipeline
        yield Traffic(f"{who} pipeline", 2, sent, passes * side.layout.virtual, stride)


def _experts(who: str, job: Job, side: Side, passes: int) -> Iterator[Traffic]:
    """Dispatch and combine; passes: forward and backward ones together."""
    layers = max(side.sparse_layers(stage) for stage in range(side.layout.pipeline))
    if not layers or side.layout.expert == 1:
        return
    sizes = Sizes.of(job, side)
    experts = side.arch.experts
    assert experts is not None
    rows = sizes.ts * experts.top_k * side.arch.hidden * sizes.e
    # Neighbours of the stage, tensor ranks among them: each sends rows of its own.
    sent = 2 * passes * layers * _ring(side.layout.expert) * rows
    yield Traffic(f"{who} experts", side.layout.expert, sent, 2 * passes * layers)


def _context(who: str, job: Job, side: Side, passes: int) -> Iterator[Traffic]:
    """Keys and values once around the ring, a layer and pass; their gradients in backward."""
    ranks = side.layout.context
    if ranks > 1:
        sizes, layers = Sizes.of(job, side), side.arch.layers // side.layout.pipeline
        sent = passes * layers * (ranks - 1) * 2 * sizes.wide(sizes.key)
        yield Traffic(f"{who} context", ranks, sent, passes * layers * (ranks - 1), side.tensor)


def _data(job: Job) -> Iterator[Traffic]:
    """Gradients in fp32 once an epoch, and the new weights where the optimizer is split."""
    side = job.student
    stages = range(side.layout.pipeline)
    weights = [stage_weights(side, stage, vocab_rows=job.vocab_rows) for stage in stages]
    heaviest = max(weights, key=lambda w: w.all)
    dense, experts = side.data(job.world) * side.layout.context, side.expert_data(job.world)
    back = side.itemsize if job.distributed else 4
    for name, ranks, numbers, stride in (
        ("gradients and weights", dense, heaviest.dense, side.tensor),
        ("experts' gradients and weights", experts, heaviest.experts, side.layout.expert),
    ):  # fmt: skip
        if ranks > 1:
            sent = job.epochs * _ring(ranks) * numbers * (4 + back)
            yield Traffic(name, ranks, sent, 2 * job.epochs, stride)


def _loss(job: Job, passes: int) -> Iterator[Traffic]:
    """Scalars of the split vocabulary, and hidden states where tensor ranks hold parts of them."""
    side = job.student
    if side.tensor == 1:
        return
    local = job.local_rows(side)
    rows = local * side.ranks_of_sequence
    chunks = -(-rows // chunk_rows(job)) * passes
    sent = (side.tensor - 1) * rows * SCALAR_BYTES * passes
    yield Traffic("loss scalars", side.tensor, sent, chunks)
    sent = 2 * _ring(side.tensor) * rows * side.arch.hidden * side.itemsize * passes
    if side.layout.sequence and job.teacher:
        teacher = job.teacher.arch.hidden * job.teacher.itemsize
        sent += _ring(side.tensor) * rows * teacher * passes
    yield Traffic("loss hidden states", side.tensor, sent, 2 * chunks)


def _handover(job: Job, passes: int) -> Iterator[Traffic]:
    """Hidden states between two layouts; nothing where teacher and student share one."""
    assert job.teacher is not None
    if job.regrouped:
        rows = job.local_rows(job.student) * job.student.ranks_of_sequence * passes
        sent = rows * job.teacher.arch.hidden * job.teacher.itemsize
        stride = job.world if job.teacher_world else job.world // 2
        yield Traffic("teacher hidden states", 2, sent, passes, stride)
