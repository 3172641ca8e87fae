"""Bytes of the loss: chunks of two models' logits, and the hidden states that wait for them.

What losses/head_pass.py allocates: a logits buffer for each model, made once; the hidden gradient;
and, a chunk at a time, the products that go into them. Full logits never exist.
"""

from dataclasses import dataclass

from megaopd.plan.job import Job, Side, Spec

# losses/engine.py's, by the device that each layer spec runs on; a test compares them.
CHUNK_ELEMENTS: dict[Spec, int] = {"local": 1 << 23, "te": 1 << 27}
MIN_CHUNK = 128


@dataclass(frozen=True)
class Head:
    """Bytes on a rank of the last stage, for one micro-batch."""

    chunk: int  # rows whose logits exist at once
    logits: float  # the buffers
    working: float  # beside them, at the worst moment of a chunk
    selected: float  # the student's rows, where they are a copy
    gradient: float  # of the student's rows: made in the forward pass, kept for backward

    @property
    def peak(self) -> float:
        return self.logits + self.working + self.selected + self.gradient


def chunk_rows(job: Job) -> int:
    """Rows of a chunk, over all tensor ranks."""
    side = job.student
    if job.chunk:
        size = job.chunk
    else:
        width = job.vocab_rows // side.tensor
        size = max(MIN_CHUNK, CHUNK_ELEMENTS[job.spec] // width // MIN_CHUNK * MIN_CHUNK)
    split = side.ranks_of_sequence
    return split * min(max(1, size // split), job.local_rows(side))


def head_bytes(job: Job) -> Head:
    """The fused loss of one micro-batch, with gradients."""
    side, e = job.student, job.student.itemsize
    width = min(job.vocab, job.vocab_rows) / side.tensor
    rows, chunk = job.local_rows(side), chunk_rows(job)
    hidden = rows * side.arch.hidden * e
    models = [side, *([job.teacher] if job.teacher else [])]
    # Kernels on a GPU scale the products as they read them; elsewhere, and where terms see
    # different laws, logits are fp32.
    logit = e if job.spec == "te" and job.laws == 1 else 4
    elements = chunk * width
    # A product that is narrower than its buffer is a tensor of its own, before and after; so is
    # the weight gradient of a chunk, before it is added to its fp32 sum.
    narrow = elements * e if logit != e else 0.0
    weight = job.vocab_rows / side.tensor * side.arch.hidden * e if e != 4 else 0.0
    gathered = chunk * e * side.arch.hidden if side.layout.sequence else 0.0
    teacher_chunk = 0.0
    if job.teacher and side.layout.sequence:
        teacher_chunk = chunk * job.teacher.arch.hidden * job.teacher.itemsize
    return Head(
        chunk=chunk,
        logits=elements * logit * len(models) * job.laws,
        working=narrow + weight + 2 * chunk * side.arch.hidden * e + gathered + teacher_chunk,
        selected=0.0 if side.layout.sequence else hidden,
        gradient=hidden,
    )


def waiting_hidden(job: Job) -> float:
    """The teacher's hidden states on a rank of the last stage: of a whole step; from ranks of its
    own, of the micro-batches under way and the one at hand, unless all are held."""
    if job.teacher is None:
        return 0.0
    teacher: Side = job.teacher
    micro = job.local_rows(job.student) * teacher.arch.hidden * teacher.itemsize
    if job.held or not job.teacher_world:
        return job.micro_batches * micro
    # Without sequence parallel a tensor rank receives its part, and puts together that at hand.
    part = micro if job.student.layout.sequence else micro / job.student.tensor
    return micro + min(job.window, job.micro_batches - 1) * part
