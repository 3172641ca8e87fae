"""Tiny random Hugging Face models of every family, written to disk for the ranks of a test."""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 101  # not a multiple of any padding
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def tiny(family: str, *, tied: bool, seed: int = 7, **changes: Any) -> Any:
    """A random fp32 model whose norms and biases are not at their trivial initial values."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "eos_token_id": VOCAB - 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "dtype": "float32",
    }
    if family == "qwen3":
        shape["head_dim"] = 16
    torch.manual_seed(seed)
    config = CONFIGS[family](**{**shape, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model


def save_tiny(root: Path, family: str, *, tied: bool, **changes: Any) -> Path:
    """`tiny` saved under `root`; its directory."""
    where = root / f"{family}-{'tied' if tied else 'untied'}"
    tiny(family, tied=tied, **changes).save_pretrained(where)
    return where


def tokens(batch: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    """[B, S] token ids."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
