"""Triton kernels over one vocabulary shard: moments, divergence sums, gradients, group maxima.

One program works on one row of s, t [C, Vp]. It walks the whole blocks without masks, so that rows
at multiples of 16 elements are read 16 bytes a thread whatever Vp is, and then the masked rest:
that is the `static_range(2)` around every loop over blocks. Row sums are kept per thread (LANES of
WIDTH neighbours, WIDTH elements = 16 bytes) and reduced across threads once, after the loop.

Logits below MASK_BELOW (-1e30, -inf: taken out of the law) become MASKED after scaling: x - y = 0
where both are masked, e^x = 0, and no product of 0 with an infinity arises. NaN stays NaN.

launch.py holds the wrappers and the formulas, losses/divergences.py the kinds. Bf16 is cast right
after the load: the interpreter's bf16 arithmetic is wrong.
"""

# Kernels are written in Triton's language: types come from the launch, and an argument that is None
# drops a term at compile time.
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)
MASK_BELOW = tl.constexpr(-1e29)
TINY = tl.constexpr(1e-37)  # divergences.TINY
CHI2_LOG_LIMIT = tl.constexpr(60.0)  # divergences.CHI2_LOG_LIMIT
LOG_2 = tl.constexpr(0.6931471805599453)

# Rows of small tables: their alignment changes with C, and must not cause compilations.
ROW_POINTERS = (
    *("m_s_ptr", "log_z_s_ptr", "m_t_ptr", "log_z_t_ptr"),
    *("p_ptr", "px_ptr", "pd_ptr", "q_ptr", "kind_ptr"),
    *("coef_ptr", "term_ptr", "g_ptr", "offsets_ptr", "sums_ptr"),
)


@triton.jit
def _load(ptr, offsets, mask, softcap, inv_temperature, SOFTCAP: tl.constexpr, TAIL: tl.constexpr):
    """Scaled fp32 logits, and d capped / d raw (without the temperature)."""
    if TAIL:
        raw = tl.load(ptr + offsets, mask=mask, other=MASKED).to(tl.float32)
    else:
        raw = tl.load(ptr + offsets).to(tl.float32)
    z = raw
    slope = 1.0
    if SOFTCAP:
        # tanh and its derivative from e^(-2|u|): no overflow, no cancellation when saturated.
        e = tl.exp(-2.0 * tl.abs(raw / softcap))
        tanh = (1.0 - e) / (1.0 + e)
        z = softcap * tl.where(raw < 0, -tanh, tanh)
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return tl.where(raw < MASK_BELOW, MASKED, z * inv_temperature), slope


@triton.jit
def _row_scalar(ptr, row):
    if ptr is None:
        return 0.0
    else:
        return tl.load(ptr + row)


