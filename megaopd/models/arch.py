"""A Hugging Face config.json as the numbers that define a model, checked.

Importable without torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopd.errors import UserError
from megaopd.models.families import FAMILIES, NEUTRAL, Family
from megaopd.models.layout import check_layout as check_layout
from megaopd.models.layout import padded_vocab as padded_vocab
from megaopd.models.rope import Rope, read_rope


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layers."""

    count: int  # routed experts of a layer
    top_k: int  # of them, for each token
    ffn: int  # MLP columns of one expert
    sparse: tuple[bool, ...]  # which layers have experts; the others have a dense MLP
    shared_ffn: int = 0  # MLP columns of the shared experts together
    sigmoid: bool = False  # scores: sigmoid with a bias that only chooses, or softmax
    normalised: bool = True  # whether the chosen experts' weights sum to one
    groups: int | None = None  # experts are chosen from the best `top_groups` of these groups
    top_groups: int | None = None
    scale: float | None = None  # of the weights


@dataclass(frozen=True)
class Latent:
    """Multi-latent attention: queries, keys and values come out of narrow projections."""

    query_rank: int | None  # None: queries are projected at once
    kv_rank: int
    plain_dim: int  # of a head of queries and keys, without position
    rope_dim: int  # with
    value_dim: int


@dataclass(frozen=True)
class Architecture:
    """The numbers of a Hugging Face config.json that define the model, checked."""

    family: str
    family_class: str  # the key in families.FAMILIES
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int  # of queries and keys
    norm_eps: float
    max_positions: int
    tied: bool
    rope: Rope
    local_rope: Rope | None = None  # of the layers with a window, if they have their own
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None  # positions that a token sees, itself among them
    windowed: tuple[bool, ...] = ()  # which layers have the window
    softmax_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None
    final_softcap: float | None = None  # of the logits; the loss applies it
    embedding_scale: float | None = None
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def spec(self) -> Family:
        return FAMILIES[self.family_class]

    @property
    def attention_width(self) -> int:
        """Columns of the attention's output projection."""
        return self.heads * (self.latent.value_dim if self.latent else self.head_dim)

    def is_sparse(self, layer: int) -> bool:
        return self.experts is not None and self.experts.sparse[layer]


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
        UserError: an architecture, activation, rope scaling or other key that changes the maths and
            is not supported, by name.
    """
    name = (hf_config.get("architectures") or ["?"])[0]
    if name not in FAMILIES:
        raise UserError(
            f"{where}: architecture {name}", expected="one of " + ", ".join(sorted(FAMILIES))
        )
    family = FAMILIES[name]
    _refuse_unsupported(hf_config, family, where)
    heads = hf_config["num_attention_heads"]
    latent = _latent(hf_config, where) if family.latent else None
    head_dim = hf_config.get("head_dim") or hf_config["hidden_size"] // heads
    if latent:
        head_dim = latent.plain_dim + latent.rope_dim
    rope, local_rope = _ropes(hf_config, family, where)
    if latent and rope.magnitude != 1.0:
        raise UserError(
            f"{where}: yarn that scales cosine and sine by {rope.magnitude:.4g}",
            expected="mscale equal to mscale_all_dim in multi-latent attention",
        )
    scalar = hf_config.get("query_pre_attn_scalar") if family.gemma else None
    scale = float(scalar) ** -0.5 if scalar else None
    if rope.score_factor != 1.0:
        scale = head_dim**-0.5 * rope.score_factor
    window, windowed = _windows(hf_config, family, where)
    biased = family.qkv_bias == "config" and bool(hf_config.get("attention_bias"))
    return Architecture(
        family=family.name,
        family_class=name,
        vocab=hf_config["vocab_size"],
        hidden=hf_config["hidden_size"],
        ffn=hf_config["intermediate_size"],
        layers=hf_config["num_hidden_layers"],
        heads=heads,
        kv_heads=heads if latent else hf_config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        norm_eps=hf_config["rms_norm_eps"],
        max_positions=hf_config["max_position_embeddings"],
        tied=bool(hf_config.get("tie_word_embeddings", family.tied)),
        rope=rope,
        local_rope=local_rope,
        qkv_bias=biased or family.qkv_bias == "always",
        out_bias=biased,
        mlp_bias=family.mlp_bias and bool(hf_config.get("mlp_bias")),
        qk_norm=family.qk_norm,
        window=window,
        windowed=windowed,
        softmax_scale=scale,
        attention_softcap=hf_config.get("attn_logit_softcapping") if family.softcaps else None,
        final_softcap=hf_config.get("final_logit_softcapping") if family.softcaps else None,
        embedding_scale=hf_config["hidden_size"] ** 0.5 if family.gemma else None,
        experts=_experts(hf_config, family, where) if family.experts else None,
        latent=latent,
    )


def _refuse_unsupported(hf_config: dict[str, Any], family: Family, where: str) -> None:
    needed = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
    ]
    if family.experts:
        needed += [_count_key(hf_config, family), family.experts.ffn_key, "num_experts_per_tok"]
    missing = [key for key in needed if key not in hf_config]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}", expected=f"a {family.name} config")
    # Gemma's own key wins over the general one there.
    activation = hf_config.get("hidden_activation") or hf_config.get("hidden_act")
    if (activation or family.activation) != family.activation:
        raise UserError(f"{where}: hidden_act={activation}", expected=family.activation)
    for key, neutral in NEUTRAL.items():
        value = hf_config.get(key)
        if value and value not in neutral:
            raise UserError(
                f"{where}: {key}={json.dumps(value)}",
                expected=f"a {family.name} model without it",
            )
    known = {"attention_bias": family.qkv_bias == "config", "mlp_bias": family.mlp_bias}
    for key, supported in known.items():
        if hf_config.get(key) and not supported:
            raise UserError(f"{where}: {key}=true", expected=f"{key}=false for {family.name}")
    if hf_config.get("rope_interleave") is False and family.latent:
        raise UserError(f"{where}: rope_interleave=false", expected="interleaved rotary pairs")


def _count_key(hf_config: dict[str, Any], family: Family) -> str:
    assert family.experts is not None
    keys = family.experts.count_keys
    return next((key for key in keys if key in hf_config), keys[0])


def _ropes(hf_config: dict[str, Any], family: Family, where: str) -> tuple[Rope, Rope | None]:
    """(of every layer or those without a window, of those with one where they differ)."""
    given = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    theta = hf_config.get("rope_theta") or family.rope_theta
    common: dict[str, Any] = {
        "max_positions": hf_config["max_position_embeddings"],
        "where": where,
        "latent": family.latent,
    }
    if family.local_rope is None:
        return read_rope(given, theta=theta, **common), None
    local_theta = hf_config.get("rope_local_base_freq") or family.local_rope
    if "full_attention" in given or "sliding_attention" in given:
        full, local = given.get("full_attention") or {}, given.get("sliding_attention") or {}
    else:
        full, local = given, {}
    return (
        read_rope(full, theta=theta, **common),
        read_rope(local, theta=local_theta, **common),
    )


def _windows(
    hf_config: dict[str, Any], family: Family, where: str
) -> tuple[int | None, tuple[bool, ...]]:
    """(window, which layers have it); (None, ()) where no layer has."""
    window, layers = hf_config.get("sliding_window"), hf_config["num_hidden_layers"]
    if family.window in ("switch", "switch_all") and not hf_config.get("use_sliding_window"):
        window = None
    if not window or family.window == "none":
        return None, ()
    kinds = hf_config.get("layer_types")
    if family.window in ("all", "switch_all"):
        has = [True] * layers
    elif kinds:
        unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
        if unknown or len(kinds) != layers:
            raise UserError(
                f"{where}: {len(kinds)} layer_types, among them {unknown or 'no unknown ones'}",
                expected=f"{layers} of sliding_attention or full_attention",
            )
        has = [kind == "sliding_attention" for kind in kinds]
    elif family.window == "switch":
        has = [layer >= hf_config.get("max_window_layers", 28) for layer in range(layers)]
    else:
        period = hf_config.get("sliding_window_pattern") or family.window_period
        has = [bool((layer + 1) % period) for layer in range(layers)]
    return (int(window), tuple(has)) if any(has) else (None, ())


def _latent(hf_config: dict[str, Any], where: str) -> Latent:
    keys = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    missing = [key for key in keys if not hf_config.get(key)]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}", expected="multi-latent attention")
    if hf_config["rms_norm_eps"] != 1e-6:
        raise UserError(
            f"{where}: rms_norm_eps={hf_config['rms_norm_eps']}",
            expected="1e-06: transformers fixes that of the latent norms, megatron-core takes one",
        )
    return Latent(hf_config.get("q_lora_rank"), *(hf_config[key] for key in keys))


def _experts(hf_config: dict[str, Any], family: Family, where: str) -> Experts:
    assert family.experts is not None
    layers, ffn = hf_config["num_hidden_layers"], hf_config[family.experts.ffn_key]
    count, top_k = hf_config[_count_key(hf_config, family)], hf_config["num_experts_per_tok"]
    common: dict[str, Any] = {"count": count, "top_k": top_k, "ffn": ffn}
    if not family.latent:
        # transformers: Qwen's keys; Mixtral's has none of them.
        step, dense = hf_config.get("decoder_sparse_step") or 1, hf_config.get("mlp_only_layers")
        sparse = [(i + 1) % step == 0 and i not in (dense or []) for i in range(layers)]
        normalised = family.name == "mixtral" or bool(hf_config.get("norm_topk_prob"))
        return Experts(**common, sparse=tuple(sparse), normalised=normalised)
    groups, top_groups = hf_config.get("n_group") or 1, hf_config.get("topk_group") or 1
    checks: tuple[tuple[str, bool, str], ...] = (
        ("norm_topk_prob", hf_config.get("norm_topk_prob", True), "true"),
        ("scoring_func", hf_config.get("scoring_func", "sigmoid") == "sigmoid", "sigmoid"),
        ("topk_method", hf_config.get("topk_method", "noaux_tc") == "noaux_tc", "noaux_tc"),
        # megatron-core scores a group by its best top_k / top_groups experts, DeepSeek by two.
        ("topk_group", groups == 1 or top_k // top_groups == 2, "half of num_experts_per_tok"),
        ("moe_layer_freq", hf_config.get("moe_layer_freq", 1) == 1, "1"),
    )
    for key, supported, expected in checks:
        if not supported:
            raise UserError(f"{where}: {key}={hf_config.get(key)}", expected=expected)
    first = hf_config.get("first_k_dense_replace", 3)
    return Experts(
        **common,
        sparse=tuple(layer >= first for layer in range(layers)),
        shared_ffn=ffn * (hf_config.get("n_shared_experts") or 0),
        sigmoid=True,
        groups=groups if groups > 1 else None,
        top_groups=top_groups if groups > 1 else None,
        scale=hf_config.get("routed_scaling_factor"),
    )
