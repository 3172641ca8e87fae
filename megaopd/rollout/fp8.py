"""Weights in 128 x 128 blocks of FP8, as checkpoints with `weight_block_size` hold them.

SGLang takes new weights for such a checkpoint as (weight, weight_scale_inv) pairs, so they are
quantised here. Weights that SGLang quantised itself while it loaded a bfloat16 checkpoint cannot be
replaced (0.5.23: their loaders are gone), except under its load format `flash_rl`.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megaopd.errors import UserError
from megaopd.models.weights import HfReader, HfWriter

SCALE = "_scale_inv"  # appended to the name of a quantised weight
LARGEST = 448.0  # of float8_e4m3fn
BLOCK = (128, 128)
MATRIX = re.compile(r"model\.layers\..*_proj\.weight")  # what is quantised: not the vocabulary


def block_size(hf_config: dict[str, Any], *, where: str = "config.json") -> tuple[int, int] | None:
    """(rows, columns) of a block; None where the checkpoint is not quantised.

    Raises:
        UserError: quantised in a way that weights are not brought into here.
    """
    quantization = hf_config.get("quantization_config")
    if not quantization:
        return None
    size = quantization.get("weight_block_size")
    known = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    other = {k: v for k, v in quantization.items() if k in known and v != known[k]}
    if other or quantization.get("scale_fmt") or not size or len(size) != 2:
        raise UserError(
            f"{where}: quantization_config {quantization}",
            expected="fp8 (e4m3) with weight_block_size, float scales and dynamic activations",
            fix="serve the bfloat16 checkpoint, or one quantised in blocks",
        )
    return int(size[0]), int(size[1])


def scale_shape(shape: Iterable[int], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight [N, K]: one each block, the last ones may be partial."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def quantize_blocks(weight: Any, block: tuple[int, int] = BLOCK) -> tuple[Any, Any]:
    """[N, K] -> ([N, K] float8_e4m3fn, [ceil(N / rows), ceil(K / columns)] float32).

    weight is about quantised x scale of its block; scale = largest magnitude of the block / 448, so
    that the error of an element is at most 1/16 of it or 2**-10 of the scale. A block of zeros has
    the scale 1. Works one row of blocks at a time: the float32 copy is of that size.
    """
    import torch

    rows, columns = block
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(
        scale_shape(weight.shape, block), dtype=torch.float32, device=weight.device
    )
    padding = -weight.shape[1] % columns
    for i, strip in enumerate(weight.detach().split(rows)):
        # [rows, blocks, columns]
        blocks = torch.nn.functional.pad(strip.float(), (0, padding)).unflatten(1, (-1, columns))
        largest = blocks.abs().amax((0, 2))
        scale = torch.where(largest > 0, torch.div(largest, LARGEST), 1.0)
        # The division may round to just above the largest number, whose cast would be a NaN.
        scaled = (blocks / scale[None, :, None]).clamp(-LARGEST, LARGEST).flatten(1)
        quantized[i * rows : i * rows + len(strip)] = scaled[:, : weight.shape[1]].to(
            quantized.dtype
        )
        scales[i] = scale
    return quantized, scales


def dequantize_blocks(quantized: Any, scales: Any, block: tuple[int, int] = BLOCK) -> Any:
    """The float32 weights that an engine computes with."""
    full = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return quantized.float() * full[: quantized.shape[0], : quantized.shape[1]]


def write_checkpoint(source: Path, out: Path) -> None:
    """A Hugging Face checkpoint with the matrices of its layers in blocks of FP8, the rest in
    bfloat16: what an engine that runs FP8 is started with. One tensor in memory at a time, and one
    output file.

    Raises:
        UserError: a matrix whose rows SGLang cannot cut at blocks, or `out` in use.
    """
    import torch

    reader = HfReader(source)
    for name, shape in reader.shapes().items():
        if MATRIX.fullmatch(name) and (shape[0] % BLOCK[0] or shape[1] % BLOCK[1]):
            raise UserError(
                f"{source}: {name} has shape {shape}",
                expected=f"multiples of {BLOCK}: SGLang stacks matrices in whole blocks",
                fix="serve this model in bfloat16",
            )
    with HfWriter(out, side_files_from=source) as writer:
        for name in sorted(reader.files):
            tensor = reader.read(name, None, 0, 0, 0)
            if MATRIX.fullmatch(name):
                tensor, scales = quantize_blocks(tensor)
                writer.add(name + SCALE, scales)
            else:
                tensor = tensor.to(torch.bfloat16)
            writer.add(name, tensor)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config |= {
        "dtype": "bfloat16",
        "quantization_config": {**quantization, "weight_block_size": list(BLOCK)},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
