"""A pipeline stage as a list of model chunks: one, or several under an interleaved schedule.

With P stages of V chunks, chunk v of stage p holds the layers of place v*P + p of the P*V places.
The first chunk of the first stage has the embedding, the last of the last one the output layer.
"""

from typing import Any

from megaopd.models.arch import Architecture
from megaopd.models.build import build_model
from megaopd.models.config import ModelConfig
from megaopd.models.lora import load_own_state, own_state
from megaopd.parallel import Grid


def build_chunks(arch: Architecture, model: ModelConfig, grid: Grid, **options: Any) -> list[Any]:
    """This rank's chunks, first layers first; options as build_model takes them."""
    if grid.vp_size == 1:
        return [build_model(arch, model, grid, **options)]
    return [
        build_model(arch, model, grid, vp_stage=chunk, **options) for chunk in range(grid.vp_size)
    ]


def sharded_chunks(chunks: list[Any]) -> dict[str, Any]:
    """Their sharded state: "model", or "model0", "model1", ... as megatron-core names them.

    The keys that are written name the layers of the whole model: any layout can read them.
    """
    if len(chunks) == 1:
        return {"model": own_state(chunks[0])}
    return {f"model{i}": own_state(chunk) for i, chunk in enumerate(chunks)}


def load_chunks(chunks: list[Any], state: dict[str, Any]) -> None:
    """What `sharded_chunks` described, read."""
    if len(chunks) == 1:
        load_own_state(chunks[0], state["model"])
        return
    for i, chunk in enumerate(chunks):
        load_own_state(chunk, state[f"model{i}"])
