"""What a run says about a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaopd.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """One model of the run, student or teacher."""

    # A Hugging Face checkpoint (config.json, *.safetensors, tokenizer), or a Megatron one that
    # `megaopd convert` or a training run wrote.
    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"  # parameters and activations
    vocab_multiple: int = 8  # the vocabulary is padded to a multiple of this times tensor parallel
    recompute: Literal["none", "full", "selective"] = "none"  # activation recomputation

    @property
    def is_megatron(self) -> bool:
        return (Path(self.path) / "manifest.json").is_file()

    @property
    def hf_dir(self) -> Path:
        """Where config.json and the tokenizer are; a Megatron checkpoint holds them in hf/."""
        return Path(self.path) / "hf" if self.is_megatron else Path(self.path)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the student, in place of training its weights."""

    rank: int = 0  # r; 0: no adapters, every weight is trained
    alpha: float = 32.0  # the adapter's output is multiplied by alpha / rank
    # Linear layers of every transformer layer. qkv and fc1 are fused matrices (q, k, v; gate, up)
    # with one adapter over the whole.
    targets: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = ("qkv", "proj", "fc1", "fc2")
    seed: int = 0  # of A's start, which is the same under every layout; B starts at zero

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora.rank = {self.rank}", expected="0 (off) or more")
        if self.rank and not self.targets:
            raise UserError(
                "lora.targets = []",
                expected="some of qkv, proj, fc1, fc2: nothing would be trained",
                fix="name a target, or set lora.rank=0",
            )
        if not self.alpha > 0:
            raise UserError(f"lora.alpha = {self.alpha}", expected="a number above 0")
