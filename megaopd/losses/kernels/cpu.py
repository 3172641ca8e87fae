"""Sums, gradients and top-k of one vocabulary shard on a CPU: fused passes in C, through ctypes.

Shapes: s, t [C, Vp] student and teacher logits, scaled already (fp32, unit column stride, any row
stride, any Vp >= 0); row vectors [C] fp32. Nothing here communicates. Entries <= -1e30 in both
models are out of the law: they contribute 0 and get gradient 0. NaN stays NaN.

The C files are compiled once a machine and kept in build/ (where that cannot be written, by every
process). Without a compiler, available() is False. Rows are divided over torch.get_num_threads()
threads; ctypes releases the interpreter's lock.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopd.losses.divergences import KINDS

SCALES = False  # soft-cap and temperature have to be applied before
MOMENTS = ("z_s", "z_t", "d_s", "d_t", "a_s", "a_t", "q_s", "r_s")  # bits and rows of enum Moment

Norm = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # m_s, log_z_s, m_t, log_z_t
KindTerm = tuple[str, float | None, Tensor]  # name, parameter, coef_C

_FOLDER = Path(__file__).parent
_SOURCES = ("cpu_shard.c", "cpu_topk.c", "cpu_rows.h", "cpu_math.h")
# Nothing that assumes the absence of NaN, or that reorders additions: rounding is done by some.
_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
_LANES = 16  # the widest vector of cpu_math.h
_THREAD_WORK = 1 << 16  # elements below which another thread costs more than it saves
_NONE, _TOP_ID = -3.0e38, (1 << 31) - 1  # fill the list of a shard with fewer than k ids


def available() -> bool:
    """Whether the C files could be compiled and loaded on this machine (tried once)."""
    return not os.environ.get("MEGAOPD_NO_NATIVE") and _library() is not None


def local_moments(s: Tensor, t: Tensor | None, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Offsets [1 or 2, C] and the named sums [len(names), C] relative to them; see Blocks.moments.

    An offset is 0, or the row's maximum where a sum would leave [1e-15, 1e15]. -inf where Vp = 0.
    """
    job = _Call(s, t)
    offsets, sums = job.moments(names)
    job.run("moments_rows")
    return offsets, _named(sums, names)


def divergence_sums(s: Tensor, t: Tensor, norm: Norm, parts: Sequence[KindTerm]) -> Tensor:
    """[len(parts) + 1, C]: per part the sum over this shard of p f(r); last, of sum_i coef_i G_i.

    norm is complete over all shards: log p = (s - m_s) - log_z_s.
    """
    job = _Call(s, t)
    sums = s.new_zeros(len(parts) + 1, s.shape[0])
    job.norm(norm)
    job.parts(parts)
    job.rows(sums=sums)
    job.run("divergence_rows")
    return sums


def gradient_(
    s: Tensor,
    t: Tensor | None,
    norm: Norm,
    *,
    p_coef: Tensor | None,
    pd_coef: Tensor | None = None,
    px_coef: Tensor | None = None,
    q_coef: Tensor | None = None,
    parts: Sequence[KindTerm] = (),
) -> None:
    """Overwrites s with d loss / d s; x = log p, y = log q:

        p (p_coef + pd_coef (s - t) + px_coef x) + q_coef q + sum_i coef_i G_i(x, y)

    t is not read if no term needs it.
    """
    needs_t = bool(parts) or pd_coef is not None or q_coef is not None
    assert t is not None or not needs_t, "these terms need teacher logits"
    job = _Call(s, t if needs_t else None)
    job.norm(norm)
    job.parts(parts)
    job.rows(p=p_coef, pd=pd_coef, px=px_coef, q=q_coef)
    job.run("gradient_rows", scratch=1)


