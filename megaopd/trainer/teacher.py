"""A frozen teacher in the student's process groups that hands over hidden states, never logits.

H numbers a token instead of V; the loss applies the teacher's output layer chunk by chunk, on the
student's vocabulary partition.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from megaopd import platform
from megaopd.models.arch import Architecture
from megaopd.models.chunks import build_chunks
from megaopd.models.config import ModelConfig
from megaopd.models.convert import load_weights
from megaopd.parallel import Grid
from megaopd.trainer.batch import MicroBatch
from megaopd.trainer.step import forward_micro_batch, run_schedule


class Teacher:
    """Inference only: no gradient buffers and no optimizer.

    Args:
        vocab_rows: the student's padded vocabulary, so that both shards cover the same ids.
    """

    def __init__(
        self,
        config: ModelConfig,
        arch: Architecture,
        grid: Grid,
        *,
        vocab_rows: int,
        progress: Any = None,
    ) -> None:
        self.arch, self.grid = arch, grid
        chunks = build_chunks(arch, config, grid, vocab_rows=vocab_rows)
        self.chunks = [chunk.to(platform.device()) for chunk in chunks]
        load_weights(self.chunks, config, arch, grid, progress=progress)
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)

    def output_weight(self) -> Any:
        """[Vp, Ht] on the last stage."""
        return self.chunks[-1].output_weight()

    def hidden_states(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        """The teacher's last hidden states of each micro-batch, [T, Ht]; None where not last stage.

        Only the rows that the loss looks at are kept.
        """
        import torch

        def forward_step(iterator: Iterator[MicroBatch], stage: Any) -> tuple[Any, Any]:
            micro = next(iterator)
            return forward_micro_batch(stage, micro), partial(_select, micro)

        with torch.no_grad():
            kept = run_schedule(
                self.chunks, self.grid, micro_batches, forward_step, forward_only=True, collect=True
            )
        return kept or [None] * len(micro_batches)


def _select(micro: MicroBatch, hidden: Any, non_loss_data: bool = True) -> Any:
    return micro.select(hidden)
