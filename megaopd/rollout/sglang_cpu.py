"""SGLang on plain CPU torch: a platform for its plug-in interface.

pyproject.toml names `activate` under the entry point `sglang.srt.platforms`, so SGLang finds it in
each of its processes; nothing else imports this module. SGLang's own CPU engine wants AMX kernels;
this one runs wherever torch does, slowly.
"""

import os
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from megaopd import platform

NAME = "megaopd_cpu"  # the entry point's name, and what SGLANG_PLATFORM selects


def activate() -> str | None:
    """The platform class that SGLang is to load; None where it has a GPU to run on."""
    if platform.has_gpu() and os.environ.get("SGLANG_PLATFORM") != NAME:
        return None
    return f"{__name__}:CpuTorchPlatform"


class CpuTorchPlatform(CpuDeviceMixin, SRTPlatform):
    """Torch's own operators for everything."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Backends that run anywhere, where none was asked for."""
        if server_args.attention_backend is None:
            server_args.attention_backend = "torch_native"
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_dispatch_key_name(self) -> str:
        """The methods that custom operators register for plain torch."""
        return "native"
