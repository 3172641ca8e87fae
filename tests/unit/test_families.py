"""A config.json of each family, in the keys of the published models, read or refused by name."""

import math

import pytest
import torch
import transformers

from megaopd.errors import UserError
from megaopd.models.arch import architecture, check_layout
from megaopd.models.layout import check_expert_use
from megaopd.models.names import expected_names, layer_table
from megaopd.models.rope import Rope, read_rope
from megaopd.parallel import ParallelConfig

BASE = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}
GEMMA2 = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 32,
    "query_pre_attn_scalar": 224,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 32,
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
QWEN3_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [2],
    "sliding_window": 4096,
    "use_sliding_window": False,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def read(name, **changes):
    return architecture({**BASE, "architectures": [name], **changes})


def test_gemma2():
    arch = read("Gemma2ForCausalLM", **GEMMA2)
    assert arch.tied  # its class ties where the config does not say
    assert (arch.window, arch.windowed) == (4096, (True, False, True, False))
    assert (arch.attention_softcap, arch.final_softcap) == (50.0, 30.0)
    assert arch.softmax_scale == pytest.approx(224**-0.5)
    assert arch.embedding_scale == 8.0
    assert "model.layers.0.pre_feedforward_layernorm.weight" in expected_names(arch)


def test_gemma3():
    arch = read("Gemma3ForCausalLM", **GEMMA3)
    assert arch.windowed == (True,) * 5 + (False, True)
    assert arch.rope == Rope(1000000.0, "linear", 8.0)
    assert arch.local_rope == Rope(10000.0)
    assert arch.qk_norm and arch.final_softcap is None


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_windows(name):
    assert read(name, sliding_window=8, use_sliding_window=False).window is None
    some = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}
    assert read(name, **some).windowed == (False, False, False, True)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert read(name, **some, layer_types=kinds).windowed == (True, False, True, False)
    with pytest.raises(UserError, match="chunked_attention"):
        read(name, **some, layer_types=["chunked_attention"] * 4)


def test_mistral_and_mixtral():
    assert read("MistralForCausalLM", sliding_window=None).window is None
    assert read("MistralForCausalLM", sliding_window=9).windowed == (True,) * 4
    arch = read("MixtralForCausalLM", num_local_experts=8, num_experts_per_tok=2)
    assert arch.experts is not None
    assert (arch.experts.ffn, arch.experts.normalised, arch.rope.theta) == (128, True, 1e6)
    assert "model.layers.3.block_sparse_moe.experts.7.w2.weight" in expected_names(arch)


def test_qwen3_moe():
    arch = read("Qwen3MoeForCausalLM", **QWEN3_MOE)
    assert arch.experts is not None
    assert arch.experts.sparse == (True, True, False, True)
    names = expected_names(arch)
    assert "model.layers.2.mlp.gate_proj.weight" in names
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in names
    assert len([n for n in names if ".experts." in n]) == 3 * 8 * 3


def test_deepseek_v3():
    arch = read("DeepseekV3ForCausalLM", **DEEPSEEK)
    assert arch.latent is not None and arch.experts is not None
    assert (arch.head_dim, arch.attention_width) == (24, 4 * 24)
    assert arch.experts.sparse == (False, True, True, True)
    assert (arch.experts.groups, arch.experts.top_groups, arch.experts.shared_ffn) == (8, 4, 64)
    assert arch.softmax_scale == pytest.approx(24**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert "mlp.router.expert_bias" in layer_table(arch, 1)
    assert "mlp.router.expert_bias" not in layer_table(arch, 0)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("Gemma3ForConditionalGeneration", {}, "architecture Gemma3ForConditionalGeneration"),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("LlamaForCausalLM", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("MistralForCausalLM", {"attention_bias": True}, "attention_bias=true"),
        ("Qwen3ForCausalLM", {"rope_scaling": {"type": "dynamic"}}, "rope scaling dynamic"),
        ("Gemma2ForCausalLM", {**GEMMA2, "use_bidirectional_attention": True}, "bidirectional"),
        ("MixtralForCausalLM", {}, "lacks num_local_experts"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "topk_group": 2}, "topk_group=2"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "scoring_func": "softmax"}, "scoring_func=softmax"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "kv_lora_rank": None}, "lacks kv_lora_rank"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, changes, said):
    with pytest.raises(UserError, match=said):
        read(name, **changes)


def test_layouts_that_do_not_fit_experts():
    arch = read("Qwen3MoeForCausalLM", **QWEN3_MOE)
    check_layout(arch, ParallelConfig(tensor=2, expert=4, sequence=True), who="student")
    with pytest.raises(UserError, match="8 experts with expert parallel 3"):
        check_layout(arch, ParallelConfig(expert=3), who="student")
    with pytest.raises(UserError, match=r"parallel\.sequence = false"):
        check_layout(arch, ParallelConfig(tensor=2), who="student")
    dense = read("LlamaForCausalLM")
    check_expert_use([dense, arch], ParallelConfig(expert=2))
    with pytest.raises(UserError, match="expert parallel 2 for llama"):
        check_expert_use([dense], ParallelConfig(expert=2))


@pytest.mark.parametrize(
    "given",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 20,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 0.3,
            "truncate": False,
        },
    ],
)
def test_frequencies_are_those_of_transformers(given):
    given = {"rope_theta": 5000.0, **given}
    config = transformers.LlamaConfig(
        **{**BASE, "hidden_size": 256}, rope_parameters=given, tie_word_embeddings=False
    )
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    reference = LlamaRotaryEmbedding(config)
    rope = read_rope(given, theta=1.0, max_positions=4096, where="")
    assert torch.allclose(rope.frequencies(64), reference.inv_freq, rtol=1e-6)
    assert rope.magnitude == pytest.approx(reference.attention_scaling)
