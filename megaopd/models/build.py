"""Hugging Face config -> megatron-core TransformerConfig, layer spec and model.

The Transformer Engine spec is used where it can run (platform.py says), the local spec otherwise.
Shapes: S sequence, B batch, H hidden, V vocabulary, Vp = V/TP.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopd import platform
from megaopd.errors import UserError
from megaopd.models.config import ModelConfig
from megaopd.parallel import Grid, ParallelConfig

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class Architecture:
    """The numbers of a Hugging Face config.json that define the model, checked."""

    family: str
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    llama3_rope_factor: float | None
    max_positions: int
    tied: bool

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"


def read_hf_config(hf_dir: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face checkpoint directory, as a dict."""
    path = Path(hf_dir) / "config.json"
    if not Path(hf_dir).is_dir():
        raise UserError(
            f"no directory {hf_dir}",
            expected="a Hugging Face checkpoint: config.json, *.safetensors, tokenizer files",
            fix="give the path of a downloaded or exported checkpoint",
        )
    if not path.is_file():
        raise UserError(f"{hf_dir} holds no config.json", expected="a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text())
    except ValueError as err:
        raise UserError(f"{path} is not JSON: {err}", expected="a JSON object") from err
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}", expected="a JSON object")
    return config


def architecture(hf_config: dict[str, Any], *, where: str = "config.json") -> Architecture:
    """Read and check a Hugging Face config.

    Raises:
        UserError: an architecture, activation, bias or rope scaling that is not supported, by name.
    """
    name = (hf_config.get("architectures") or ["?"])[0]
    if name not in FAMILIES:
        raise UserError(
            f"{where}: architecture {name}", expected="one of " + ", ".join(sorted(FAMILIES))
        )
    family = FAMILIES[name]
    _refuse_unsupported(hf_config, family, where)
    heads = hf_config["num_attention_heads"]
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    return Architecture(
        family=family,
        vocab=hf_config["vocab_size"],
        hidden=hf_config["hidden_size"],
        ffn=hf_config["intermediate_size"],
        layers=hf_config["num_hidden_layers"],
        heads=heads,
        kv_heads=hf_config.get("num_key_value_heads") or heads,
        head_dim=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
        norm_eps=hf_config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or hf_config.get("rope_theta") or 10000.0),
        llama3_rope_factor=_llama3_factor(rope, where),
        max_positions=hf_config["max_position_embeddings"],
        tied=bool(hf_config.get("tie_word_embeddings", False)),
    )


def _refuse_unsupported(hf_config: dict[str, Any], family: str, where: str) -> None:
    needed = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
    ]
    missing = [key for key in needed if key not in hf_config]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}", expected=f"a {family} config")
    if hf_config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act={hf_config['hidden_act']}", expected="silu")
    for flag in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if hf_config.get(flag):
            raise UserError(f"{where}: {flag}=true", expected=f"{flag}=false for {family}")


def _llama3_factor(rope: dict[str, Any], where: str) -> float | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    constants = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    constants["original_max_position_embeddings"] = 8192
    if kind != "llama3" or any(rope.get(key) != value for key, value in constants.items()):
        raise UserError(
            f"{where}: rope scaling {rope}",
            expected=f"default, or llama3 with {constants}: what megatron-core computes",
        )
    return float(rope["factor"])


def padded_vocab(vocab: int, tensor: int, multiple: int) -> int:
    """The vocabulary rounded up so that every tensor rank holds the same number of rows."""
    step = multiple * tensor
    return (vocab + step - 1) // step * step


def check_layout(arch: Architecture, parallel: ParallelConfig, *, who: str) -> None:
    """Refuse a layout that does not divide the model, before anything is built."""
    tensor, pipeline = parallel.tensor, parallel.pipeline
    for what, number in (
        ("attention heads", arch.heads),
        ("key/value heads", arch.kv_heads),
        ("MLP columns", arch.ffn),
    ):
        if number % tensor:
            fits = [n for n in range(1, number + 1) if number % n == 0 and arch.heads % n == 0]
            raise UserError(
                f"{who}: {number} {what} with tensor parallel {tensor}",
                expected=f"a tensor size that divides the {what}",
                fix=f"use tensor parallel {' or '.join(map(str, fits[:6]))}",
            )
    if arch.layers % pipeline:
        raise UserError(
            f"{who}: {arch.layers} layers with pipeline parallel {pipeline}",
            expected="a pipeline size that divides the layers",
            fix=f"use one of {[n for n in range(1, arch.layers + 1) if arch.layers % n == 0][:8]}",
        )


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
    )


def build_model(
    arch: Architecture,
    model: ModelConfig,
    grid: Grid,
    *,
    vocab_rows: int | None = None,
    max_sequence: int | None = None,
) -> Any:
    """This rank's stage of the model, with uninitialised weights (models/convert.py loads them).

    Args:
        vocab_rows: padded vocabulary over all tensor ranks; by default the model's own. A teacher
            takes the student's, so that both split the vocabulary at the same ids.
        max_sequence: longest sequence; by default the config's maximum.

    Returns:
        A `HiddenStateGPT`: in training its last stage returns hidden states [S, B, H] (S/TP under
        sequence parallel) and leaves the output layer to the loss.
    """
    check_layout(arch, grid.config, who=arch.family)
    config = transformer_config(arch, model, grid.config)
    built = hidden_state_gpt()(
        config=config,
        transformer_layer_spec=_layer_spec(arch, config, grid),
        vocab_size=vocab_rows or padded_vocab(arch.vocab, grid.tp_size, model.vocab_multiple),
        max_sequence_length=max_sequence or arch.max_positions,
        pre_process=grid.is_first_stage,
        post_process=grid.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,  # pyright: ignore
        rope_scaling=arch.llama3_rope_factor is not None,
        rope_scaling_factor=arch.llama3_rope_factor or 8.0,
        pg_collection=grid.groups,
    )
    _mark_tensor_parallel(built)
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


def _layer_spec(arch: Architecture, config: Any, grid: Grid) -> Any:
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
    if arch.qk_norm:
        attention = layer.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
    count = get_num_layers_to_build(config, pp_rank=grid.pp_rank)
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
