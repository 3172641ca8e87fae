"""Architecture -> megatron-core TransformerConfig and model.

Shapes: S sequence, B batch, H hidden, V vocabulary, Vp = V/TP.
"""

import math
from functools import partial
from typing import Any

from megaopd import platform
from megaopd.models.arch import Architecture, check_layout, padded_vocab
from megaopd.models.config import ModelConfig
from megaopd.models.fp8 import apply_fp8, config_fields
from megaopd.models.modules import set_frequencies
from megaopd.models.spec import layer_spec
from megaopd.parallel import Grid, ParallelConfig


def transformer_config(arch: Architecture, model: ModelConfig, parallel: ParallelConfig) -> Any:
    """The megatron-core TransformerConfig of this architecture under this layout."""
    import torch
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    gpu = platform.has_gpu()
    dtype = getattr(torch, model.dtype)
    recompute: dict[str, Any] = {}
    if model.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif model.recompute == "selective":
        recompute = {"recompute_granularity": "selective"}
    config: Any = (MLATransformerConfig if arch.latent else TransformerConfig)(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        layernorm_zero_centered_gamma=arch.spec.gemma,
        qk_layernorm=arch.qk_norm or arch.latent is not None,
        softmax_scale=arch.softmax_scale,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        gated_linear_unit=True,
        activation_func=_activation(arch.spec.activation),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        # Two stages with several chunks send to each other both ways at once.
        batch_p2p_comm=parallel.virtual == 1,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights come from a checkpoint.
        use_cpu_initialization=not gpu,
        perform_initialization=False,
        bias_activation_fusion=gpu and arch.spec.activation == "silu",
        bias_dropout_fusion=gpu,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # The fused kernel neither scales cosine and sine nor splits a head.
        apply_rope_fusion=platform.use_transformer_engine()
        and arch.latent is None
        and arch.rope.magnitude == 1.0,
        gradient_accumulation_fusion=platform.has_apex_wgrad_fusion(),
        # The token weights hold the step's whole normalisation (losses/reduce.py): Megatron
        # must sum and divide by nothing. DDP reads this when it is built.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=False,
        **recompute,
        **config_fields(model),
        **_window_options(arch),
        **_expert_options(arch, model, parallel),
        **_latent_options(arch),
    )
    if arch.rope.magnitude != 1.0 and not arch.latent:
        # How megatron-core's attention finds the factor of cosine and sine: 0.1 m ln(s) + 1.
        config.yarn_rotary_scaling_factor = math.e
        config.yarn_mscale, config.yarn_mscale_all_dim = 10 * (arch.rope.magnitude - 1), 0.0
    config.aux_loss_share = 1.0
    return config


def _activation(name: str) -> Any:
    import torch

    functional = torch.nn.functional
    if name == "gelu_pytorch_tanh":
        return partial(functional.gelu, approximate="tanh")
    return functional.silu


def _window_options(arch: Architecture) -> dict[str, Any]:
    if arch.window is None:
        return {}
    # megatron-core counts the positions before a token.
    return {
        "window_size": (arch.window - 1, 0),
        "window_attn_skip_freq": [int(has) for has in arch.windowed],
    }


def _expert_options(
    arch: Architecture, model: ModelConfig, parallel: ParallelConfig
) -> dict[str, Any]:
    experts = arch.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_layer_freq": [int(sparse) for sparse in experts.sparse],
        "moe_shared_expert_intermediate_size": experts.shared_ffn or None,
        "moe_router_topk": experts.top_k,
        "moe_router_score_function": "sigmoid" if experts.sigmoid else "softmax",
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_enable_expert_bias": experts.sigmoid,
        "moe_router_bias_update_rate": 0.0,  # distillation leaves the experts' choice to the loss
        "moe_router_num_groups": experts.groups,
        "moe_router_group_topk": experts.top_groups,
        "moe_router_topk_scaling_factor": experts.scale,
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": model.moe_aux_loss_coef,
        "moe_router_load_balancing_type": "aux_loss" if model.moe_aux_loss_coef else "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": platform.use_transformer_engine(),
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,  # parallel.make_grid
    }


def _latent_options(arch: Architecture) -> dict[str, Any]:
    latent = arch.latent
    if latent is None:
        return {}
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.plain_dim,
        "qk_pos_emb_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_type": "rope",
        # How megatron-core finds the square root of the factor of the softmax scale, as below.
        "rotary_scaling_factor": math.e,
        "mscale_all_dim": 10 * (arch.rope.score_factor**0.5 - 1),
    }


