"""A Hugging Face config.json as the numbers that define a model, checked.

Importable without torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopd.errors import UserError
from megaopd.parallel import ParallelConfig

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
    tensor, places = parallel.tensor, parallel.pipeline * parallel.virtual
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
    if arch.layers % places:
        chunks = f" x {parallel.virtual} chunks" if parallel.virtual > 1 else ""
        raise UserError(
            f"{who}: {arch.layers} layers with pipeline parallel {parallel.pipeline}{chunks}",
            expected="a pipeline size (times chunks) that divides the layers",
            fix=f"use one of {[n for n in range(1, arch.layers + 1) if arch.layers % n == 0][:8]}",
        )
