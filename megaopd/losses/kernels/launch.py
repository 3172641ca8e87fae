"""Sums and gradients of one vocabulary shard by Triton kernels: the wrappers that losses call.

Shapes: s, t [C, Vp] student and teacher logits (bf16, fp16 or fp32, unit column stride, any row
stride, any Vp >= 0); row vectors [C] fp32; all arithmetic fp32. Nothing here communicates.

Both models' logits z are scaled on load: softcap * tanh(z / softcap) if softcap is set, then
* inv_temperature; s and t below are the scaled ones. Entries <= -1e30 are out of the law: where
both are, they contribute 0 and get gradient 0, with or without softcap.

The wrappers only plan launches (Launch) and run them; aot.py compiles the same plans without a GPU.
Bytes a token moved, b per logit: moments and divergence_sums 2 b Vp (a kind), gradient_ 3 b Vp.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megaopd.losses.divergences import KINDS

SCALES = True  # soft-cap and temperature are applied as logits are read
MOMENTS = ("z_s", "z_t", "d_s", "d_t", "a_s", "a_t", "q_s", "r_s")

Norm = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # m_s, log_z_s, m_t, log_z_t
KindTerm = tuple[str, float | None, Tensor]  # name, parameter, coef_C


@dataclass(frozen=True)
class Tile:
    """Elements of a row that a program works on at a time, and the warps that share them."""

    block: int
    warps: int


# Chosen from docs/kernels.md: no spills, 16-byte loads, and half of an SM's warps or more resident.
TILES = {
    "moments_kernel": Tile(2048, 8),
    "divergence_kernel": Tile(2048, 8),
    "gradient_kernel": Tile(2048, 8),
    "group_maxima_kernel": Tile(4096, 8),
}
OPTIONS = {"enable_fp_fusion": True}  # explicit: Triton's default changes with its version


@dataclass(frozen=True)
class Launch:
    """One kernel of triton_shard.py on `rows` programs."""

    kernel: str
    rows: int
    arguments: dict[str, Any]

    @property
    def tile(self) -> Tile:
        return TILES[self.kernel]

    def run(self) -> None:
        kernel = getattr(_kernels(), self.kernel)
        kernel[(self.rows,)](**self.arguments, num_warps=self.tile.warps, **OPTIONS)


@functools.cache
def available() -> bool:
    """Whether Triton can be imported. It runs on CUDA tensors, and in its interpreter on any."""
    try:
        _kernels()
    except ImportError:
        return False
    return True


def local_moments(
    s: Tensor,
    t: Tensor | None,
    names: Sequence[str],
    *,
    softcap: float | None = None,
    inv_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Row maxima [1 or 2, C] (m_s, and m_t if t is given) and the named sums [len(names), C].

        z_s = sum e^(s-m_s)             d_s = sum e^(s-m_s) (s-t)     a_s = sum e^(s-m_s) s
        z_t = sum e^(t-m_t)             d_t = sum e^(t-m_t) (t-s)     a_t = sum e^(t-m_t) t
        q_s = sum e^(2(s-m_s))          r_s = sum e^(2(s-m_s)) (s-t)

    m is this shard's own maximum, -inf where Vp = 0. One pass over s and t.
    """
    launch, offsets, sums = plan_moments(s, t, names, softcap, inv_temperature)
    if s.shape[1] == 0:
        return offsets.fill_(-torch.inf), sums.zero_()
    _run([launch])
    return offsets, sums


def divergence_sums(
    s: Tensor,
    t: Tensor,
    norm: Norm,
    kinds: Sequence[KindTerm],
    *,
    softcap: float | None = None,
    inv_temperature: float = 1.0,
) -> Tensor:
    """[len(kinds) + 1, C]: per kind the sum over this shard of p f(r); last, of sum_i coef_i G_i.

    norm holds the maxima and the logarithms of Z that are complete over all shards:
    log p = (s - m_s) - log_z_s. Terms and G: losses/divergences.py. One pass a kind.
    """
    launches, sums = plan_divergences(s, t, norm, kinds, softcap, inv_temperature)
    if s.shape[1] == 0 or not kinds:
        return sums.zero_()
    _run(launches)
    return sums


