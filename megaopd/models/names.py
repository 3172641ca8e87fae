"""Where every Hugging Face tensor lives in a megatron-core model, and how it is cut.

One table, both ways, for any TP and PP: a rule knows which slices of the Hugging Face tensors make
this rank's shard, and how the shards of all tensor ranks make the Hugging Face tensors again.
mbridge 0.15.1 was tried for this: it needs its spec, config and name maps overridden per family
where Transformer Engine is absent, which is more code than the table, and it has no weight stream.

Shapes: Vp = V/TP rows of the vocabulary; G key/value groups, D head size.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megaopd.models.arch import Architecture
from megaopd.models.lora import is_adapter

# read(name, dim, start, stop, length) -> that slice of the Hugging Face tensor, whose dimension
# `dim` must have that length; dim None: all of the tensor.
Read = Callable[[str, int | None, int, int, int], Any]


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every tensor rank."""

    def load(self, read: Read, names: list[str], arch: Architecture, tp: int, rank: int) -> Any:
        return read(names[0], None, 0, 0, 0)

    def merge(self, shards: list[Any], arch: Architecture) -> list[Any]:
        return [shards[0]]


@dataclass(frozen=True)
class Split:
    """One tensor cut along `dim` into equal parts; `size` gives the length of that dimension."""

    dim: int
    size: Callable[[Architecture], int]

    def load(self, read: Read, names: list[str], arch: Architecture, tp: int, rank: int) -> Any:
        part = self.size(arch) // tp
        return read(names[0], self.dim, rank * part, (rank + 1) * part, self.size(arch))

    def merge(self, shards: list[Any], arch: Architecture) -> list[Any]:
        import torch

        return [torch.cat(shards, self.dim)]


@dataclass(frozen=True)
class VocabRows:
    """Rows of the vocabulary; the shard is padded with zero rows (models/build.py padded_vocab)."""

    rows: int  # Vp, the rows of one shard

    def load(self, read: Read, names: list[str], arch: Architecture, tp: int, rank: int) -> Any:
        import torch

        start = min(rank * self.rows, arch.vocab)
        stop = min(start + self.rows, arch.vocab)
        rows = read(names[0], 0, start, stop, arch.vocab)
        return torch.nn.functional.pad(rows, (0, 0, 0, self.rows - (stop - start)))

    def merge(self, shards: list[Any], arch: Architecture) -> list[Any]:
        import torch

        return [torch.cat(shards, 0)[: arch.vocab]]


@dataclass(frozen=True)
class GateUp:
    """gate_proj and up_proj, stacked per rank: [gate shard; up shard]."""

    def load(self, read: Read, names: list[str], arch: Architecture, tp: int, rank: int) -> Any:
        import torch

        part = arch.ffn // tp
        return torch.cat(
            [read(name, 0, rank * part, (rank + 1) * part, arch.ffn) for name in names]
        )

    def merge(self, shards: list[Any], arch: Architecture) -> list[Any]:
        import torch

        halves = [shard.chunk(2, 0) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]


@dataclass(frozen=True)
class Qkv:
    """q, k and v interleaved by key/value group: [q of group 0, k 0, v 0, q of group 1, ...]."""

    def load(self, read: Read, names: list[str], arch: Architecture, tp: int, rank: int) -> Any:
        import torch

        groups = arch.kv_heads // tp
        parts = []
        for name, heads in zip(names, self._heads(arch), strict=True):
            rows = groups * heads * arch.head_dim
            tensor = read(name, 0, rank * rows, (rank + 1) * rows, tp * rows)
            parts.append(tensor.reshape(groups, heads * arch.head_dim, *tensor.shape[1:]))
        fused = torch.cat(parts, 1)
        return fused.reshape(-1, *fused.shape[2:])

    def merge(self, shards: list[Any], arch: Architecture) -> list[Any]:
        import torch

        fused = torch.cat(shards, 0)
        grouped = fused.reshape(arch.kv_heads, -1, *fused.shape[1:])
        widths = [heads * arch.head_dim for heads in self._heads(arch)]
        return [
            part.reshape(-1, *fused.shape[1:]).contiguous() for part in grouped.split(widths, 1)
        ]

    @staticmethod
    def _heads(arch: Architecture) -> tuple[int, int, int]:
        return arch.heads // arch.kv_heads, 1, 1


Rule = Replicated | Split | VocabRows | GateUp | Qkv

_ATTENTION = "self_attn.{}_proj"
LAYER_TABLE: dict[str, tuple[list[str], Rule]] = {
    "self_attention.linear_qkv.weight": (
        [_ATTENTION.format(x) + ".weight" for x in "qkv"],
        Qkv(),
    ),
    "self_attention.linear_qkv.bias": ([_ATTENTION.format(x) + ".bias" for x in "qkv"], Qkv()),
    "self_attention.linear_proj.weight": (
        [_ATTENTION.format("o") + ".weight"],
        Split(1, lambda a: a.heads * a.head_dim),
    ),
    "self_attention.q_layernorm.weight": (["self_attn.q_norm.weight"], Replicated()),
    "self_attention.k_layernorm.weight": (["self_attn.k_norm.weight"], Replicated()),
    "input_layernorm.weight": (["input_layernorm.weight"], Replicated()),
    "pre_mlp_layernorm.weight": (["post_attention_layernorm.weight"], Replicated()),
    "mlp.linear_fc1.weight": (["mlp.gate_proj.weight", "mlp.up_proj.weight"], GateUp()),
    "mlp.linear_fc2.weight": (["mlp.down_proj.weight"], Split(1, lambda a: a.ffn)),
}
# Transformer Engine fuses each norm into the linear layer behind it.
TE_TO_LOCAL = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
TOP_TABLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}


@dataclass(frozen=True)
class Entry:
    """One parameter of this stage: its tensor, its Hugging Face names and its rule."""

    parameter: Any
    hf_names: list[str]
    rule: Rule


def entries(model: Any, arch: Architecture) -> Iterator[Entry]:
    """The parameters of this pipeline stage in model order.

    The last stage's copy of a tied embedding is skipped: the first stage owns it.
    """
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    pp_rank = model.pg_collection.pp.rank()
    offset = get_transformer_layer_offset(model.config, model.vp_stage, pp_rank)
    for name, parameter in model.named_parameters():
        if is_adapter(name):  # the stream adds it to its weight
            continue
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if layer:
            local = TE_TO_LOCAL.get(layer[2], layer[2])
            suffixes, rule = LAYER_TABLE[local]
            prefix = f"model.layers.{int(layer[1]) + offset}."
            yield Entry(parameter, [prefix + s for s in suffixes], rule)
        elif name == "output_layer.weight" and arch.tied:
            continue
        else:
            vocab = "layernorm" not in name
            rule = VocabRows(parameter.shape[0]) if vocab else Replicated()
            yield Entry(parameter, [TOP_TABLE[name]], rule)


def expected_names(arch: Architecture) -> set[str]:
    """Every tensor name that a Hugging Face checkpoint of this architecture holds."""
    skipped = set()
    if not arch.qkv_bias:
        skipped.add("self_attention.linear_qkv.bias")
    if not arch.qk_norm:
        skipped |= {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}
    names = {
        f"model.layers.{layer}.{suffix}"
        for layer in range(arch.layers)
        for local, (suffixes, _) in LAYER_TABLE.items()
        if local not in skipped
        for suffix in suffixes
    }
    return names | set(TOP_TABLE.values()) - ({"lm_head.weight"} if arch.tied else set())
