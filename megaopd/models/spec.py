"""Which modules a layer is made of: Transformer Engine's where it can run, local ones elsewhere."""

from typing import Any

from megaopd import platform
from megaopd.models.arch import Architecture
from megaopd.models.attention import sdpa_attention
from megaopd.parallel import Grid


def layer_spec(arch: Architecture, config: Any, grid: Grid, vp_stage: int | None = None) -> Any:
    """The spec of the layers of this pipeline stage, or of its chunk, with the final norm."""
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    if platform.use_transformer_engine():
        return specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.qk_norm)
    spec = specs.get_gpt_layer_local_spec(qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = LocalRMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = sdpa_attention()
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
    count = get_num_layers_to_build(config, vp_stage, grid.pp_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=LocalRMSNorm)  # pyright: ignore


class LocalRMSNorm:
    """torch.nn.RMSNorm that tells Megatron when its gradient must be summed over tensor ranks.

    megatron-core's own wrapper refuses sequence parallel. There each rank's norm sees its part of
    the sequence only, so finalize_model_grads all-reduces the weights marked `sequence_parallel`.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        import torch

        norm = torch.nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore
        return norm
