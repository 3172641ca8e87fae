"""Writes docs/kernels.md: what each Triton kernel uses on an H100. Needs no GPU.

python tools/kernel_report.py
"""

import os
from collections.abc import Iterable
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import triton

from megaopd.losses.kernels.aot import Report, reports

PAGE = Path(__file__).parents[1] / "docs/kernels.md"
TEXT = """# Triton kernels: resources on an H100

Written by `python tools/kernel_report.py`: compiled ahead of time for sm_90 by Triton {version} and
read from the machine code, not measured on a GPU. A variant is a launch as
`megaopd/losses/kernels/launch.py` plans it, in bf16 unless it says otherwise, with rows at
multiples of 16 elements. Block: elements of a row at a time. Resident: warps on an SM (of 64) as
far as registers allow. Spills, loads and stores count instructions; wide ones move 128 bits a
thread. 16-bit loads occur only in the last block of a row whose width is no multiple of 16.
Shared: bytes a program.

{rows}
"""
COLUMNS = (
    *("variant", "block", "warps", "registers", "resident", "spill stores", "spill loads"),
    *("shared", "wide loads", "wide stores", "16-bit loads"),
)


def row(r: Report) -> tuple[object, ...]:
    return (r.name, r.block, r.warps, r.registers, r.resident_warps, r.spill_stores, r.spill_loads,
            r.shared, r.wide_loads, r.wide_stores, r.half_loads)  # fmt: skip


def line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    rows = "\n".join(map(line, [COLUMNS, ["---"] * len(COLUMNS), *map(row, reports())]))
    PAGE.write_text(TEXT.format(version=triton.__version__, rows=rows))
    print(PAGE)