def gradient_(
    s: Tensor,
    t: Tensor | None,
    norm: Norm,
    *,
    p_coef: Tensor | None,
    px_coef: Tensor | None = None,
    pd_coef: Tensor | None = None,
    q_coef: Tensor | None = None,
    parts: Sequence[KindTerm] = (),
    softcap: float | None = None,
    inv_temperature: float = 1.0,
) -> None:
    """Overwrites s, in its dtype, with d loss / d z; x = log p, y = log q:

        p (p_coef + px_coef x + pd_coef (s - t)) + q_coef q + sum_i coef_i G_i(x, y)

    times 1 - tanh^2(z / softcap) where softcap is set. The coefficients contain the temperature's
    factors. t is not read if no term needs it. More than one part takes one pass a kind and an
    fp32 buffer [C, Vp].
    """
    coefs = {"p": p_coef, "px": px_coef, "pd": pd_coef, "q": q_coef}
    if s.shape[1] > 0:
        _run(plan_gradient(s, t, norm, coefs, parts, softcap, inv_temperature))


def group_maxima(s: Tensor, group: int = 64) -> Tensor:
    """[C, ceil(Vp / group)], in s's dtype: maxima of `group` contiguous ids (a power of two)."""
    launch, maxima = plan_group_maxima(s, group)
    if maxima.shape[1] > 0:
        _run([launch])
    return maxima


def plan_moments(
    s: Tensor, t: Tensor | None, names: Sequence[str], softcap: float | None, inv_temperature: float
) -> tuple[Launch, Tensor, Tensor]:
    """The launch of local_moments and the two tensors that it fills."""
    assert len(set(names)) == len(names) and set(names) <= set(MOMENTS), names
    assert t is not None or set(names) <= {"z_s", "a_s", "q_s"}, "these sums need teacher logits"
    rows = s.shape[0]
    offsets = s.new_empty(1 if t is None else 2, rows, dtype=torch.float32)
    sums = s.new_empty(len(names), rows, dtype=torch.float32)
    slots = {name.upper(): names.index(name) if name in names else -1 for name in MOMENTS}
    arguments = {
        **_logits("moments_kernel", s, t, softcap, inv_temperature),
        "offsets_ptr": offsets,
        "sums_ptr": sums,
        "sums_stride": rows,
        **slots,
    }
    return Launch("moments_kernel", rows, arguments), offsets, sums


def plan_divergences(
    s: Tensor,
    t: Tensor,
    norm: Norm,
    kinds: Sequence[KindTerm],
    softcap: float | None,
    inv_temperature: float,
) -> tuple[list[Launch], Tensor]:
    """One launch a kind; each adds to the last row of the sums."""
    sums = s.new_empty(len(kinds) + 1, s.shape[0], dtype=torch.float32)
    common = {
        **_logits("divergence_kernel", s, t, softcap, inv_temperature),
        **_norm(norm, teacher=True),
        "g_ptr": sums[-1],
    }
    launches = []
    for i, (name, parameter, coef) in enumerate(kinds):
        own = {
            "KIND": name,
            "ADD": i > 0,
            "parameter": _parameter(name, parameter),
            "coef_ptr": _row_vector(coef),
            "term_ptr": sums[i],
        }
        launches.append(Launch("divergence_kernel", s.shape[0], {**common, **own}))
    return launches, sums


