"""What is installed, and which kernels, layer specs and backends will be used and why."""

import importlib
import importlib.metadata
import os
import shutil
import sys
from typing import Any

from megaopd import platform

# The versions that were seen to work together: the pins of launch/requirements-*.txt.
KNOWN_GOOD = {
    "torch": "2.13.0",
    "megatron-core": "0.16.1",
    "transformers": "5.19.0",
    "tokenizers": "0.23.2",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "sglang": "0.5.23",
    "triton": "3.9.0",
    "transformer-engine": "2.11.0",
    "math-verify": "0.9.0",
    "reasoning-gym": "0.1.25",
}
NEEDED = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy")
OPTIONAL = {
    "transformer-engine": "local layers, torch attention and norms in its place",
    "apex": "Transformer Engine's or torch's Adam, autograd's weight gradients in its place",
    "sglang": "only rollout.engine = embedded",
    "triton": "loss kernels in C (CPU) or plain torch in its place",
    "wandb": "metrics.jsonl and the console only",
    "math-verify": "answers are compared as text",
    "reasoning-gym": "no tasks of that name",
}

Row = tuple[str, str, str]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # a CUDA extension may fail with anything where its libraries are absent
        return False
    return True


def versions() -> list[Row]:
    """(package, version, verdict against what is known to work together)."""
    rows = []
    for package in (*NEEDED, *OPTIONAL):
        have, good = _version(package), KNOWN_GOOD.get(package, "")
        if not have:
            verdict = "MISSING: needed" if package in NEEDED else f"absent: {OPTIONAL[package]}"
        elif package == "apex" and not _imports("amp_C"):
            verdict = "not NVIDIA's apex with its CUDA extensions: not used"
        elif have.partition("+")[0] == good or not good:
            verdict = "known to work" if good else ""
        else:
            verdict = f"not tried: known to work is {good}"
        rows.append((package, have, verdict))
    return rows


def choices() -> list[Row]:
    """(what, what will be used, why), for every choice that depends on this machine."""
    gpu, te = platform.has_gpu(), platform.use_transformer_engine()
    apex = gpu and _imports("amp_C")
    no_te = "no GPU" if not gpu else "transformer_engine does not import"
    return [
        ("device", *_device(gpu)),
        ("collectives", *_collectives(gpu)),
        ("layer spec", "Transformer Engine" if te else "megatron-core local", _why(te, no_te)),
        (
            "attention",
            "Transformer Engine (flash, fused)" if te else "torch scaled_dot_product_attention",
            "its spec chooses by shape; NVTE_FLASH_ATTN, NVTE_FUSED_ATTN" if te else no_te,
        ),
        (
            "norms",
            "Transformer Engine, fused with the next layer" if te else "torch.nn.RMSNorm",
            _why(te, f"{no_te}; apex has no RMSNorm that megatron-core would take"),
        ),
        ("Adam", *_adam(gpu, te, apex)),
        ("weight-gradient accumulation", *_weight_gradients(gpu, te)),
        ("loss kernels", *_loss_kernels(gpu)),
        ("optimizer on the host", *_offload(gpu, te)),
        ("rollouts", *_rollouts()),
        ("disk here", *_disk()),
    ]


def _why(te: bool, otherwise: str) -> str:
    return "it imports and a GPU is there" if te else otherwise


def _device(gpu: bool) -> tuple[str, str]:
    import torch

    if not gpu:
        return "cpu", "torch.cuda.is_available() is False"
    found = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    used = f"{torch.cuda.device_count()} x {found.name}, {found.total_memory / 2**30:.0f} GiB"
    return used, f"torch built for CUDA {torch.version.cuda}, compute capability {major}.{minor}"


def _collectives(gpu: bool) -> tuple[str, str]:
    import torch

    if not gpu:
        return platform.backend(), "NCCL needs a GPU"
    cuda: Any = torch.cuda
    return f"{platform.backend()} {'.'.join(map(str, cuda.nccl.version()))}", "GPUs"


def _adam(gpu: bool, te: bool, apex: bool) -> tuple[str, str]:
    if not gpu:
        why = "state laid out like FusedAdam's, so that checkpoints move between machines"
        return "torch foreach", why
    if te:
        return "Transformer Engine FusedAdam", "megatron-core's first choice"
    if apex:
        return "apex FusedAdam", "Transformer Engine is absent"
    why = "neither Transformer Engine nor apex; a distributed optimizer's checkpoint of it saves "
    return "torch AdamW", why + "but does not load: set optim.distributed=false"


def _weight_gradients(gpu: bool, te: bool) -> tuple[str, str]:
    if platform.has_apex_wgrad_fusion():
        how = "Transformer Engine's" if te else "apex's"
        return f"fused into the product ({how})", "fused_weight_gradient_mlp_cuda imports"
    why = "no GPU" if not gpu else "apex's CUDA extension is absent"
    return "autograd, added to main_grad; the output layer's inside the loss", why


def _offload(gpu: bool, te: bool) -> tuple[str, str]:
    if gpu and te:
        return "available", "optim.cpu_offload, optim.state_dtype"
    return "refused", "optim.cpu_offload and state_dtype need a GPU and Transformer Engine"


def _loss_kernels(gpu: bool) -> tuple[str, str]:
    """(what, why) of the passes over a chunk's logits."""
    import torch

    from megaopd.losses.kernels import native

    ops = native(torch.zeros(1, 1, device="cuda" if gpu else "cpu"))
    if ops is None:
        return "plain torch", "triton does not import" if gpu else "no C compiler"
    return ("Triton", "a GPU") if gpu else ("C, compiled for this CPU", "fp32 on a CPU")


def _rollouts() -> tuple[str, str]:
    if not _version("sglang"):
        return "embedded (transformers generate)", "sglang is not installed"
    return "embedded, or SGLang servers", "rollout.engine chooses"


def _disk() -> tuple[str, str]:
    usage = shutil.disk_usage(".")
    free = f"{usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f}"
    return free, "a checkpoint takes 12 to 18 bytes a trained parameter, checkpoint.keep of them"


def print_report() -> None:
    """Print versions and choices as two tables."""
    from rich.console import Console
    from rich.table import Table

    platform.install()
    console = Console()
    table = Table("package", "version", "verdict", title=f"Python {sys.version.split()[0]}")
    for row in versions():
        table.add_row(*row)
    console.print(table)
    table = Table("what", "used", "why", title=f"choices on this machine ({os.cpu_count()} CPUs)")
    for row in choices():
        table.add_row(*row)
    console.print(table)
