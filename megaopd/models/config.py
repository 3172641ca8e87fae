"""What a run says about a model."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, Self

from megaopd.errors import UserError

Fp8Recipe = Literal["none", "delayed", "current", "blockwise", "mxfp8"]


@dataclass(frozen=True)
class ModelConfig:
    """One model of the run, student or teacher."""

    # A Hugging Face checkpoint (config.json, *.safetensors, tokenizer), or a Megatron one that
    # `megaopd convert` or a training run wrote.
    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"  # parameters and activations
    vocab_multiple: int = 8  # the vocabulary is padded to a multiple of this times tensor parallel
    recompute: Literal["none", "full", "selective"] = "none"  # activation recomputation
    # FP8 matrix products in the linear layers, and what a tensor's scale is made from: the largest
    # magnitudes of earlier passes, the tensor itself, or its blocks of 128 (mxfp8: 32, Blackwell).
    # Transformer Engine's recipes on a GPU, the same numbers emulated without one (docs/fp8.md).
    fp8: Fp8Recipe = "none"
    # hybrid: gradients in e5m2, the rest in e4m3. "": hybrid; e4m3 for blockwise and mxfp8
    fp8_format: Literal["", "hybrid", "e4m3"] = ""
    fp8_first_last_bf16: int = 0  # so many first and so many last layers stay out of FP8
    fp8_history: int = 1024  # delayed: largest magnitudes that are remembered
    fp8_amax: Literal["max", "most_recent"] = "max"  # delayed: which of them makes the scale
    fp8_margin: int = 0  # delayed: scales are 2^margin smaller than they could be
    fp8_params: bool = False  # hold the matrices in FP8 too and gather them so; GPU only
    # Weight of the load-balancing loss of a mixture of experts, as a mean over the micro-batches of
    # the step; 0: the distillation loss alone decides.
    moe_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        self._check_fp8()

    def _check_fp8(self) -> None:
        """Refuse what the chosen recipe would ignore or cannot do. What depends on the machine is
        checked where the model is built (models/fp8.py)."""
        defaults = {f.name: f.default for f in fields(self) if f.name.startswith("fp8_")}
        changed = [name for name, value in defaults.items() if getattr(self, name) != value]
        delayed_only = {"fp8_history", "fp8_amax", "fp8_margin"}
        if self.fp8 == "none":
            ignored = changed
        else:
            ignored = [n for n in changed if n in delayed_only and self.fp8 != "delayed"]
        if ignored:
            raise UserError(
                f"{ignored[0]} = {getattr(self, ignored[0])} with fp8 = {self.fp8}",
                expected="settings that this recipe reads",
                fix=f"remove {ignored[0]}"
                + (", or set fp8=delayed" if ignored[0] in delayed_only else ", or choose an fp8"),
            )
        if self.fp8_first_last_bf16 < 0 or self.fp8_history < 1 or self.fp8_margin < 0:
            raise UserError(
                f"fp8_first_last_bf16 = {self.fp8_first_last_bf16}, fp8_history = "
                f"{self.fp8_history}, fp8_margin = {self.fp8_margin}",
                expected="0 or more layers and margin, a history of at least 1",
            )
        if self.fp8 == "delayed" and self.fp8_first_last_bf16:
            raise UserError(
                f"fp8_first_last_bf16 = {self.fp8_first_last_bf16} with fp8 = delayed",
                expected="0: megatron-core updates delayed scales once a pass, for all layers",
                fix="set fp8=current or blockwise, or fp8_first_last_bf16=0",
            )
        if self.fp8 == "mxfp8" and self.fp8_params:
            raise UserError(
                "fp8_params = true with fp8 = mxfp8",
                expected="false: megatron-core gathers them in the gradient buffer, into which the "
                "loss writes",
                fix="set fp8_params=false",
            )

    def without_fp8(self) -> Self:
        """The same model in its dtype alone."""
        plain = {f.name: f.default for f in fields(self) if f.name.split("_")[0] == "fp8"}
        return replace(self, **plain)

    @property
    def fp8_backward(self) -> Literal["e4m3", "e5m2"]:
        """The format of the gradients."""
        hybrid = self.fp8_format == "hybrid" or (
            not self.fp8_format and self.fp8 in ("delayed", "current")
        )
        return "e5m2" if hybrid else "e4m3"

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