def plan_gradient(
    s: Tensor,
    t: Tensor | None,
    norm: Norm,
    coefs: dict[str, Tensor | None],
    kinds: Sequence[KindTerm],
    softcap: float | None,
    inv_temperature: float,
) -> list[Launch]:
    """One launch, or one a kind: all but the last into an fp32 buffer, the last into s."""
    needs_t = bool(kinds) or coefs["pd"] is not None or coefs["q"] is not None
    assert t is not None or not needs_t, "these terms need teacher logits"
    common = {
        **_logits("gradient_kernel", s, t if needs_t else None, softcap, inv_temperature),
        **_norm(norm, teacher=needs_t),
    }
    steps = [*kinds] or [(None, None, None)]
    total = None
    if len(steps) > 1:
        # Rows of 16 elements keep the accesses wide.
        total = s.new_empty(s.shape[0], -(-s.shape[1] // 16) * 16, dtype=torch.float32)
    launches = []
    for i, (name, parameter, coef) in enumerate(steps):
        last = i == len(steps) - 1
        out = s if last else total
        assert out is not None
        own = {
            "KIND": name,
            "kind_ptr": _row_vector(coef),
            "parameter": _parameter(name, parameter),
            "out_ptr": out,
            "out_stride": out.stride(0),
            "add_ptr": total if i else None,
            "add_stride": total.stride(0) if i and total is not None else 0,
            "SLOPE": last and softcap is not None,
            **{f"{term}_ptr": _row_vector(c) if i == 0 else None for term, c in coefs.items()},
        }
        launches.append(Launch("gradient_kernel", s.shape[0], {**common, **own}))
    return launches


def plan_group_maxima(s: Tensor, group: int) -> tuple[Launch, Tensor]:
    """The launch of group_maxima and the tensor that it fills."""
    block = TILES["group_maxima_kernel"].block
    assert group & (group - 1) == 0 and 1 <= group <= block, f"group={group}: no power of two"
    _check(s)
    maxima = s.new_empty(s.shape[0], -(-s.shape[1] // group))
    arguments = {
        "s_ptr": s,
        "out_ptr": maxima,
        "s_stride": s.stride(0),
        "out_stride": maxima.stride(0),
        "width": s.shape[1],
        "GROUP": group,
        "GROUPS": block // group,
    }
    return Launch("group_maxima_kernel", s.shape[0], arguments), maxima


@functools.cache
def _kernels() -> ModuleType:
    from megaopd.losses.kernels import triton_shard  # deferred: Triton may be absent

    return triton_shard


def _run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        if launch.rows > 0:
            launch.run()


def _check(z: Tensor) -> None:
    assert z.ndim == 2 and (z.stride(1) == 1 or z.shape[1] <= 1), (z.shape, z.stride())


def _logits(
    kernel: str, s: Tensor, t: Tensor | None, softcap: float | None, inv_temperature: float
) -> dict[str, Any]:
    """The arguments that describe the logits and how they are read."""
    _check(s)
    if t is not None:
        _check(t)
        assert t.shape == s.shape, (s.shape, t.shape)
    width = 16 // s.element_size()  # elements in a thread's 16-byte load
    return {
        "s_ptr": s,
        "t_ptr": t,
        "s_stride": s.stride(0),
        "t_stride": 0 if t is None else t.stride(0),
        "width": s.shape[1],
        "softcap": float(softcap or 1.0),
        "inv_temperature": float(inv_temperature),
        "SOFTCAP": softcap is not None,
        "LANES": TILES[kernel].block // width,
        "WIDTH": width,
    }


def _norm(norm: Norm, *, teacher: bool) -> dict[str, Tensor | None]:
    names = ("m_s_ptr", "log_z_s_ptr", "m_t_ptr", "log_z_t_ptr")
    wanted = norm if teacher else (*norm[:2], None, None)
    return {name: _row_vector(value) for name, value in zip(names, wanted, strict=True)}


def _row_vector(value: Tensor | None) -> Tensor | None:
    assert value is None or (value.dtype == torch.float32 and value.ndim == 1), value
    return None if value is None else value.contiguous()


def _parameter(name: str | None, value: float | None) -> float:
    default = None if name is None else KINDS[name].default
    return float(next((v for v in (value, default) if v is not None), 0.0))
