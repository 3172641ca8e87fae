"""Sizes of a model that models/arch.py describes, and where its description is found.

Public configurations come with the package, by name (configs/): a run is planned before its weights
are downloaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopd.errors import UserError
from megaopd.models.arch import Architecture, architecture

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Numbers:
    """Parameters of one layer, by how a layout splits them."""

    whole: int  # on every tensor rank
    split: int  # over tensor ranks
    expert: int  # of one routed expert, which one rank holds whole
    experts: int  # of them; 0: a dense layer

    @property
    def all(self) -> int:
        return self.whole + self.split + self.expert * self.experts


@dataclass(frozen=True)
class Model:
    """A model of the run under the name that messages give it."""

    name: str
    arch: Architecture

    @property
    def query(self) -> int:
        """Columns of all query heads."""
        return self.arch.heads * self.arch.head_dim

    @property
    def key(self) -> int:
        """Columns of all key heads, which are also those of the values."""
        return self.arch.kv_heads * self.arch.head_dim

    @property
    def experts(self) -> int:
        """Routed experts of a sparse layer; 0: all layers are dense."""
        return self.arch.experts.count if self.arch.experts else 0

    def layer(self, layer: int) -> Numbers:
        """Parameters of a layer."""
        arch, hidden = self.arch, self.arch.hidden
        columns = self.query + 2 * self.key
        whole = hidden * (4 if arch.spec.gemma else 2) + 2 * arch.head_dim * arch.qk_norm
        whole += hidden * arch.out_bias
        split = hidden * (columns + self.query) + columns * arch.qkv_bias
        if arch.experts is None or not arch.is_sparse(layer):
            split += 3 * hidden * arch.ffn + 2 * arch.ffn * arch.mlp_bias
            return Numbers(whole + hidden * arch.mlp_bias, split, 0, 0)
        experts = arch.experts
        whole += hidden * experts.count  # the router
        split += 3 * hidden * experts.shared_ffn
        return Numbers(whole, split, 3 * hidden * experts.ffn, experts.count)

    def parameters(self, *, active: bool = False) -> int:
        """All parameters; active: those that one token passes through."""
        arch = self.arch
        total = arch.hidden * (1 + arch.vocab * (1 if arch.tied else 2))
        for layer in range(arch.layers):
            numbers = self.layer(layer)
            total += numbers.all
            if active and arch.experts and numbers.experts:
                total -= (numbers.experts - arch.experts.top_k) * numbers.expert
        return total


def as_model(config: dict[str, Any], *, name: str) -> Model:
    """The model of a config.json. UserError where it is none that can be trained or planned."""
    arch = architecture(config, where=name)
    if arch.latent:
        raise UserError(
            f"{name}: {arch.family} has multi-latent attention",
            expected="a model with grouped-query attention: a plan knows the tensors of no other",
            fix="plan with a model of the same size that has it, for a rough answer",
        )
    return Model(name, arch)


def known_models() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def find_model(where: str) -> Model:
    """The model at a path (config.json, its directory, a Megatron checkpoint), or of that name.

    A path that does not exist here may still name a known model by its last part, as
    checkpoints/qwen3-8b-megatron does.
    """
    path = Path(where)
    for file in (path, path / "config.json", path / "hf" / "config.json"):
        if file.is_file():
            try:
                config = json.loads(file.read_text())
            except ValueError as err:
                raise UserError(f"{file} is not JSON: {err}", expected="a config.json") from err
            return as_model(config, name=path.stem if file == path else path.name)
    names = [name for name in known_models() if path.name.lower().startswith(name)]
    if not names:
        raise UserError(
            f"no config.json at {where}, and no known model of that name",
            expected="a checkpoint's directory, or one of " + ", ".join(known_models()),
            fix="give the path of a config.json",
        )
    name = max(names, key=len)
    return as_model(json.loads((CONFIGS / f"{name}.json").read_text()), name=name)
