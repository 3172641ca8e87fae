"""Ahead-of-time compilation of the kernels for a GPU that need not be there, and what they use.

    python -m megaopd.losses.kernels.aot        one JSON object a variant

The variants are launches planned by launch.py on small CPU tensors, so that what is compiled is
what would run: types, 16-byte alignment, flags, blocks and warps. Registers and stack are read from
the cubin, spills and the width of memory accesses from its machine code. Needs a process in which
Triton was imported without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megaopd.losses.divergences import KINDS
from megaopd.losses.kernels import triton_shard
from megaopd.losses.kernels.launch import (
    MOMENTS,
    OPTIONS,
    Launch,
    plan_divergences,
    plan_gradient,
    plan_group_maxima,
    plan_moments,
)

SM_90 = 90
SM_REGISTERS, SM_WARPS, WARP = 65536, 64, 32  # of an H100 SM
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TOOLS = Path(str(triton.__file__)).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Report:
    """What one compiled variant uses. Loads and stores: instructions in the machine code."""

    name: str
    block: int
    warps: int
    registers: int  # a thread
    stack: int  # bytes a thread
    spill_stores: int
    spill_loads: int
    shared: int  # bytes a program
    wide_loads: int  # 128 bits a thread
    wide_stores: int
    half_loads: int  # 16 bits a thread: elements of unaligned rows

    @property
    def resident_warps(self) -> int:
        """Warps on an SM as far as registers allow, of 64."""
        per_warp = -(-self.registers // 8) * 8 * WARP
        programs = SM_REGISTERS // (per_warp * self.warps)
        return min(SM_WARPS, programs * self.warps)


def variants() -> dict[str, Launch]:
    """A launch of every kernel, kind and combination of terms that the losses use."""
    s, t, c = torch.zeros(2, 8192).bfloat16(), torch.zeros(2, 8192).bfloat16(), torch.zeros(2)
    odd = s[:, :-3]  # aligned rows, a width that is no multiple of 16
    norm = (c, c, c, c)
    rkl, fkl = ("z_s", "z_t", "d_s"), ("z_s", "z_t", "d_t")
    found = {
        "moments rkl": plan_moments(s, t, rkl, None, 1.0)[0],
        "moments rkl, softcap": plan_moments(s, t, rkl, 30.0, 1.0)[0],
        "moments rkl, odd width": plan_moments(odd, odd, rkl, None, 1.0)[0],
        "moments rkl, fp32": plan_moments(s.float(), t.float(), rkl, None, 1.0)[0],
        "moments fkl": plan_moments(s, t, fkl, None, 1.0)[0],
        "moments rkl, entropies": plan_moments(s, t, (*rkl, "a_s", "a_t"), None, 1.0)[0],
        "moments all": plan_moments(s, t, MOMENTS, None, 1.0)[0],
        "moments student only": plan_moments(s, None, ("z_s", "a_s"), None, 1.0)[0],
    }
    for kind in KINDS:
        pair = plan_divergences(s, t, norm, [(kind, None, c), (kind, None, c)], None, 1.0)[0]
        found[f"sums {kind}"] = pair[0]
    found["sums alpha, added"] = pair[1]

    def gradient(kinds: int = 0, softcap: float | None = None, **coefs: Tensor) -> list[Launch]:
        terms = {name: coefs.get(name) for name in ("p", "px", "pd", "q")}
        return plan_gradient(s, t, norm, terms, [("jsd", None, c)] * kinds, softcap, 1.0)

    found["gradient p"] = gradient(p=c)[0]
    found["gradient p, softcap"] = gradient(p=c, softcap=30.0)[0]
    found["gradient rkl"] = gradient(p=c, px=c, pd=c)[0]
    found["gradient rkl, softcap"] = gradient(p=c, px=c, pd=c, softcap=30.0)[0]
    found["gradient fkl"] = gradient(p=c, q=c)[0]
    found["gradient rkl, odd width"] = plan_gradient(
        odd, odd, norm, {"p": c, "px": c, "pd": c, "q": None}, (), None, 1.0
    )[0]
    terms = {"p": c, "px": None, "pd": None, "q": None}
    for kind in KINDS:
        plan = plan_gradient(s, t, norm, terms, [(kind, None, c)], None, 1.0)
        found[f"gradient {kind} by its G"] = plan[0]
    to_buffer, from_buffer = gradient(kinds=2, p=c, px=c, pd=c, softcap=30.0)
    found["gradient to buffer"], found["gradient from buffer"] = to_buffer, from_buffer
    found["group maxima"] = plan_group_maxima(s, 64)[0]
    return found


def signature(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and alignment hints that Triton derives from the arguments of a launch."""
    types, constants, hints = {}, {}, {}
    for i, parameter in enumerate(getattr(triton_shard, launch.kernel).params):
        value = launch.arguments[parameter.name]
        aligned = False
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            types[parameter.name] = POINTERS[value.dtype]
            aligned = not parameter.do_not_specialize_on_alignment
        elif isinstance(value, int):
            types[parameter.name] = "i32"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        else:
            types[parameter.name] = "fp32"
        if aligned:
            hints[(i,)] = [["tt.divisibility", 16]]
    return types, constants, hints


def report(name: str, launch: Launch, arch: int = SM_90) -> Report:
    """Compiles the launch and reads what it uses."""
    types, constants, hints = signature(launch)
    kernel = getattr(triton_shard, launch.kernel)
    compiled = triton.compile(
        ASTSource(kernel, signature=types, constexprs=constants, attrs=hints),
        target=GPUTarget("cuda", arch, WARP),
        options={"num_warps": launch.tile.warps, **OPTIONS},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        code = _cuobjdump("-sass", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Report(
        name=name,
        block=launch.tile.block,
        warps=launch.tile.warps,
        registers=int(found[1]),
        stack=int(found[2]),
        spill_stores=_count("STL", code),
        spill_loads=_count("LDL", code),
        shared=compiled.metadata.shared,
        wide_loads=_count(r"LDG\.E\.[\w.]*128", code),
        wide_stores=_count(r"STG\.E\.[\w.]*128", code),
        half_loads=_count(r"LDG\.E\.[\w.]*U16", code),
    )


def reports() -> Iterator[Report]:
    for name, launch in variants().items():
        yield report(name, launch)


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [str(TOOLS / "cuobjdump"), option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _count(instruction: str, code: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", code))


if __name__ == "__main__":
    for line in reports():
        print(json.dumps({**asdict(line), "resident_warps": line.resident_warps}), flush=True)
