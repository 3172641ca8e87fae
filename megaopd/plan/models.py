"""The numbers of a model that decide its size, read from a Hugging Face config.json.

Wider than models/arch.py: mixtures of experts are read here too, whether or not they can be
trained. Public configurations come with the package, by name (configs/).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopd.errors import UserError

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention and gated MLPs, dense or of experts."""

    name: str
    vocab: int
    hidden: int
    ffn: int  # columns of a dense layer's MLP
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool  # the output layer is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False  # a norm on every query and key head
    experts: int = 0  # of a sparse layer; 0: all layers are dense
    experts_per_token: int = 0
    expert_ffn: int = 0  # columns of one expert
    shared_ffn: int = 0  # columns of the experts that every token passes, together
    dense_layers: frozenset[int] = frozenset()  # of a sparse model

    @property
    def query(self) -> int:
        """Columns of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Columns of all key heads, which are also those of the values."""
        return self.kv_heads * self.head_dim

    def is_sparse(self, layer: int) -> bool:
        return self.experts > 0 and layer not in self.dense_layers

    @property
    def sparse_layers(self) -> int:
        return sum(self.is_sparse(layer) for layer in range(self.layers))

    def layer_parameters(self, layer: int, *, active: bool = False) -> int:
        """Parameters of one layer; active: of those only what one token passes through."""
        hidden, norms = self.hidden, 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        columns = self.query + 2 * self.key
        total = hidden * (columns + self.query) + columns * self.qkv_bias + norms
        if not self.is_sparse(layer):
            return total + 3 * hidden * self.ffn
        experts = self.experts_per_token if active else self.experts
        return total + hidden * (self.experts + 3 * self.shared_ffn + 3 * experts * self.expert_ffn)

    def parameters(self, *, active: bool = False) -> int:
        """All parameters; active: those that one token passes through."""
        layers = sum(self.layer_parameters(i, active=active) for i in range(self.layers))
        return layers + self.hidden * (1 + self.vocab * (1 if self.tied else 2))


def read_shape(config: dict[str, Any], *, name: str) -> ModelShape:
    """A ModelShape from the dict of a config.json. UserError where a number is missing."""
    try:
        heads, hidden, layers = (
            config[key] for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
        )
        experts = config.get("num_experts") or config.get("num_local_experts") or 0
        kind = (config.get("architectures") or ["?"])[0]
        qkv_bias = bool(config.get("attention_bias")) or kind.startswith("Qwen2")
        return ModelShape(
            name=name,
            vocab=config["vocab_size"],
            hidden=hidden,
            ffn=config["intermediate_size"],
            layers=layers,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=qkv_bias,
            qk_norm=kind.startswith("Qwen3"),
            experts=experts,
            experts_per_token=config.get("num_experts_per_tok") or 0,
            expert_ffn=config.get("moe_intermediate_size") or config["intermediate_size"],
            shared_ffn=config.get("shared_expert_intermediate_size") or 0,
            dense_layers=_dense_layers(config, layers) if experts else frozenset(),
        )
    except KeyError as err:
        raise UserError(
            f"{name}: config.json lacks {err.args[0]}",
            expected="the config.json of a decoder such as Llama or Qwen3",
        ) from err


def _dense_layers(config: dict[str, Any], layers: int) -> frozenset[int]:
    """Layers of a sparse model that have no experts."""
    step = config.get("decoder_sparse_step") or 1
    named = set(config.get("mlp_only_layers") or ())
    first = config.get("first_k_dense_replace") or 0
    dense = (i for i in range(layers) if i in named or i < first or (i + 1) % step)
    return frozenset(dense)


def known_models() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def find_shape(where: str) -> ModelShape:
    """The model at a path (config.json, its directory, a Megatron checkpoint), or of that name.

    A path that does not exist here may still name a known model by its last part, as
    checkpoints/qwen3-8b-megatron does: a run is planned before its weights are downloaded.
    """
    path = Path(where)
    for file in (path, path / "config.json", path / "hf" / "config.json"):
        if file.is_file():
            try:
                config = json.loads(file.read_text())
            except ValueError as err:
                raise UserError(f"{file} is not JSON: {err}", expected="a config.json") from err
            return read_shape(config, name=path.stem if file == path else path.name)
    names = [name for name in known_models() if path.name.lower().startswith(name)]
    if not names:
        raise UserError(
            f"no config.json at {where}, and no known model of that name",
            expected="a checkpoint's directory, or one of " + ", ".join(known_models()),
            fix="give the path of a config.json",
        )
    name = max(names, key=len)
    return read_shape(json.loads((CONFIGS / f"{name}.json").read_text()), name=name)
