"""What is special about each family, as data: how a config is read, what tensors are called.

A family is one architecture class of transformers. What a config.json says in numbers is read in
arch.py; here is what the class's code decides. Importable without torch.
"""

from dataclasses import dataclass, field
from typing import Literal

# parameter of a megatron-core layer -> suffix of the Hugging Face tensor, where families differ
PRE_NORM = {"pre_mlp_layernorm.weight": "post_attention_layernorm.weight"}
SANDWICH = {
    "self_attention.linear_proj.post_norm.weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "pre_feedforward_layernorm.weight",
    "mlp.linear_fc2.post_norm.weight": "post_feedforward_layernorm.weight",
}


@dataclass(frozen=True)
class ExpertNames:
    """The Hugging Face names of a mixture-of-experts layer."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")  # by age of the config
    ffn_key: str = "moe_intermediate_size"


@dataclass(frozen=True)
class Family:
    """One architecture class."""

    name: str
    activation: str = "silu"
    # config: attention_bias, on the output projection as well; never: the class knows no biases.
    qkv_bias: Literal["always", "config", "never"] = "config"
    mlp_bias: bool = False  # whether the class reads mlp_bias
    qk_norm: bool = False
    # Which layers see a window only. switch: use_sliding_window, from max_window_layers on;
    # all: all of them where sliding_window is set; alternate: every layer but each n-th.
    window: Literal["none", "switch", "switch_all", "all", "alternate"] = "none"
    window_period: int = 2  # alternate, where the config has neither layer_types nor a pattern
    gemma: bool = False  # (1 + w) norms, norms behind attention and MLP, scaled embeddings
    softcaps: bool = False  # whether the class reads the soft-caps
    local_rope: float | None = None  # theta of the layers with a window, if they have their own
    tied: bool = False  # where the config does not say
    rope_theta: float = 10000.0  # where the config does not say
    experts: ExpertNames | None = None
    latent: bool = False  # multi-latent attention
    norms: dict[str, str] = field(default_factory=lambda: PRE_NORM)


FAMILIES = {
    "LlamaForCausalLM": Family("llama", mlp_bias=True),
    "MistralForCausalLM": Family("mistral", qkv_bias="never", window="all"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias="always", window="switch"),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, window="switch"),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        activation="gelu_pytorch_tanh",
        window="alternate",
        gemma=True,
        softcaps=True,
        tied=True,
        norms=SANDWICH,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3",
        activation="gelu_pytorch_tanh",
        qk_norm=True,
        window="alternate",
        window_period=6,
        gemma=True,
        softcaps=True,
        local_rope=10000.0,
        tied=True,
        rope_theta=1000000.0,
        norms=SANDWICH,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", qk_norm=True, window="switch_all", experts=ExpertNames()
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        qkv_bias="never",
        window="all",
        rope_theta=1000000.0,
        experts=ExpertNames(
            "block_sparse_moe", "w1", "w3", "w2", ("num_local_experts",), "intermediate_size"
        ),
    ),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3",
        qkv_bias="never",
        latent=True,
        experts=ExpertNames(count_keys=("n_routed_experts", "num_local_experts")),
    ),
}

# Keys that change the maths and have no counterpart here: a value other than these is refused.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_multiplier": (1.0,),
    "attention_chunk_size": (),
    "attn_output_gate": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "no_rope_layers": (),
    "parallel_attn": (),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (1, 0),
    "residual_multiplier": (1.0,),
    "rope_interleave": (True,),
    "router_jitter_noise": (0.0,),
    "shared_expert_intermediate_size": (0,),
    "use_bidirectional_attention": (),
    "use_parallel_residual": (),
    "use_qk_norm": (),
}
