"""Where every Hugging Face tensor lives in a megatron-core model.

One table, both ways, for any TP, PP and EP; models/rules.py says how a tensor is cut.
mbridge 0.15.1 was tried for this: it needs its spec, config and name maps overridden per family
where Transformer Engine is absent, which is more code than the table, and it has no weight stream.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megaopd.models.arch import Architecture
from megaopd.models.lora import is_adapter
from megaopd.models.rules import GateUp, Qkv, Replicated, Rule, Split, VocabRows

Table = dict[str, tuple[list[str], Rule]]  # megatron-core's name -> Hugging Face's, and the rule

# Transformer Engine fuses a norm into the linear layer behind it.
TE_TO_LOCAL = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
TOP_TABLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
# One expert: on its own, or one of those that a grouped product computes together.
EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))"
)


@dataclass(frozen=True)
class Entry:
    """One parameter of this stage: its tensor, its Hugging Face names and its rule."""

    parameter: Any
    hf_names: list[str]
    rule: Rule
    expert: bool = False  # the ranks of an expert parallel group hold different ones


def layer_table(arch: Architecture, layer: int) -> Table:
    """The tensors of a layer but its routed experts; Hugging Face names without the prefix."""
    table = _latent_table(arch) if arch.latent else _attention_table(arch)
    table["input_layernorm.weight"] = (["input_layernorm.weight"], Replicated())
    for local, suffix in arch.spec.norms.items():
        table[local] = ([suffix], Replicated())
    if arch.is_sparse(layer):
        table |= _router_table(arch)
    else:
        table |= _mlp_table("mlp", "mlp", arch.ffn, bias=arch.mlp_bias)
    return table


def _attention_table(arch: Architecture) -> Table:
    qkv = Qkv(arch.heads, arch.kv_heads, arch.head_dim)
    table: Table = {
        "self_attention.linear_qkv.weight": ([f"self_attn.{x}_proj.weight" for x in "qkv"], qkv),
        "self_attention.linear_proj.weight": (
            ["self_attn.o_proj.weight"],
            Split(1, arch.attention_width),
        ),
    }
    if arch.qkv_bias:
        biases = [f"self_attn.{x}_proj.bias" for x in "qkv"]
        table["self_attention.linear_qkv.bias"] = (biases, qkv)
    if arch.out_bias:
        table["self_attention.linear_proj.bias"] = (["self_attn.o_proj.bias"], Replicated())
    if arch.qk_norm:
        for x in "qk":
            table[f"self_attention.{x}_layernorm.weight"] = (
                [f"self_attn.{x}_norm.weight"],
                Replicated(),
            )
    return table


def _latent_table(arch: Architecture) -> Table:
    latent = arch.latent
    assert latent is not None
    rows = {"kv_up": arch.heads * (latent.plain_dim + latent.value_dim)}
    rows["q" if latent.query_rank is None else "q_up"] = arch.heads * arch.head_dim
    names = {"q": "q_proj", "q_up": "q_b_proj", "kv_up": "kv_b_proj"}
    table: Table = {
        f"self_attention.linear_{local}_proj.weight": (
            [f"self_attn.{names[local]}.weight"],
            Split(0, size),
        )
        for local, size in rows.items()
    }
    whole = {
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
    }
    if latent.query_rank is not None:
        whole |= {"linear_q_down_proj": "q_a_proj", "q_layernorm": "q_a_layernorm"}
    for local, name in whole.items():
        table[f"self_attention.{local}.weight"] = ([f"self_attn.{name}.weight"], Replicated())
    table["self_attention.linear_proj.weight"] = (
        ["self_attn.o_proj.weight"],
        Split(1, arch.attention_width),
    )
    return table


def _mlp_table(local: str, name: str, ffn: int, *, bias: bool = False) -> Table:
    parts: dict[str, tuple[list[str], Rule]] = {
        "linear_fc1.weight": (["gate_proj.weight", "up_proj.weight"], GateUp(ffn)),
        "linear_fc2.weight": (["down_proj.weight"], Split(1, ffn)),
    }
    if bias:
        parts["linear_fc1.bias"] = (["gate_proj.bias", "up_proj.bias"], GateUp(ffn))
        parts["linear_fc2.bias"] = (["down_proj.bias"], Replicated())
    return {
        f"{local}.{part}": ([f"{name}.{suffix}" for suffix in suffixes], rule)
        for part, (suffixes, rule) in parts.items()
    }


def _router_table(arch: Architecture) -> Table:
    assert arch.experts is not None and arch.spec.experts is not None
    block = arch.spec.experts.block
    table: Table = {"mlp.router.weight": ([f"{block}.gate.weight"], Replicated())}
    if arch.experts.sigmoid:
        bias = [f"{block}.gate.e_score_correction_bias"]
        table["mlp.router.expert_bias"] = (bias, Replicated())
    if arch.experts.shared_ffn:
        shared = f"{block}.shared_experts"
        table |= _mlp_table("mlp.shared_experts", shared, arch.experts.shared_ffn)
    return table


def expert_rule(arch: Architecture, expert: int, linear: str) -> tuple[list[str], Rule]:
    """Of linear_fc1 or linear_fc2 of one routed expert, which no tensor rank splits."""
    assert arch.experts is not None and arch.spec.experts is not None
    names = arch.spec.experts
    prefix = f"{names.block}.experts.{expert}."
    if linear == "linear_fc1":
        both = [f"{prefix}{x}.weight" for x in (names.gate, names.up)]
        return both, GateUp(arch.experts.ffn, split=False)
    return [f"{prefix}{names.down}.weight"], Split(1, arch.experts.ffn, split=False)


def entries(model: Any, arch: Architecture) -> Iterator[Entry]:
    """The parameters of this pipeline stage in model order, and the routers' buffers behind them.

    The last stage's copy of a tied embedding is skipped: the first stage owns it.
    """
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    groups = model.pg_collection
    offset = get_transformer_layer_offset(model.config, model.vp_stage, groups.pp.rank())
    buffers = [(n, b) for n, b in model.named_buffers() if n.endswith(".expert_bias")]
    for name, parameter in [*model.named_parameters(), *buffers]:
        if is_adapter(name):  # the stream adds it to its weight
            continue
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if layer:
            number = int(layer[1]) + offset
            suffixes, rule, expert = _of_layer(layer[2], number, arch, groups)
            prefix = f"model.layers.{number}."
            yield Entry(parameter, [prefix + s for s in suffixes], rule, expert)
        elif name == "output_layer.weight" and arch.tied:
            continue
        else:
            vocab = "layernorm" not in name
            rule = VocabRows(parameter.shape[0], arch.vocab) if vocab else Replicated()
            yield Entry(parameter, [TOP_TABLE[name]], rule)


def _of_layer(
    name: str, layer: int, arch: Architecture, groups: Any
) -> tuple[list[str], Rule, bool]:
    """Hugging Face suffixes and rule of a layer's parameter, and whether it is an expert's."""
    expert = EXPERT.fullmatch(name)
    if expert is None:
        return *layer_table(arch, layer)[TE_TO_LOCAL.get(name, name)], False
    assert arch.experts is not None
    local, linear = int(expert[1] or expert[4]), expert[2] or expert[3]
    first = groups.ep.rank() * (arch.experts.count // groups.ep.size())
    return *expert_rule(arch, first + local, linear), True


def expected_names(arch: Architecture) -> set[str]:
    """Every tensor name that a Hugging Face checkpoint of this architecture holds."""
    names = set(TOP_TABLE.values()) - ({"lm_head.weight"} if arch.tied else set())
    for layer in range(arch.layers):
        found = [suffixes for suffixes, _ in layer_table(arch, layer).values()]
        if arch.is_sparse(layer):
            assert arch.experts is not None
            for expert in range(arch.experts.count):
                found += [
                    expert_rule(arch, expert, linear)[0] for linear in ("linear_fc1", "linear_fc2")
                ]
        names |= {f"model.layers.{layer}.{s}" for suffixes in found for s in suffixes}
    return names