def complete_(
    s: Tensor, t: Tensor, kind: str, parameter: float | None, names: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets, sums, value [C]) of one divergence where no other shard exists; s := d value / d s.

    offsets and sums as those of local_moments; each row stays in cache for all of it.
    """
    job = _Call(s, t)
    offsets, sums = job.moments(names)
    value = s.new_zeros(s.shape[0])
    job.parts([(kind, parameter, value)])
    job.rows(value=value)
    job.run("complete_rows", scratch=2)
    return offsets, _named(sums, names), value


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, columns int64) [C, k] of the k largest of each row, descending.

    Ties go to the lower column; -0.0 equals 0.0; NaN is the largest. Where Vp < k the rest is
    (-3.0e38, 2^31 - 1).
    """
    _check(x)
    values = x.new_empty(x.shape[0], k)
    columns = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    if x.shape[1] == 0 or k == 0:
        return values.fill_(_NONE), columns.fill_(_TOP_ID)
    job = _TopJob(
        x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), k, values.data_ptr(), columns.data_ptr()
    )
    _run("topk_rows", job, x.shape, 6 * x.shape[1])
    return values, columns


class _Job(ctypes.Structure):
    """Job of cpu_shard.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("s", "t")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "s_stride", "t_stride")),
        *((name, ctypes.c_void_p) for name in ("m_s", "log_z_s", "m_t", "log_z_t")),
        *((name, ctypes.c_void_p) for name in ("p", "pd", "px", "q")),
        *((name, ctypes.c_void_p) for name in ("offsets", "sums", "value")),
        *((name, ctypes.c_void_p) for name in ("kinds", "parameters", "coefs")),
        *((name, ctypes.c_int64) for name in ("parts", "names")),
    )


class _TopJob(ctypes.Structure):
    """TopJob of cpu_topk.c."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "width", "stride", "k")),
        *((name, ctypes.c_void_p) for name in ("values", "columns")),
    )


