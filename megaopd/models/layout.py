"""Which layouts divide a model."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megaopd.errors import UserError
from megaopd.models.config import LoraConfig
from megaopd.parallel import ParallelConfig

if TYPE_CHECKING:
    from megaopd.models.arch import Architecture


def padded_vocab(vocab: int, tensor: int, multiple: int) -> int:
    """The vocabulary rounded up so that every tensor rank holds the same number of rows."""
    step = multiple * tensor
    return (vocab + step - 1) // step * step


def check_layout(arch: "Architecture", parallel: ParallelConfig, *, who: str) -> None:
    """Refuse a layout that does not divide the model, before anything is built."""
    tensor = parallel.tensor
    _check_experts(arch, parallel, who)
    parts = [("attention heads", arch.heads), ("key/value heads", arch.kv_heads)]
    if arch.experts is None or not all(arch.experts.sparse):
        parts.append(("MLP columns", arch.ffn))
    if arch.experts and arch.experts.shared_ffn:
        parts.append(("MLP columns of the shared experts", arch.experts.shared_ffn))
    for what, number in parts:
        _check_divides(
            number,
            tensor,
            f"{who}: {number} {what} with tensor parallel {tensor}",
            f"a tensor size that divides the {what}",
            lambda n: f"use tensor parallel {n}",
            also=arch.heads,
        )
    chunks = f" x {parallel.virtual} chunks" if parallel.virtual > 1 else ""
    _check_divides(
        arch.layers,
        parallel.pipeline * parallel.virtual,
        f"{who}: {arch.layers} layers with pipeline parallel {parallel.pipeline}{chunks}",
        "a pipeline size (times chunks) that divides the layers",
        lambda n: f"use one of {n}",
    )


def _check_experts(arch: "Architecture", parallel: ParallelConfig, who: str) -> None:
    expert = parallel.expert
    if arch.experts is None:
        return  # beside a mixture of experts, a dense model may share its layout
    _check_divides(
        arch.experts.count,
        expert,
        f"{who}: {arch.experts.count} experts with expert parallel {expert}",
        "an expert size that divides the experts",
        lambda n: f"use expert parallel {n}",
    )
    if parallel.tensor > 1 and not parallel.sequence:
        raise UserError(
            f"{who}: {arch.family} with tensor parallel {parallel.tensor} and parallel.sequence = "
            "false",
            expected="sequence parallel: each tensor rank routes its own tokens to the experts",
            fix="set parallel.sequence=true",
        )


def _check_divides(
    number: int,
    size: int,
    got: str,
    expected: str,
    fix: Callable[[str], str],
    also: int | None = None,
) -> None:
    """Refuse a size that does not divide `number`; fixes divide `also` as well."""
    if number % size:
        fits = [n for n in range(1, number + 1) if number % n == 0 and (also or n) % n == 0]
        raise UserError(got, expected=expected, fix=fix(" or ".join(map(str, fits[:6]))))


def check_expert_use(archs: "Sequence[Architecture]", parallel: ParallelConfig) -> None:
    """Refuse expert parallel for a run in which no model has experts."""
    if parallel.expert > 1 and not any(arch.experts for arch in archs):
        raise UserError(
            f"expert parallel {parallel.expert} for {', '.join(arch.family for arch in archs)}",
            expected="expert parallel where a model is a mixture of experts",
            fix="set expert=1 in its layout",
        )


def check_lora_targets(arch: "Architecture", lora: LoraConfig) -> None:
    """Refuse targets that some layer does not have as one dense matrix, before weights are read."""
    lacks: dict[str, str] = {}
    if arch.latent:
        lacks["qkv"] = "latent attention, whose projections are several"
    if arch.experts and any(arch.experts.sparse):
        lacks |= dict.fromkeys(("fc1", "fc2"), "layers of experts")
    wrong = [target for target in lora.targets if target in lacks] if lora.rank else []
    if wrong:
        left = [target for target in lora.targets if target not in lacks]
        raise UserError(
            f"lora.targets holds {wrong[0]}: {arch.family} has {lacks[wrong[0]]}",
            expected="one dense linear layer of that name in every transformer layer",
            fix=f"set lora.targets={left or ['proj']}",
        )
