"""What is planned: models, how they lie on the ranks, the batch, the machine's software.

Sizes are of one sequence or one micro-batch where a name does not say otherwise.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from megaopd.errors import UserError
from megaopd.models.arch import Architecture, check_layout
from megaopd.parallel import ParallelConfig
from megaopd.plan.models import Model

# Whose modules a layer is made of: Transformer Engine's on a GPU, megatron-core's local ones with
# the project's norm and attention on a CPU.
Spec = Literal["te", "local"]


@dataclass(frozen=True)
class Side:
    """One model of the run and its layout."""

    model: Model
    layout: ParallelConfig
    itemsize: int = 2  # bytes of a weight and of an activation
    recompute: Literal["none", "full", "selective"] = "none"
    vocab_multiple: int = 8

    @property
    def arch(self) -> Architecture:
        return self.model.arch

    @property
    def tensor(self) -> int:
        return self.layout.tensor

    @property
    def ranks_of_sequence(self) -> int:
        """Tensor ranks that share the rows of a sequence outside the split products."""
        return self.layout.tensor if self.layout.sequence else 1

    def data(self, world: int) -> int:
        """Data-parallel size."""
        return world // self.layout.model_parallel

    def expert_data(self, world: int) -> int:
        """Ranks that hold the same experts: these are split over all ranks of a pipeline stage,
        each of them on one, whatever tensor and context parallel are (parallel.make_grid)."""
        return max(1, world // (self.layout.pipeline * self.layout.expert))

    def stage_layers(self, stage: int) -> range:
        """Layers of a pipeline stage, as if its virtual chunks were one."""
        count = self.arch.layers // self.layout.pipeline
        return range(stage * count, (stage + 1) * count)

    def sparse_layers(self, stage: int) -> int:
        return sum(self.arch.is_sparse(layer) for layer in self.stage_layers(stage))


@dataclass(frozen=True)
class Job:
    """One optimizer step on `world` ranks."""

    student: Side
    teacher: Side | None  # None: none, or one on servers
    world: int  # the student's ranks
    samples: int  # sequences of a step
    sequence: int  # tokens of a sequence, padded
    rows: int  # of them, those that the loss looks at: the response
    micro_batch: int = 1  # sequences of one forward pass
    chunk: int = 0  # rows whose logits exist at once; 0: losses/engine.py's choice
    spec: Spec = "te"
    distributed: bool = True  # optimizer state split over data-parallel ranks
    laws: int = 1  # sets of terms that need a copy of the logits (losses/plan.py)
    old_log_probs: bool = False  # one more forward pass, for ratios to the old weights
    epochs: int = 1  # passes of training over the samples of a rollout
    # Where responses are sampled: inside the ranks, on servers of the same GPUs, or on others.
    rollout: Literal["none", "embedded", "colocated", "separate"] = "none"
    rollout_batch: int = 0  # sequences in the embedded engine's key/value cache
    placement: Literal["same", "regrouped", "separate"] = "same"  # of the teacher
    teacher_world: int = 0  # separate: the teacher's ranks
    window: int = 2  # micro-batches that may be under way from them to a student's rank
    held: bool = False  # the objective looks at a step's hidden states more than once
    scored_first: bool = False  # and at all of them before the update

    @property
    def teacher_ranks(self) -> int:
        return self.teacher_world or self.world

    @property
    def regrouped(self) -> bool:
        """Whether the teacher has a layout of its own: its hidden states then move between ranks,
        and its output layer is apart from it, on the student's partition of the vocabulary."""
        return self.placement != "same"

    @property
    def together(self) -> list[Side]:
        """The models that the student's layout is for."""
        return [self.student, *([self.teacher] if self.teacher and not self.regrouped else [])]

    @property
    def micro_batches(self) -> int:
        """Of a step, on one data-parallel rank."""
        return math.ceil(self.samples / (self.micro_batch * self.student.data(self.world)))

    @property
    def padded_sequence(self) -> int:
        """The sequence rounded up as a run pads it."""
        step = self.student.layout.sequence_multiple
        return -(-self.sequence // step) * step

    def tokens(self, side: Side) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        step = side.layout.sequence_multiple
        padded = -(-self.padded_sequence // step) * step
        return self.micro_batch * padded // side.layout.context

    def local_rows(self, side: Side) -> int:
        """Rows of a micro-batch's hidden states that a rank of the last stage keeps for the loss.

        Under sequence parallel a rank keeps its part of all rows, without it those with a label.
        """
        if side.layout.sequence:
            return self.tokens(side) // side.tensor
        return self.micro_batch * self.rows // side.layout.context

    @property
    def vocab_rows(self) -> int:
        """Padded vocabulary over all tensor ranks: one for both models."""
        sides = [self.student, *([self.teacher] if self.teacher else [])]
        step = self.student.vocab_multiple * self.student.tensor
        return max(-(-side.arch.vocab // step) * step for side in sides)

    def table_rows(self, side: Side) -> int:
        """Padded rows of a model's embedding over its tensor ranks."""
        if not self.regrouped:
            return self.vocab_rows
        step = side.vocab_multiple * side.tensor
        return -(-side.arch.vocab // step) * step

    @property
    def vocab(self) -> int:
        """Ids that are real in both models."""
        return min([self.student.arch.vocab, *([self.teacher.arch.vocab] if self.teacher else [])])

    def with_layout(self, layout: ParallelConfig) -> "Job":
        """The same step under another layout: of both models, or the student's alone where the
        teacher has one of its own."""
        teacher = self.teacher
        if teacher and not self.regrouped:
            teacher = replace(teacher, layout=layout)
        return replace(self, student=replace(self.student, layout=layout), teacher=teacher)


def misfit(side: Side, world: int) -> str:
    """Why the model cannot be laid out like this; empty where it can."""
    layout = side.layout
    splits = [
        (world, layout.model_parallel, "tensor x pipeline x context"),
        (world, layout.pipeline * layout.expert, "pipeline x expert"),
    ]
    for number, size, name in splits:
        if number % size:
            return f"{side.model.name}: {number} ranks do not divide by {name} = {size}"
    try:
        check_layout(side.arch, layout, who=side.model.name)
    except UserError as err:
        return err.got
    return ""


def check_job(job: Job) -> None:
    """Refuse a layout that cannot be built."""
    for side, ranks in ((job.student, job.world), (job.teacher, job.teacher_ranks)):
        reason = misfit(side, ranks) if side else ""
        if reason:
            raise UserError(
                reason,
                expected="a layout that divides the models and the ranks",
                fix="change [parallel], --teacher-layout or --gpus",
            )