def build_model(
    arch: Architecture,
    model: ModelConfig,
    grid: Grid,
    *,
    vocab_rows: int | None = None,
    max_sequence: int | None = None,
    vp_stage: int | None = None,
) -> Any:
    """This rank's stage of the model, with uninitialised weights (models/convert.py loads them).

    Args:
        vocab_rows: padded vocabulary over all tensor ranks; by default the model's own. A teacher
            takes the student's, so that both split the vocabulary at the same ids.
        max_sequence: longest sequence; by default the config's maximum.
        vp_stage: which chunk of the stage (models/chunks.py); None: the stage is one model.

    Returns:
        A `HiddenStateGPT`: in training its last stage returns hidden states [S, B, H] (S/TP under
        sequence parallel) and leaves the output layer to the loss.
    """
    check_layout(arch, grid.config, who=arch.family)
    config = transformer_config(arch, model, grid.config)
    built = hidden_state_gpt()(
        config=config,
        embedding_scale=arch.embedding_scale,
        transformer_layer_spec=layer_spec(arch, config, grid, vp_stage),
        vocab_size=vocab_rows or padded_vocab(arch.vocab, grid.tp_size, model.vocab_multiple),
        max_sequence_length=max_sequence or arch.max_positions,
        pre_process=grid.is_first_stage and not vp_stage,
        post_process=grid.is_last_stage and vp_stage in (None, grid.vp_size - 1),
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        pg_collection=grid.groups,
        vp_stage=vp_stage,
    )
    _set_rope(built, arch)
    _mark_tensor_parallel(built)
    _mark_experts(built)
    apply_fp8(built, model, grid)
    return built


def _set_rope(model: Any, arch: Architecture) -> None:
    """The frequencies of the model, or of each layer of latent attention."""
    if arch.latent is None:
        set_frequencies(model.rotary_pos_emb, arch.rope)
        return
    for layer in model.decoder.layers:
        set_frequencies(layer.self_attention.rotary_pos_emb, arch.rope)


def _mark_experts(model: Any) -> None:
    """Say which parameters belong to experts, to be reduced over the ranks that hold the same ones.

    megatron-core says it with several expert parallel ranks only. With one, tensor ranks still
    give their experts different tokens, as no tensor rank splits an expert (parallel.make_grid).
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False
            # Different on every rank of the group over which their gradient norm is summed.
            parameter.tensor_model_parallel = True


def _mark_tensor_parallel(model: Any) -> None:
    """Say which parameters are shards, so that the gradient norm counts the others once.

    megatron-core says it while it initialises weights, which is skipped here: on the CPU that makes
    every rank allocate the full matrix of each of its shards.
    """
    from megatron.core.tensor_parallel import layers

    for module in model.modules():
        row = isinstance(module, layers.RowParallelLinear)
        column = isinstance(module, layers.ColumnParallelLinear | layers.VocabParallelEmbedding)
        for name, parameter in module.named_parameters(recurse=False) if row or column else ():
            sharded = column or name == "weight"
            if not hasattr(parameter, "tensor_model_parallel"):
                layers.set_tensor_model_parallel_attributes(parameter, sharded, int(row), 1)


def hidden_state_gpt() -> type:
    """GPTModel whose last stage returns hidden states: the loss applies the output layer itself.

    A function because megatron-core is imported only after platform.install().
    """
    import torch
    from megatron.core.models.gpt import GPTModel

    class HiddenStateGPT(GPTModel):
        def __init__(self, *args: Any, embedding_scale: float | None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.embedding_scale = embedding_scale

        def _preprocess(self, *args: Any, padding_mask: Any = None, **kwargs: Any) -> Any:
            hidden, *rest = super()._preprocess(*args, **kwargs)
            # megatron-core cuts the mask over tensor ranks on the first stage alone.
            if padding_mask is not None and self.config.moe_aux_loss_coeff:
                group = self.pg_collection.tp
                parts = group.size() if self.config.sequence_parallel else 1
                rest[4] = padding_mask.chunk(parts, 1)[group.rank() if parts > 1 else 0]
            if self.embedding_scale is not None and self.pre_process:
                # In the dtype of the weights, as transformers rounds it.
                hidden = hidden * torch.tensor(self.embedding_scale).to(hidden.dtype)
            return (hidden, *rest)

        def _postprocess(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return hidden_states

        def output_weight(self) -> Any:
            """[Vp, H]: the output layer's shard, the tied embedding where there is one."""
            if self.share_embeddings_and_output_weights:
                return self.shared_embedding_or_output_weight()
            return self.output_layer.weight

    return HiddenStateGPT