@triton.jit
def _tile(LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets [LANES, WIDTH] of a block: a lane is what one thread loads at once."""
    return tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _advance(m, z, mask, TAIL: tl.constexpr):
    """Per lane: the running maximum with z, e^(z-m), and what older sums are to be rescaled by."""
    new_m = tl.maximum(m, tl.max(z, 1))
    e = tl.exp(z - new_m[:, None])
    if TAIL:
        e = tl.where(mask, e, 0.0)
    return new_m, e, tl.exp(m - new_m)


@triton.jit
def _store_sum(ptr, row, stride, per_lane, SLOT: tl.constexpr):
    if SLOT >= 0:
        tl.store(ptr + SLOT * stride + row, tl.sum(per_lane, 0))


@triton.jit(do_not_specialize=["sums_stride"], do_not_specialize_on_alignment=ROW_POINTERS)
def moments_kernel(
    s_ptr, t_ptr, offsets_ptr, sums_ptr,
    s_stride, t_stride, sums_stride, width, softcap, inv_temperature,
    Z_S: tl.constexpr, Z_T: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr,
    A_S: tl.constexpr, A_T: tl.constexpr, Q_S: tl.constexpr, R_S: tl.constexpr,
    SOFTCAP: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Online maxima and sums of a row. Z_S, ...: the rows of `sums` to write, -1 if not wanted."""
    row = tl.program_id(0).to(tl.int64)
    m_s = tl.full([LANES], -float("inf"), tl.float32)
    z_s = tl.zeros([LANES], tl.float32)
    m_t, z_t, d_s, d_t, a_s, a_t, q_s, r_s = m_s, z_s, z_s, z_s, z_s, z_s, z_s, z_s
    whole = width - width % (LANES * WIDTH)
    for TAIL in tl.static_range(2):
        for start in range(whole if TAIL else 0, width if TAIL else whole, LANES * WIDTH):
            at = start + _tile(LANES, WIDTH)
            mask = at < width
            s, _ = _load(s_ptr + row * s_stride, at, mask, softcap, inv_temperature, SOFTCAP, TAIL)
            m_s, e, keep = _advance(m_s, s, mask, TAIL)
            z_s = z_s * keep + tl.sum(e, 1)
            if A_S >= 0:
                a_s = a_s * keep + tl.sum(e * s, 1)
            if Q_S >= 0:
                q_s = q_s * keep * keep + tl.sum(e * e, 1)
            if t_ptr is not None:
                t, _ = _load(
                    t_ptr + row * t_stride, at, mask, softcap, inv_temperature, SOFTCAP, TAIL
                )
                if D_S >= 0:
                    d_s = d_s * keep + tl.sum(e * (s - t), 1)
                if R_S >= 0:
                    r_s = r_s * keep * keep + tl.sum(e * e * (s - t), 1)
                m_t, e, keep = _advance(m_t, t, mask, TAIL)
                z_t = z_t * keep + tl.sum(e, 1)
                if A_T >= 0:
                    a_t = a_t * keep + tl.sum(e * t, 1)
                if D_T >= 0:
                    d_t = d_t * keep + tl.sum(e * (t - s), 1)
    m = tl.max(m_s, 0)
    tl.store(offsets_ptr + row, m)
    w = tl.exp(m_s - m)
    _store_sum(sums_ptr, row, sums_stride, z_s * w, Z_S)
    _store_sum(sums_ptr, row, sums_stride, a_s * w, A_S)
    _store_sum(sums_ptr, row, sums_stride, q_s * w * w, Q_S)
    _store_sum(sums_ptr, row, sums_stride, d_s * w, D_S)
    _store_sum(sums_ptr, row, sums_stride, r_s * w * w, R_S)
    if t_ptr is not None:
        m = tl.max(m_t, 0)
        tl.store(offsets_ptr + sums_stride + row, m)
        w = tl.exp(m_t - m)
        _store_sum(sums_ptr, row, sums_stride, z_t * w, Z_T)
        _store_sum(sums_ptr, row, sums_stride, a_t * w, A_T)
        _store_sum(sums_ptr, row, sums_stride, d_t * w, D_T)


@triton.jit
def _pair(x, y, p, q, parameter, KIND: tl.constexpr):
    """(p f(r), G) of divergences.KINDS[KIND]; both are 0 where p = q = 0."""
    if KIND == "rkl":
        term = p * (x - y)
        g = term + p
    elif KIND == "fkl":
        term = q * (y - x)
        g = -q
    elif KIND == "jsd":
        log_m = tl.log(tl.maximum((1 - parameter) * p + parameter * q, TINY))
        g = (1 - parameter) * p * (x - log_m)
        term = parameter * q * (y - log_m) + g
    elif KIND == "skew_fkl":
        m = tl.maximum((1 - parameter) * p + parameter * q, TINY)
        term = q * (y - tl.log(m))
        g = (parameter - 1) * (p * q / m)
    elif KIND == "skew_rkl":
        m = tl.maximum((1 - parameter) * q + parameter * p, TINY)
        term = p * (x - tl.log(m))
        g = term + p * (1 - parameter * (p / m))
    elif KIND == "tv":
        d = p - q
        term = 0.5 * tl.abs(d)
        g = 0.5 * p * tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    elif KIND == "hellinger":
        root = tl.exp(0.5 * (x + y))
        term = p - root
        g = p - 0.5 * root
    elif KIND == "jeffreys":
        term = (p - q) * (x - y)
        g = p * (x - y + 1) - q
    elif KIND == "chi2":
        square = tl.exp(tl.minimum(2 * (y - 0.5 * x), CHI2_LOG_LIMIT))
        term = square - 2 * q + p
        g = p - square
    elif KIND == "softened_rkl":
        d = x - y
        ratio = tl.maximum(d, 0.0) + tl.log(1 + tl.exp(-tl.abs(d))) - LOG_2
        term = (p + q) * ratio
        g = p * (ratio + 1)
    else:
        tl.static_assert(KIND == "alpha", "a kind without a kernel")
        mixed = tl.exp((1 - parameter) * x + parameter * y)
        term = (mixed - (1 - parameter) * p - parameter * q) / (parameter * (parameter - 1))
        g = (p - mixed) / parameter
    return term, g


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def divergence_kernel(
    s_ptr, t_ptr, m_s_ptr, log_z_s_ptr, m_t_ptr, log_z_t_ptr, coef_ptr, term_ptr, g_ptr,
    s_stride, t_stride, width, softcap, inv_temperature, parameter,
    KIND: tl.constexpr, ADD: tl.constexpr,
    SOFTCAP: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """term[row] = sum of p f(r); g[row] (+)= coef * sum of G (added if ADD)."""
    row = tl.program_id(0).to(tl.int64)
    m_s = tl.load(m_s_ptr + row)
    m_t = tl.load(m_t_ptr + row)
    log_z_s = tl.load(log_z_s_ptr + row)
    log_z_t = tl.load(log_z_t_ptr + row)
    terms = tl.zeros([LANES], tl.float32)
    gs = tl.zeros([LANES], tl.float32)
    whole = width - width % (LANES * WIDTH)
    for TAIL in tl.static_range(2):
        for start in range(whole if TAIL else 0, width if TAIL else whole, LANES * WIDTH):
            at = start + _tile(LANES, WIDTH)
            mask = at < width
            s, _ = _load(s_ptr + row * s_stride, at, mask, softcap, inv_temperature, SOFTCAP, TAIL)
            t, _ = _load(t_ptr + row * t_stride, at, mask, softcap, inv_temperature, SOFTCAP, TAIL)
            x = (s - m_s) - log_z_s
            y = (t - m_t) - log_z_t
            term, g = _pair(x, y, tl.exp(x), tl.exp(y), parameter, KIND)
            if TAIL:
                term = tl.where(mask, term, 0.0)
                g = tl.where(mask, g, 0.0)
            terms += tl.sum(term, 1)
            gs += tl.sum(g, 1)
    tl.store(term_ptr + row, tl.sum(terms, 0))
    g_row = tl.load(coef_ptr + row) * tl.sum(gs, 0)
    if ADD:
        g_row += tl.load(g_ptr + row)
    tl.store(g_ptr + row, g_row)


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def gradient_kernel(
    s_ptr, t_ptr, out_ptr, add_ptr,
    m_s_ptr, log_z_s_ptr, m_t_ptr, log_z_t_ptr, p_ptr, px_ptr, pd_ptr, q_ptr, kind_ptr,
    s_stride, t_stride, out_stride, add_stride, width, softcap, inv_temperature, parameter,
    KIND: tl.constexpr, SOFTCAP: tl.constexpr, SLOPE: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = (add + p (p_coef + px_coef x + pd_coef (s - t)) + q_coef q + kind_coef G) [slope].

    A pointer that is None is a term that is absent. out may be s or add: an element is read and
    written by one thread.
    """
    row = tl.program_id(0).to(tl.int64)
    m_s = tl.load(m_s_ptr + row)
    log_z_s = tl.load(log_z_s_ptr + row)
    # Not in the loop: a load cannot be moved over the stores.
    m_t = _row_scalar(m_t_ptr, row)
    log_z_t = _row_scalar(log_z_t_ptr, row)
    p_coef = _row_scalar(p_ptr, row)
    px_coef = _row_scalar(px_ptr, row)
    pd_coef = _row_scalar(pd_ptr, row)
    q_coef = _row_scalar(q_ptr, row)
    kind_coef = _row_scalar(kind_ptr, row)
    whole = width - width % (LANES * WIDTH)
    for TAIL in tl.static_range(2):
        for start in range(whole if TAIL else 0, width if TAIL else whole, LANES * WIDTH):
            at = start + _tile(LANES, WIDTH)
            mask = at < width
            s, slope = _load(
                s_ptr + row * s_stride, at, mask, softcap, inv_temperature, SOFTCAP, TAIL
            )
            x = (s - m_s) - log_z_s
            p = tl.exp(x)
            dz = p * p_coef
            if px_ptr is not None:
                dz += p * x * px_coef
            if t_ptr is not None:
                t, _ = _load(
                    t_ptr + row * t_stride, at, mask, softcap, inv_temperature, SOFTCAP, TAIL
                )
                y = (t - m_t) - log_z_t
                q = tl.exp(y)
                if pd_ptr is not None:
                    dz += p * (s - t) * pd_coef
                if q_ptr is not None:
                    dz += q * q_coef
                if kind_ptr is not None:
                    dz += kind_coef * _pair(x, y, p, q, parameter, KIND)[1]
            if add_ptr is not None:
                dz += tl.load(add_ptr + row * add_stride + at, mask=mask, other=0.0)
            if SLOPE:
                dz *= slope
            dz = dz.to(out_ptr.dtype.element_ty)
            if TAIL:
                tl.store(out_ptr + row * out_stride + at, dz, mask=mask)
            else:
                tl.store(out_ptr + row * out_stride + at, dz)


@triton.jit(do_not_specialize=["out_stride"])
def group_maxima_kernel(
    s_ptr, out_ptr, s_stride, out_stride, width, GROUP: tl.constexpr, GROUPS: tl.constexpr
):
    """out[row, i] = max of s[row, i GROUP : (i + 1) GROUP]; GROUPS of them a block."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    whole = width - width % (GROUPS * GROUP)
    for TAIL in tl.static_range(2):
        for start in range(whole if TAIL else 0, width if TAIL else whole, GROUPS * GROUP):
            at = start + _tile(GROUPS, GROUP)
            first = start // GROUP + groups
            out = out_ptr + row * out_stride + first
            if TAIL:
                s = tl.load(s_ptr + row * s_stride + at, mask=at < width, other=-float("inf"))
                top = tl.max(s.to(tl.float32), 1).to(out_ptr.dtype.element_ty)
                tl.store(out, top, mask=first * GROUP < width)
            else:
                s = tl.load(s_ptr + row * s_stride + at)
                top = tl.max(s.to(tl.float32), 1).to(out_ptr.dtype.element_ty)
                tl.store(out, top)
