"""A transformers model's tensors by the names that they have in its files.

In memory, transformers holds the experts of a layer as one tensor; in files each stands alone.
"""

from typing import Any

from megaopd.models.arch import Architecture


def by_file_name(tensors: dict[str, Any], arch: Architecture) -> dict[str, Any]:
    """Hugging Face name -> tensor, or view of one, for a state dict (or its gradients).

    A tied output layer is left out: the embedding is the same tensor.
    """
    names, found = arch.spec.experts, {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".mlp.")
        if arch.tied and name == "lm_head.weight":
            continue
        if names is None or not part.startswith(("experts.", "gate.")):
            found[name] = tensor
        elif part.startswith("gate."):
            found[f"{layer}.{names.block}.{part}"] = tensor
        else:
            kinds = (names.gate, names.up) if part.endswith("gate_up_proj") else (names.down,)
            for expert, both in enumerate(tensor):
                for kind, one in zip(kinds, both.chunk(len(kinds)), strict=True):
                    found[f"{layer}.{names.block}.experts.{expert}.{kind}.weight"] = one
    return found
