"""A frozen teacher in the student's process groups that hands over hidden states, never logits.

H numbers a token instead of V; the loss applies the teacher's output layer chunk by chunk, on the
student's vocabulary partition.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from megaopd import platform
from megaopd.errors import UserError
from megaopd.models.arch import Architecture
from megaopd.models.chunks import build_chunks
from megaopd.models.config import ModelConfig
from megaopd.models.convert import load_weights
from megaopd.parallel import Grid
from megaopd.trainer.batch import MicroBatch
from megaopd.trainer.step import forward_micro_batch, run_schedule
from megaopd.trainer.teachers.base import BaseTeacher
from megaopd.trainer.teachers.exchange import Exchange, Turn, score_and_exchange
from megaopd.worlds import Layout


class HeldTeacher(BaseTeacher):
    """A model of its own in the student's process groups; what makes one sets the fields."""

    grid: Grid
    chunks: list[Any]  # of this rank's stage
    scorer: "InPlace"
    turn: Turn

    def output_weight(self, micro: MicroBatch | None = None) -> Any:
        return self.chunks[-1].output_weight()

    def hidden_states(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        with self.turn:
            return self.scorer(micro_batches)

    def parameters(self) -> Iterable[Any]:
        return (parameter for chunk in self.chunks for parameter in chunk.parameters())

    def between_turns(self) -> Iterator[Any]:
        """What is put away: all but the output layer, which the loss reads."""
        kept = self.output_weight() if self.grid.is_last_stage else None
        return (parameter for parameter in self.parameters() if parameter is not kept)


class Teacher(HeldTeacher):
    """Inference only: no gradient buffers and no optimizer.

    Args:
        vocab_rows: the student's padded vocabulary, so that both shards cover the same ids.
        offload: keep the weights on the host between its turns; the output layer, which the loss
            reads, stays.
    """

    def __init__(
        self,
        config: ModelConfig,
        arch: Architecture,
        grid: Grid,
        *,
        vocab_rows: int,
        progress: Any = None,
        offload: bool = False,
    ) -> None:
        self.arch, self.grid = arch, grid
        chunks = build_chunks(arch, config, grid, vocab_rows=vocab_rows)
        self.chunks = [chunk.to(platform.device()) for chunk in chunks]
        load_weights(self.chunks, config, arch, grid, progress=progress)
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)
        self.scorer = InPlace(self.chunks, arch, grid)
        self.turn = Turn(self.between_turns, enabled=offload)


class InPlace:
    """Scores with a model in the student's own groups. Making it is a collective.

    Args:
        chunks: of this rank's stage.
    """

    def __init__(self, chunks: list[Any], arch: Architecture, grid: Grid) -> None:
        self.chunks, self.arch, self.grid = chunks, arch, grid
        self.exchange = Exchange(grid, grid)

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        """As BaseTeacher.hidden_states.

        The student's micro-batches go through the teacher as they are where it reads the same
        sequences; a teacher with prompts of its own gets micro-batches of its own.

        Raises:
            UserError: prompts of its own under context parallelism.
        """
        if any(sample.privileged for sample in micro_batches[0].samples):
            if self.grid.cp_size > 1:
                raise UserError(
                    f"teacher prompts with parallel.context = {self.grid.cp_size}",
                    expected="a teacher whose sequences are not split",
                    fix="set teacher.placement=regrouped or separate, or parallel.context=1",
                )
            return score_and_exchange(
                self.chunks,
                Layout(self.grid),
                micro_batches,
                self.exchange,
                max_positions=self.arch.max_positions,
            )
        return same_sequences(self.chunks, self.grid, micro_batches)


def same_sequences(chunks: list[Any], grid: Grid, micro_batches: Sequence[MicroBatch]) -> list[Any]:
    """Last hidden states of each micro-batch, [T, Ht]; None where not last stage.

    Only the rows that the loss looks at are kept.
    """
    import torch

    def forward_step(iterator: Iterator[MicroBatch], stage: Any) -> tuple[Any, Any]:
        micro = next(iterator)
        return forward_micro_batch(stage, micro), partial(_select, micro)

    with torch.no_grad():
        kept = run_schedule(
            chunks, grid, micro_batches, forward_step, forward_only=True, collect=True
        )
    return kept or [None] * len(micro_batches)


def _select(micro: MicroBatch, hidden: Any, non_loss_data: bool = True) -> Any:
    return micro.select(hidden)
