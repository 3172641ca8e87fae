"""What weights the servers' model directory calls for: names, shapes, dtype, quantisation.

Everything is checked against it before anything is sent, because SGLang answers "success" to a
checkpoint that lacks tensors or names others, and dies of a wrong shape.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megaopd.errors import UserError
from megaopd.models.arch import architecture, read_hf_config
from megaopd.models.names import expected_names
from megaopd.models.weights import HfReader
from megaopd.rollout import fp8

Shape = tuple[int, ...]


class Target:
    """The tensors that a server must be given, by Hugging Face name.

    Args:
        model_dir: what the servers were started with. Names and shapes come from the headers of its
            safetensors; without any, the names alone from its config.json.
        dtype: of the weights inside the servers, such as "bfloat16".
    """

    def __init__(self, model_dir: Path, dtype: str) -> None:
        import torch

        config = read_hf_config(model_dir)
        self.arch = architecture(config, where=str(model_dir))
        self.dtype: Any = getattr(torch, dtype)
        self.block = fp8.block_size(config, where=str(model_dir))
        self.shapes: dict[str, Shape | None] = {}
        self.quantized: frozenset[str] = frozenset()
        if any(model_dir.glob("*.safetensors")):
            self._read(HfReader(model_dir))
        elif self.block is None:
            self.shapes = dict.fromkeys(expected_names(self.arch))
        else:
            raise UserError(
                f"{model_dir} holds no *.safetensors",
                expected="the quantised weights, which say what is quantised",
            )

    def _read(self, reader: HfReader) -> None:
        shapes = reader.shapes()
        if self.block is not None:
            self.quantized = frozenset(n for n in shapes if n + fp8.SCALE in shapes)
        scales = {name + fp8.SCALE for name in self.quantized}
        self.shapes = {
            name: shape
            for name, shape in shapes.items()
            if name not in scales and not self.skips(name)
        }

    def skips(self, name: str) -> bool:
        """Whether a server makes this tensor itself: from another one, or from the config."""
        tied = self.arch.tied and name == "lm_head.weight"
        return tied or name.endswith("rotary_emb.inv_freq")

    def prepare(self, name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
        """A tensor of the stream as a server takes it: in its dtype, or in blocks of FP8."""
        if self.skips(name):
            return
        tensor = tensor.detach()
        if name in self.quantized:
            assert self.block is not None
            weight, scales = fp8.quantize_blocks(tensor, self.block)
            yield name, weight
            yield name + fp8.SCALE, scales
        else:
            yield name, tensor.to(self.dtype).contiguous()


class Checklist:
    """Ticks off the tensors of one stream."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.waiting = dict(target.shapes)

    def take(self, name: str, shape: Iterable[int]) -> None:
        """One tensor has come.

        Raises:
            UserError: it was not asked for, came before, or has another shape.
        """
        if self.target.skips(name):
            return
        got = tuple(shape)
        if name not in self.target.shapes:
            raise UserError(f"weight {name} of shape {got}", expected="no such one")
        if name not in self.waiting:
            raise UserError(f"weight {name} of shape {got} twice", expected="each weight once")
        wanted = self.waiting.pop(name)
        if wanted is not None and wanted != got:
            raise UserError(f"weight {name} of shape {got}", expected=f"{wanted}")

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            UserError: tensors are missing.
        """
        if self.waiting:
            missing = sorted(self.waiting)
            raise UserError(f"weights missing: {missing[:3]} ({len(missing)} in all)")


def check(target: Target, described: Iterable[tuple[str, Iterable[int]]]) -> None:
    """Refuse a stream by the names and shapes that it says it will hold.

    Raises:
        UserError: a tensor missing, left over, repeated or of another shape.
    """
    checklist = Checklist(target)
    for name, shape in described:
        checklist.take(name, shape)
    checklist.finish()
