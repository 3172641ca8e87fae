"""Seconds of a rollout's updates: an estimate from peaks and assumed shares of them (hardware.py).

Good for ranking layouts. Nothing of it was measured on a GPU, and sampling is not part of it.
"""

from dataclasses import dataclass

from megaopd.plan.communication import Traffic
from megaopd.plan.hardware import CALL_US, EFFICIENCY, LINK_EFFICIENCY, Gpu
from megaopd.plan.job import Job, Side


@dataclass(frozen=True)
class Seconds:
    """Parts of a step that are taken to follow one another: no overlap is assumed.

    teacher: on ranks of its own it works beside the student's passes; what counts then is how much
    longer it takes.
    """

    student: float
    teacher: float
    loss: float
    bubble: float
    node: float  # collectives inside a node
    network: float

    @property
    def total(self) -> float:
        own = self.student + self.teacher + self.loss
        return own + self.bubble + self.node + self.network


def forward_flops(side: Side, tokens: float, sequence: int) -> float:
    """Of all layers for this many tokens, in sequences of one length, causal."""
    arch = side.arch
    tables = arch.vocab * arch.hidden * (1 if arch.tied else 2)
    products = 2 * (side.model.parameters(active=True) - tables)
    # Half of 4: what a token looks back at.
    attention = 2 * arch.layers * side.model.query * sequence
    return tokens * (products + attention)


def estimate(job: Job, gpu: Gpu, traffic: list[Traffic]) -> Seconds:
    """The updates of one rollout: job.epochs over its samples, the teacher's pass in each."""
    side, rate = job.student, gpu.flops * EFFICIENCY * job.world
    if side.itemsize == 4:
        rate /= 2  # fp32 through TF32
    filled = job.micro_batches * job.micro_batch * side.data(job.world)
    tokens = float(filled * job.padded_sequence)
    passes = job.epochs * (3 + (side.recompute == "full")) + job.old_log_probs
    student = passes * forward_flops(side, tokens, job.padded_sequence) / rate
    rows = filled * (job.padded_sequence if side.layout.sequence else job.rows)
    widths = 3 * side.arch.hidden + (job.teacher.arch.hidden if job.teacher else 0)
    # The output layers work on the ranks of the last stage alone.
    loss = job.epochs * 2 * rows * widths * job.vocab * side.layout.pipeline / rate
    teacher = 0.0
    if job.teacher:
        share = job.teacher_ranks / job.world
        flops = forward_flops(job.teacher, tokens, job.padded_sequence)
        teacher = job.epochs * flops / (rate * share)
    idle = (side.layout.pipeline - 1) / (job.micro_batches * side.layout.virtual)
    mine = [one for one in traffic if not (job.teacher_world and of_teacher(one))]
    node, network = _links(mine, gpu)
    if not job.teacher or not job.teacher_world:
        return Seconds(student, teacher, loss, idle * (student + teacher), node, network)
    bubble = idle * student
    jobs = job.micro_batches * side.data(job.world) / job.teacher.data(job.teacher_world)
    teacher *= 1 + (job.teacher.layout.pipeline - 1) / jobs
    teacher += sum(_links([one for one in traffic if of_teacher(one)], gpu))
    if not job.scored_first:
        own = [one for one in mine if one.name.startswith(("student ", "loss "))]
        beside = student * (passes - job.old_log_probs) / passes + loss + bubble
        teacher = max(0.0, teacher - beside - sum(_links(own, gpu)))
    return Seconds(student, teacher, loss, bubble, node, network)


def of_teacher(one: Traffic) -> bool:
    """Whether it is among the teacher's ranks."""
    return one.name.startswith("teacher ") and one.name != "teacher hidden states"


def _links(traffic: list[Traffic], gpu: Gpu) -> tuple[float, float]:
    """Seconds inside a node and across."""
    node = network = 0.0
    for one in traffic:
        crosses = one.crosses(gpu)
        link = gpu.network if crosses else gpu.node_link
        spent = one.sent / (link * LINK_EFFICIENCY) + one.calls * CALL_US * 1e-6
        node, network = (node, network + spent) if crosses else (node + spent, network)
    return node, network
