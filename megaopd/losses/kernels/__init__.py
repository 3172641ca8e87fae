"""Fused passes over a vocabulary shard, where the machine has them; blocks.py is the plain torch.

launch.py: Triton, for CUDA tensors. cpu.py: C through ctypes, for fp32 on a CPU. Both have the
functions local_moments, divergence_sums and gradient_, import anywhere, and say in available()
whether they can run. MEGAOPD_NO_NATIVE=1 turns both off.
"""

import os
from types import ModuleType

import torch
from torch import Tensor

# Tests put a module here, for instance launch with TRITON_INTERPRET=1 on a CPU.
forced: ModuleType | None = None


def native(x: Tensor) -> ModuleType | None:
    """The module whose kernels can work on this tensor, or None."""
    if forced is not None:
        return forced if x.dtype != torch.float64 else None
    if os.environ.get("MEGAOPD_NO_NATIVE") or x.dtype == torch.float64:
        return None
    if x.is_cuda:
        from megaopd.losses.kernels import launch

        return launch if launch.available() else None
    from megaopd.losses.kernels import cpu

    return cpu if x.dtype == torch.float32 and cpu.available() else None
