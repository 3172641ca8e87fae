"""What is planned: models, how they lie on the ranks, the batch, the machine's software.

Sizes are of one sequence or one micro-batch where a name does not say otherwise.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from megaopd.errors import UserError
from megaopd.parallel import ParallelConfig
from megaopd.plan.models import ModelShape

# Whose modules a layer is made of: Transformer Engine's on a GPU, megatron-core's local ones with
# the project's norm and attention on a CPU.
Spec = Literal["te", "local"]


@dataclass(frozen=True)
class Side:
    """One model of the run and its layout."""

    shape: ModelShape
    layout: ParallelConfig
    itemsize: int = 2  # bytes of a weight and of an activation
    recompute: Literal["none", "full", "selective"] = "none"
    vocab_multiple: int = 8

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
        """Ranks that hold the same experts, which are whole and split over all ranks of a stage."""
        return max(1, world // (self.layout.pipeline * self.layout.expert))

    def stage_layers(self, stage: int) -> range:
        """Layers of a pipeline stage, as if its virtual chunks were one."""
        count = self.shape.layers // self.layout.pipeline
        return range(stage * count, (stage + 1) * count)

    def has_sparse(self, stage: int) -> bool:
        return any(self.shape.is_sparse(layer) for layer in self.stage_layers(stage))


@dataclass(frozen=True)
class Job:
    """One optimizer step on `world` ranks."""

    student: Side
    teacher: Side | None  # on the same ranks; None: none, or one on servers
    world: int
    samples: int  # sequences of a step
    sequence: int  # tokens of a sequence, padded
    rows: int  # of them, those that the loss looks at: the response
    micro_batch: int = 1  # sequences of one forward pass
    chunk: int = 0  # rows whose logits exist at once; 0: losses/engine.py's choice
    spec: Spec = "te"
    distributed: bool = True  # optimizer state split over data-parallel ranks
    laws: int = 1  # sets of terms that need a copy of the logits (losses/plan.py)
    old_log_probs: bool = False  # one more forward pass, for importance weights
    # Where responses are sampled: inside the ranks, on servers of the same GPUs, or on others.
    rollout: Literal["none", "embedded", "colocated", "separate"] = "none"
    rollout_batch: int = 0  # sequences in the embedded engine's key/value cache

    @property
    def micro_batches(self) -> int:
        """Of a step, on one data-parallel rank."""
        return math.ceil(self.samples / (self.micro_batch * self.student.data(self.world)))

    @property
    def padded_sequence(self) -> int:
        """The sequence rounded up to what tensor and context parallelism divide it by."""
        step = self.student.tensor * (2 * self.student.layout.context)
        step = step if self.student.layout.context > 1 else self.student.tensor
        return -(-self.sequence // step) * step

    def tokens(self, side: Side) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.micro_batch * self.padded_sequence // side.layout.context

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
        return max(-(-side.shape.vocab // step) * step for side in sides)

    @property
    def vocab(self) -> int:
        """Ids that are real in both models."""
        return min(
            [self.student.shape.vocab, *([self.teacher.shape.vocab] if self.teacher else [])]
        )

    def with_layout(self, layout: ParallelConfig) -> "Job":
        """The same step with both models under another layout."""
        teacher = replace(self.teacher, layout=layout) if self.teacher else None
        return replace(self, student=replace(self.student, layout=layout), teacher=teacher)


def misfit(side: Side, world: int, sequence: int) -> str:
    """Why the model cannot be laid out like this; empty where it can."""
    shape, layout = side.shape, side.layout
    splits = [
        ("ranks", world, "tensor x pipeline x context", layout.model_parallel),
        ("attention heads", shape.heads, "tensor", layout.tensor),
        ("key/value heads", shape.kv_heads, "tensor", layout.tensor),
        ("MLP columns", shape.ffn, "tensor", layout.tensor),
        ("layers", shape.layers, "pipeline x virtual", layout.pipeline * layout.virtual),
    ]
    # Also of a dense model beside a sparse one, whose ranks are grouped alike.
    splits.append(("ranks of a stage", world // layout.pipeline or 1, "expert", layout.expert))
    if shape.experts:
        splits.append(("experts", shape.experts, "expert", layout.expert))
        if layout.tensor > 1 and not layout.sequence:
            return "experts with tensor parallel need sequence parallel: each rank routes its own"
    if layout.context > 1 and sequence % (2 * layout.context):
        return f"{sequence} tokens do not divide by 2 x context {layout.context}"
    for what, number, name, size in splits:
        if number % size:
            return f"{shape.name}: {number} {what} do not divide by {name} = {size}"
    return ""


def check_job(job: Job) -> None:
    """Refuse a layout that cannot be built."""
    for side in (job.student, job.teacher):
        reason = misfit(side, job.world, job.padded_sequence) if side else ""
        if reason:
            raise UserError(
                reason,
                expected="a layout that divides the models and the ranks",
                fix="change [parallel], --teacher-layout or --gpus",
            )
