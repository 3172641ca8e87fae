"""Which modules a layer is made of: Transformer Engine's where it can run, local ones elsewhere."""

from typing import Any

from megaopd import platform
from megaopd.models import modules
from megaopd.models.arch import Architecture
from megaopd.models.attention import sdpa_attention
from megaopd.parallel import Grid


def layer_spec(arch: Architecture, config: Any, grid: Grid, vp_stage: int | None = None) -> Any:
    """The spec of the layers of this pipeline stage, or of its chunk, with the final norm."""
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    first = get_transformer_layer_offset(config, vp_stage, grid.pp_rank)
    count = get_num_layers_to_build(config, vp_stage, grid.pp_rank)
    specs = [_layer(arch, layer) for layer in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_norm())  # pyright: ignore


def _norm() -> Any:
    if not platform.use_transformer_engine():
        return modules.LocalRMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _layer(arch: Architecture, layer: int) -> Any:
    """The spec of layer number `layer`, from 0."""
    from megatron.core.models.gpt import gpt_layer_specs as specs

    gpu = platform.use_transformer_engine()
    sparse = arch.is_sparse(layer)
    options: dict[str, Any] = {
        "num_experts": arch.experts.count if arch.experts and sparse else None,
        "qk_layernorm": arch.qk_norm or arch.latent is not None,
        "multi_latent_attention": arch.latent is not None,
        "moe_grouped_gemm": gpu,
    }
    if gpu:
        spec = specs.get_gpt_layer_with_transformer_engine_spec(**options)
    else:
        spec = specs.get_gpt_layer_local_spec(**options, normalization="RMSNorm")
        _use_local_norms(arch, spec.submodules)
    parts: Any = spec.submodules
    attention = parts.self_attention
    if not gpu or arch.attention_softcap:
        attention.submodules.core_attention = sdpa_attention(arch.attention_softcap)
    if arch.latent and not gpu:
        attention.module = modules.latent_attention()
    if arch.local_rope and arch.windowed and arch.windowed[layer]:
        attention.module = modules.local_rope_attention(arch.local_rope)
    if sparse:
        parts.mlp.submodules.router = modules.router()
    _add_biases_and_norms(arch, parts, sparse)
    return spec


def _use_local_norms(arch: Architecture, layer: Any) -> None:
    layer.input_layernorm = layer.pre_mlp_layernorm = modules.LocalRMSNorm
    attention = layer.self_attention.submodules
    if arch.latent:
        attention.q_layernorm = attention.kv_layernorm = modules.LocalRMSNorm
    elif arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = modules.LocalRMSNorm


def _add_biases_and_norms(arch: Architecture, layer: Any, sparse: bool) -> None:
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    if arch.out_bias:
        attention.linear_proj = modules.with_bias(attention.linear_proj)
    if arch.mlp_bias and not sparse:
        mlp.linear_fc1 = modules.with_bias(mlp.linear_fc1)
        mlp.linear_fc2 = modules.with_bias(mlp.linear_fc2)
    if arch.spec.gemma:
        attention.linear_proj = modules.with_post_norm(attention.linear_proj, _norm())
        mlp.linear_fc2 = modules.with_post_norm(mlp.linear_fc2, _norm())