class _Call:
    """A job under construction, and the tensors that it points into."""

    def __init__(self, s: Tensor, t: Tensor | None) -> None:
        _check(s)
        self.s, self.t, self.held = s, t, []
        self.job = _Job(s=s.data_ptr(), rows=s.shape[0], width=s.shape[1], s_stride=s.stride(0))
        if t is not None:
            _check(t)
            assert t.shape == s.shape, (s.shape, t.shape)
            self.job.t, self.job.t_stride = t.data_ptr(), t.stride(0)

    def rows(self, **tensors: Tensor | None) -> None:
        """Sets pointers to fp32 tensors; None leaves them null."""
        for name, x in tensors.items():
            if x is not None:
                assert x.dtype == torch.float32 and x.shape[-1] == self.s.shape[0], (name, x)
                self.held.append(x.contiguous())
                setattr(self.job, name, self.held[-1].data_ptr())

    def norm(self, norm: Norm) -> None:
        m_s, log_z_s, m_t, log_z_t = norm
        self.rows(m_s=m_s, log_z_s=log_z_s)
        if self.t is not None:
            self.rows(m_t=m_t, log_z_t=log_z_t)

    def parts(self, parts: Sequence[KindTerm]) -> None:
        if not parts:
            return
        order = list(KINDS)  # that of enum Kind
        kinds = torch.tensor([order.index(name) for name, _, _ in parts], dtype=torch.int32)
        values = torch.tensor([_parameter(name, a) for name, a, _ in parts], dtype=torch.float32)
        self.held += [kinds, values]
        self.rows(coefs=torch.stack([coef for _, _, coef in parts]))
        self.job.kinds, self.job.parameters = kinds.data_ptr(), values.data_ptr()
        self.job.parts = len(parts)

    def moments(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The tensors that receive offsets and all eight sums."""
        known = MOMENTS if self.t is not None else ("z_s", "a_s", "q_s")
        assert len(set(names)) == len(names) and set(names) <= set(known), names
        offsets = self.s.new_full((1 if self.t is None else 2, self.s.shape[0]), -torch.inf)
        sums = self.s.new_zeros(len(MOMENTS), self.s.shape[0])
        self.rows(offsets=offsets, sums=sums)
        self.job.names = sum(1 << MOMENTS.index(name) for name in names)
        return offsets, sums

    def run(self, function: str, scratch: int = 0) -> None:
        """scratch: rows of fp32 that a thread needs."""
        if self.s.shape[1] > 0:
            _run(function, self.job, self.s.shape, scratch * (self.s.shape[1] + _LANES))


def _run(function: str, job: ctypes.Structure, shape: torch.Size, floats: int) -> None:
    """The rows divided over threads, `floats` of scratch memory each."""
    library = _library()
    assert library is not None, "no C compiler: see available()"
    call: Callable[..., Any] = getattr(library, function)
    rows = shape[0]
    threads = min(torch.get_num_threads(), rows, rows * shape[1] // _THREAD_WORK)
    threads = max(threads, 1)
    scratch = torch.empty(threads, floats)
    edges = [rows * i // threads for i in range(threads + 1)]

    def work(i: int) -> None:
        call(
            ctypes.byref(job),
            ctypes.c_int64(edges[i]),
            ctypes.c_int64(edges[i + 1]),
            ctypes.c_void_p(scratch[i].data_ptr()),
        )

    others = [_pool(os.getpid(), threads - 1).submit(work, i) for i in range(1, threads)]
    work(0)
    for other in others:
        other.result()


@functools.cache
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """Of this process: a fork's child has none of its parent's threads."""
    return ThreadPoolExecutor(threads, "megaopd-rows")


def _check(z: Tensor) -> None:
    assert z.ndim == 2 and (z.stride(1) == 1 or z.shape[1] <= 1), (z.shape, z.stride())
    assert z.dtype == torch.float32 and z.device.type == "cpu", (z.dtype, z.device)


def _parameter(name: str, value: float | None) -> float:
    return float(next((v for v in (value, KINDS[name].default) if v is not None), 0.0))


def _named(sums: Tensor, names: Sequence[str]) -> Tensor:
    return sums[[MOMENTS.index(name) for name in names]]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled C files, or None where no compiler makes them."""
    for compiler in _compilers():
        for native in (["-march=native"], []):
            library = _built([*compiler, *_FLAGS, *native])
            if library is not None:
                return library
    return None


def _compilers() -> list[list[str]]:
    """Those that exist of $CC, cc, gcc and clang."""
    given = shlex.split(os.environ.get("CC", ""))
    commands = [*([given] if given else []), ["cc"], ["gcc"], ["clang"]]
    return [command for command in commands if shutil.which(command[0])]


def _built(command: list[str]) -> ctypes.CDLL | None:
    """The library that this command makes; compiled unless build/ has it."""
    key = hashlib.sha256("\0".join([*command, _machine()]).encode())
    for name in _SOURCES:
        key.update((_FOLDER / name).read_bytes())
    kept = _FOLDER / "build" / f"cpu-{key.hexdigest()[:16]}.so"
    with contextlib.suppress(OSError):
        kept.parent.mkdir(exist_ok=True)
        if kept.exists() or _compile(command, kept):
            return ctypes.CDLL(str(kept))
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / kept.name
        if _compile(command, made):
            return ctypes.CDLL(str(made))  # stays mapped when the file is gone
    return None


def _compile(command: list[str], to: Path) -> bool:
    """Whether it worked. Renames at the end: several ranks may compile at once."""
    sources = [str(_FOLDER / name) for name in _SOURCES if name.endswith(".c")]
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        made = Path(folder) / to.name
        run = subprocess.run([*command, *sources, "-o", str(made), "-lm"], capture_output=True)
        if run.returncode == 0:
            made.replace(to)
    return run.returncode == 0


def _machine() -> str:
    """What -march=native depends on."""
    lines: set[str] = set()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        wanted = ("model name", "flags", "Features", "CPU part")
        lines = {line for line in text.splitlines() if line.startswith(wanted)}
    return "\n".join([platform.machine(), platform.processor(), *sorted(lines)])
