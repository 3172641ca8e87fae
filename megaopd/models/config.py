"""What a run says about a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """One model of the run, student or teacher."""

    # A Hugging Face checkpoint (config.json, *.safetensors, tokenizer), or a Megatron one that
    # `megaopd convert` or a training run wrote.
    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"  # parameters and activations
    vocab_multiple: int = 8  # the vocabulary is padded to a multiple of this times tensor parallel
    recompute: Literal["none", "full", "selective"] = "none"  # activation recomputation
    # Weight of the load-balancing loss of a mixture of experts, as a mean over the micro-batches of
    # the step; 0: the distillation loss alone decides.
    moe_aux_loss_coef: float = 0.0

    @property
    def is_megatron(self) -> bool:
        return (Path(self.path) / "manifest.json").is_file()

    @property
    def hf_dir(self) -> Path:
        """Where config.json and the tokenizer are; a Megatron checkpoint holds them in hf/."""
        return Path(self.path) / "hf" if self.is_megatron else Path(self.path)
