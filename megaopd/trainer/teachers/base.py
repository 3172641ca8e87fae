"""What a teacher is to the student's update, and its output layer on the student's ranks.

Shapes: T rows of a micro-batch that the loss looks at, Ht the teacher's hidden size, Vp = V/TP.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megaopd import platform
from megaopd.models.arch import Architecture
from megaopd.models.config import ModelConfig
from megaopd.models.rules import VocabRows
from megaopd.models.sharded import load_sharded
from megaopd.models.weights import HfReader
from megaopd.parallel import Grid
from megaopd.trainer.batch import MicroBatch


class BaseTeacher:
    """Scores a step's micro-batches. Inference only: no gradient buffers and no optimizer."""

    arch: Architecture  # of the model, where it is one

    def hidden_states(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        """For each micro-batch [T, Ht], or a function that gives it; None where not last stage.

        [T/TP, Ht] under sequence parallel. Functions are called once each, in order. A collective
        over the student's ranks.
        """
        raise NotImplementedError

    def output_weight(self, micro: MicroBatch | None = None) -> Any:
        """[Vp, Ht] on the last stage: the student's partition of the vocabulary.

        micro: whose teacher, where there are several.
        """
        raise NotImplementedError

    def softcap(self, micro: MicroBatch | None = None) -> float | None:
        """Of the teacher's logits; micro as above."""
        return self.arch.final_softcap

    def after_update(self, *, epoch: int = 0) -> None:
        """The student has taken a step; `epoch` of the prompts that come next."""

    def sharded_state(self) -> dict[str, Any]:
        """What a checkpoint needs of it, as a sharded state dict; {} where nothing changes."""
        return {}

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take what `sharded_state` saved."""

    def parameters(self) -> Iterable[Any]:
        """Weights that this rank holds for it, to be put away while others need the memory."""
        return ()

    def metrics(self) -> dict[str, float]:
        """Of what happened on all ranks since the last call, as it is logged. A collective."""
        return {}

    def asked_to_stop(self) -> bool:
        """Whether ranks of its own were asked to end the run; for rank 0 to look at."""
        return False

    def close(self, *, stopped: bool = False) -> None:
        """The run is over, or (stopped) ends early because it was asked to."""


def load_output_layer(
    config: ModelConfig, arch: Architecture, grid: Grid, *, vocab_rows: int
) -> Any:
    """A teacher's output layer on the student's partition of the vocabulary.

    Hidden states move and weights do not: wherever the teacher runs, its output layer lies where
    the loss is. A collective over the grid (only last stages read a Hugging Face checkpoint).

    Returns:
        [Vp, Ht] on the last stage, None elsewhere.
    """
    import torch
    from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

    rows = vocab_rows // grid.tp_size
    names = ("embedding.word_embeddings.weight", "model.embed_tokens.weight")
    name, hf_name = names if arch.tied else ("output_layer.weight", "lm_head.weight")
    dtype = getattr(torch, config.dtype)
    weight = torch.empty(rows, arch.hidden, dtype=dtype, device=platform.device())
    if config.is_megatron:
        shard = make_tp_sharded_tensor_for_checkpoint(
            weight,
            name,
            allow_shape_mismatch=True,
            replica_id=(grid.pp_rank, 0, grid.dp_rank),
            tp_group=grid.groups.tp,
            dp_cp_group=grid.groups.dp_cp,
        )
        loaded = load_sharded({"model": {name: shard}}, Path(config.path))
        weight = loaded["model"][name]
    elif grid.is_last_stage:
        reader = HfReader(config.path)
        reader.check_names(arch)
        rule = VocabRows(rows, arch.vocab)
        loaded = rule.load(reader.read, [hf_name], grid.tp_size, grid.tp_rank)
        weight.copy_(loaded)
    return weight.requires_grad_(False) if grid.is_last_stage else None
