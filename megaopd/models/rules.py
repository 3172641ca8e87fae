"""How Hugging Face tensors are cut into a megatron-core model's shards, and made of them again.

A rule knows which slices of the Hugging Face tensors make a tensor rank's shard, and how the shards
of all tensor ranks make the Hugging Face tensors again. A rule that does not split (`split`) is
loaded as by one rank of one, and merges one shard.

Shapes: Vp = V/TP rows of the vocabulary; G key/value groups, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# read(name, dim, start, stop, length) -> that slice of the Hugging Face tensor, whose dimension
# `dim` must have that length; dim None: all of the tensor.
Read = Callable[[str, int | None, int, int, int], Any]


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every tensor rank."""

    split = False

    def load(self, read: Read, names: list[str], tp: int, rank: int) -> Any:
        return read(names[0], None, 0, 0, 0)

    def merge(self, shards: list[Any]) -> list[Any]:
        return [shards[0]]


@dataclass(frozen=True)
class Split:
    """One tensor whose dimension `dim` of length `size` is cut into equal parts."""

    dim: int
    size: int
    split: bool = True

    def load(self, read: Read, names: list[str], tp: int, rank: int) -> Any:
        part = self.size // tp
        return read(names[0], self.dim, rank * part, (rank + 1) * part, self.size)

    def merge(self, shards: list[Any]) -> list[Any]:
        import torch

        return [torch.cat(shards, self.dim) if len(shards) > 1 else shards[0]]


@dataclass(frozen=True)
class VocabRows:
    """Rows of the vocabulary; the shard is padded with zero rows (models/arch.py padded_vocab)."""

    rows: int  # Vp, the rows of one shard
    vocab: int
    split = True

    def load(self, read: Read, names: list[str], tp: int, rank: int) -> Any:
        import torch

        start = min(rank * self.rows, self.vocab)
        stop = min(start + self.rows, self.vocab)
        rows = read(names[0], 0, start, stop, self.vocab)
        return torch.nn.functional.pad(rows, (0, 0, 0, self.rows - (stop - start)))

    def merge(self, shards: list[Any]) -> list[Any]:
        import torch

        return [torch.cat(shards, 0)[: self.vocab]]


@dataclass(frozen=True)
class GateUp:
    """gate_proj and up_proj of `size` rows each, stacked per rank: [gate shard; up shard]."""

    size: int
    split: bool = True

    def load(self, read: Read, names: list[str], tp: int, rank: int) -> Any:
        import torch

        part = self.size // tp
        return torch.cat(
            [read(name, 0, rank * part, (rank + 1) * part, self.size) for name in names]
        )

    def merge(self, shards: list[Any]) -> list[Any]:
        import torch

        halves = [shard.chunk(2, 0) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]


@dataclass(frozen=True)
class Qkv:
    """q, k and v interleaved by key/value group: [q of group 0, k 0, v 0, q of group 1, ...]."""

    heads: int
    groups: int  # G
    head_dim: int  # D
    split = True

    def load(self, read: Read, names: list[str], tp: int, rank: int) -> Any:
        import torch

        groups = self.groups // tp
        parts = []
        for name, width in zip(names, self._widths(), strict=True):
            rows = groups * width
            tensor = read(name, 0, rank * rows, (rank + 1) * rows, tp * rows)
            parts.append(tensor.reshape(groups, width, *tensor.shape[1:]))
        fused = torch.cat(parts, 1)
        return fused.reshape(-1, *fused.shape[2:])

    def merge(self, shards: list[Any]) -> list[Any]:
        import torch

        fused = torch.cat(shards, 0)
        grouped = fused.reshape(self.groups, -1, *fused.shape[1:])
        return [
            part.reshape(-1, *fused.shape[1:]).contiguous()
            for part in grouped.split(self._widths(), 1)
        ]

    def _widths(self) -> list[int]:
        """Rows of q, k and v in one group."""
        return [self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim]


Rule = Replicated | Split | VocabRows | GateUp | Qkv
