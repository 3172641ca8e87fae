"""Architecture -> megatron-core TransformerConfig and model.

Shapes: S sequence, B batch, H hidden, V vocabulary, Vp = V/TP.
"""

from typing import Any

from megaopd import platform
from megaopd.models.arch import Architecture, check_layout, padded_vocab
from megaopd.models.config import ModelConfig
from megaopd.models.fp8 import apply_fp8, config_fields
from megaopd.models.spec import layer_spec
from megaopd.parallel import Grid, ParallelConfig


def transformer_config(arch: Architecture, model: ModelConfig, parallel: ParallelConfig) -> Any:
    """The megatron-core TransformerConfig of this architecture under this layout."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

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
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        qk_layernorm=arch.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
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
        bias_activation_fusion=gpu,
        bias_dropout_fusion=gpu,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=platform.use_transformer_engine(),
        gradient_accumulation_fusion=platform.has_apex_wgrad_fusion(),
        # The token weights hold the step's whole normalisation (losses/reduce.py): Megatron
        # must sum and divide by nothing. DDP reads this when it is built.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=False,
        **recompute,
        **config_fields(model),
    )


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
        transformer_layer_spec=layer_spec(arch, config, grid, vp_stage),
        vocab_size=vocab_rows or padded_vocab(arch.vocab, grid.tp_size, model.vocab_multiple),
        max_sequence_length=max_sequence or arch.max_positions,
        pre_process=grid.is_first_stage and not vp_stage,
        post_process=grid.is_last_stage and vp_stage in (None, grid.vp_size - 1),
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,  # pyright: ignore
        rope_scaling=arch.llama3_rope_factor is not None,
        rope_scaling_factor=arch.llama3_rope_factor or 8.0,
        pg_collection=grid.groups,
        vp_stage=vp_stage,
    )
    _mark_tensor_parallel(built)
    apply_fp8(built, model, grid)
    return built


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
    from megatron.core.models.gpt import GPTModel

    class HiddenStateGPT(GPTModel):
        def _postprocess(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return hidden_states

        def output_weight(self) -> Any:
            """[Vp, H]: the output layer's shard, the tied embedding where there is one."""
            if self.share_embeddings_and_output_weights:
                return self.shared_embedding_or_output_weight()
            return self.output_layer.weight

    return HiddenStateGPT
