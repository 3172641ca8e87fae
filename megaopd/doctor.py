"""What is installed, and which kernels, layer specs and backends will be used and why."""

import importlib
import importlib.metadata
import os
import sys

from megaopd import platform

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy")
OPTIONAL = ("transformer-engine", "apex", "sglang", "triton", "wandb", "math-verify")
OPTIONAL += ("reasoning-gym",)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def choices() -> list[tuple[str, str, str]]:
    """(what, what will be used, why), for every choice that depends on this machine."""
    gpu, te = platform.has_gpu(), platform.use_transformer_engine()
    apex = platform.has_apex_wgrad_fusion()
    return [
        ("device", "cuda" if gpu else "cpu", "torch.cuda.is_available()" if gpu else "no GPU"),
        ("collectives", platform.backend(), "NCCL needs a GPU" if not gpu else "GPUs"),
        (
            "layer spec",
            "Transformer Engine" if te else "megatron-core local",
            "it imports and a GPU is there"
            if te
            else ("no GPU" if not gpu else "transformer_engine does not import"),
        ),
        (
            "Adam",
            "Transformer Engine FusedAdam" if te else ("torch AdamW" if gpu else "torch foreach"),
            "state laid out like FusedAdam's, so that checkpoints move between machines"
            if not gpu
            else "megatron-core's choice",
        ),
        (
            "weight-gradient accumulation",
            "fused (apex)" if apex else "autograd, added to main_grad",
            "fused_weight_gradient_mlp_cuda imports" if apex else "apex's CUDA extension is absent",
        ),
        ("loss kernels", *_loss_kernels(gpu)),
        ("rollouts", "embedded (transformers generate)", "the only engine so far"),
    ]


def _loss_kernels(gpu: bool) -> tuple[str, str]:
    """(what, why) of the passes over a chunk's logits."""
    import torch

    from megaopd.losses.kernels import native

    ops = native(torch.zeros(1, 1, device="cuda" if gpu else "cpu"))
    if ops is None:
        return "plain torch", "triton does not import" if gpu else "no C compiler"
    return ("Triton", "a GPU") if gpu else ("C, compiled for this CPU", "fp32 on a CPU")


def print_report() -> None:
    """Print versions and choices as two tables."""
    from rich.console import Console
    from rich.table import Table

    platform.install()
    console = Console()
    versions = Table("package", "version", title=f"Python {sys.version.split()[0]}")
    for package in (*PACKAGES, *OPTIONAL):
        found = _version(package)
        absent = "absent" if package in OPTIONAL else "MISSING: needed"
        versions.add_row(package, found or absent)
    console.print(versions)
    table = Table("what", "used", "why", title=f"choices on this machine ({os.cpu_count()} CPUs)")
    for row in choices():
        table.add_row(*row)
    console.print(table)
