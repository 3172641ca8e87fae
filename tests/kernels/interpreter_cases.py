"""Cases of test_interpreter.py: the wrappers on CPU tensors against plain fp64.

    TRITON_INTERPRET=1 python -m tests.kernels.interpreter_cases      {case: null or traceback}

Importing this module does not import Triton. Blocks have 2048 elements: V = 4500 makes two whole
ones and a rest that ends within a lane. The shard under test is a part of a larger vocabulary.
"""

import json
import sys
import traceback

import torch

from megaopd.losses.divergences import KINDS, Laws
from megaopd.losses.kernels.launch import (
    MOMENTS,
    available,
    divergence_sums,
    gradient_,
    group_maxima,
    local_moments,
)

C, V, REST = 3, 4500, 900
OUT = -1e30
SCALINGS = [{}, {"softcap": 5.0, "inv_temperature": 0.7}]
DTYPES = [torch.float32, torch.bfloat16]
BF16_ULP = 2.0**-7  # the interpreter truncates fp32 to bf16; a GPU rounds to nearest
EPS = 5e-6  # of the sum of absolute terms: fp32's rounding of logits of some tens, and the sum's


def logits(dtype, seed=0, width=V, masked=()):
    """Student and teacher of the shard and of the rest of the vocabulary. Row strides exceed V."""
    g = torch.Generator().manual_seed(seed)
    s, t = (4 * torch.randn(C, width + REST, generator=g) for _ in range(2))
    t = s + 0.5 * t
    s[0, 7], t[1, 11] = 30.0, 28.0  # peaked rows
    s[:, list(masked)] = t[:, list(masked)] = OUT
    s, t = s.to(dtype), t.to(dtype)
    return s[:, :width], t[:, :width], s[:, width:], t[:, width:]


def scaled(z, softcap=None, inv_temperature=1.0):
    z = z.double()
    capped = softcap * torch.tanh(z / softcap) if softcap else z
    return torch.where(z < -1e29, OUT, capped * inv_temperature)


def norms(s, t, scaling):
    """(fp64 reference, fp32 for the kernels) of m_s, log_z_s, m_t, log_z_t."""
    exact = []
    for z in (scaled(s, **scaling), scaled(t, **scaling)):
        m = z.amax(1)
        exact += [m, (z - m[:, None]).exp().sum(1).log()]
    return exact, tuple(v.float() for v in exact)


def laws(s, t, exact, scaling):
    x, y = scaled(s, **scaling), scaled(t, **scaling)
    return Laws.of(
        (x - exact[0][:, None]) - exact[1][:, None], (y - exact[2][:, None]) - exact[3][:, None]
    )


def close(got, want, size, relative=0.0, what=""):
    assert torch.isfinite(got.double()).all(), f"{what}: not finite"
    excess = (got.double() - want).abs() - (EPS * size + relative * want.abs() + 1e-30)
    at = excess.argmax()
    error = f"{what}: {got.flatten()[at]} != {want.flatten()[at]}"
    assert (excess <= 0).all(), error


def reference_moments(s, t, scaling):
    """name -> (value, sum of absolute terms), fp64; and the maxima."""
    s, t = scaled(s, **scaling), scaled(t, **scaling)
    m_s, m_t = s.amax(1), t.amax(1)
    e_s, e_t = (s - m_s[:, None]).exp(), (t - m_t[:, None]).exp()
    terms = {
        **{"z_s": e_s, "z_t": e_t, "d_s": e_s * (s - t), "d_t": e_t * (t - s)},
        **{"a_s": e_s * s, "a_t": e_t * t, "q_s": e_s**2, "r_s": e_s**2 * (s - t)},
    }
    # Logits are rounded before they are subtracted: e (|s| + |t|) is what errors scale with.
    extent = {"d": s.abs() + t.abs(), "r": s.abs() + t.abs()}
    sizes = {n: (e_t if n[-1] == "t" else e_s) * extent.get(n[0], 1) for n in terms}
    return m_s, m_t, {n: (v.sum(1), (v.abs() + sizes[n]).sum(1)) for n, v in terms.items()}


def check_moments(dtype, names, **options):
    masked = options.pop("masked", ())
    for scaling in SCALINGS:
        s, t, _, _ = logits(dtype, masked=masked)
        offsets, sums = local_moments(s, t, names, **scaling)
        assert offsets.dtype == sums.dtype == torch.float32
        m_s, m_t, want = reference_moments(s, t, scaling)
        close(offsets, torch.stack([m_s, m_t]), 1.0, 1e-6, "maxima")
        for i, name in enumerate(names):
            close(sums[i], *want[name], what=name)


def moments_all():
    for dtype in DTYPES:
        check_moments(dtype, MOMENTS)
        check_moments(dtype, MOMENTS, masked=(7, 11, 12, 13, *range(2048, 2100), V - 1))


def moments_named():
    check_moments(torch.bfloat16, ("d_t", "z_s"))
    check_moments(torch.float16, ("z_s", "z_t", "d_s"))
    s, t, _, _ = logits(torch.float32)
    offsets, sums = local_moments(s, None, ("a_s", "z_s"))
    m_s, _, want = reference_moments(s, t, {})
    assert offsets.shape == (1, C) and torch.equal(offsets[0].double(), m_s)
    close(sums[0], *want["a_s"], what="a_s")
    close(sums[1], *want["z_s"], what="z_s")
    assert local_moments(s, t, ())[1].shape == (0, C)


def moments_of_infinities_and_nan():
    """-inf in both models is as -1e30 in both; a NaN is not lost."""
    s, t, _, _ = logits(torch.float16)
    for z in (s, t):
        z[:, 40:50] = -torch.inf
    _, sums = local_moments(s, t, MOMENTS, softcap=5.0)
    _, _, want = reference_moments(s, t, {"softcap": 5.0})
    for i, name in enumerate(MOMENTS):
        close(sums[i], *want[name], what=name)
    s, t, _, _ = logits(torch.float32)
    s[1, 17] = torch.nan
    _, sums = local_moments(s, t, ("z_s", "d_s"))
    assert sums[:, 1].isnan().all() and sums[:, [0, 2]].isfinite().all()


def width_zero():
    for t_given in (True, False):
        s = torch.empty(C, 0)
        offsets, sums = local_moments(s, s if t_given else None, ("z_s",))
        assert offsets.shape == (1 + t_given, C) and (offsets == -torch.inf).all()
        assert torch.equal(sums, torch.zeros(1, C))
    row = torch.zeros(C)
    norm, kinds = (row, row, row, row), [("rkl", None, row), ("tv", None, row)]
    assert torch.equal(divergence_sums(s, s, norm, kinds), torch.zeros(3, C))
    gradient_(s, s, norm, p_coef=row, parts=kinds)
    assert group_maxima(s).shape == (C, 0)
    empty = torch.empty(0, 5)
    assert local_moments(empty, empty, ("z_s",))[1].shape == (1, 0)
    gradient_(empty, None, (torch.empty(0),) * 2 + (None, None), p_coef=torch.empty(0))


def shard_that_is_out_of_the_law():
    """All of a shard is taken out: it weighs nothing against others, and its gradient is 0."""
    s, t = torch.full((C, 2100), OUT), torch.full((C, 2100), OUT)
    offsets, sums = local_moments(s, t, MOMENTS)
    assert (offsets == torch.tensor(OUT)).all() and sums.isfinite().all()
    assert (sums[[0, 1]] == 2100).all() and (sums[[2, 3]] == 0).all()
    zero, one = torch.zeros(C), torch.ones(C)
    norm, kinds = (zero, one, zero, one), [(name, None, one) for name in KINDS]
    assert (divergence_sums(s, t, norm, kinds) == 0).all()
    # Where nothing is left at all the law is uniform: lanes beyond the row must not count.
    flat = (offsets[0], sums[0].log(), offsets[1], sums[1].log())
    total_q = -divergence_sums(s, t, flat, [("fkl", None, one)])[-1]
    close(total_q, one.double(), 1.0, what="sum of q")
    gradient_(s, t, norm, p_coef=one, px_coef=one, pd_coef=-one, q_coef=one, parts=kinds)
    assert (s == 0).all()


def parameters(name):
    kind = KINDS[name]
    return [None] if kind.parameter is None else [kind.default, 0.7]


def check_sums(name, dtype, masked=()):
    for scaling in SCALINGS:
        s, t, s_rest, t_rest = logits(dtype, masked=masked)
        exact, norm = norms(torch.cat([s, s_rest], 1), torch.cat([t, t_rest], 1), scaling)
        for parameter in parameters(name):
            coef = torch.linspace(-1.0, 2.0, C)
            got = divergence_sums(s, t, norm, [(name, parameter, coef)], **scaling)
            w = laws(s, t, exact, scaling)
            term, g = KINDS[name].pair(w, parameter)
            size = (term.abs() + g.abs() + w.p + w.q).sum(1) * 10
            close(got[0], term.sum(1), size, what=f"{name} {parameter}")
            close(got[1], coef * g.sum(1), size * coef.abs(), what=f"{name} {parameter} G")


def check_gradient(dtype, kinds=(), masked=(), **wanted):
    """wanted: which of p_coef, px_coef, ... are given."""
    for scaling in SCALINGS:
        s, t, s_rest, t_rest = logits(dtype, seed=1, masked=masked)
        exact, norm = norms(torch.cat([s, s_rest], 1), torch.cat([t, t_rest], 1), scaling)
        rows = {n: torch.randn(C, generator=torch.Generator().manual_seed(2 + i))
                for i, n in enumerate(wanted)}  # fmt: skip
        terms = [(n, a, torch.linspace(1.0, -0.5, C)) for n, a in kinds]
        w = laws(s, t, exact, scaling)
        col = {n: v.double()[:, None] for n, v in rows.items()}
        parts = [w.p * col["p_coef"]] if "p_coef" in col else []
        parts += [w.p * col["px_coef"] * w.x] if "px_coef" in col else []
        d = scaled(s, **scaling) - scaled(t, **scaling)
        parts += [w.p * col["pd_coef"] * d] if "pd_coef" in col else []
        parts += [w.q * col["q_coef"]] if "q_coef" in col else []
        for name, a, coef in terms:
            pair = KINDS[name].pair(w, KINDS[name].default if a is None else a)
            parts += [coef.double()[:, None] * pair[1]]
        slope = 1.0
        if "softcap" in scaling:
            slope = 1 - torch.tanh(s.double() / scaling["softcap"]) ** 2
        want = sum(parts) * slope
        size = sum(p.abs() for p in parts) * 10 + 1e-6 * (w.p + w.q)
        rest = s_rest.clone()
        given = {"p_coef": None, **rows}
        needs_t = bool(kinds) or "pd_coef" in rows or "q_coef" in rows
        norm = norm if needs_t else (*norm[:2], None, None)
        gradient_(s, t if needs_t else None, norm, parts=terms, **given, **scaling)
        assert s.dtype == dtype
        close(s, want, size, BF16_ULP if dtype == torch.bfloat16 else 0.0, f"{kinds} {wanted}")
        assert (s[:, list(masked)] == 0).all()
        assert torch.equal(s_rest, rest), "wrote beyond the shard"


MASKED = (3, 7, 8, 9, 10, *range(2040, 2060), V - 1)


def gradient_coefficients():
    for dtype in DTYPES:
        check_gradient(dtype, p_coef=True)
        check_gradient(dtype, p_coef=True, px_coef=True)
        check_gradient(dtype, p_coef=True, px_coef=True, pd_coef=True, masked=MASKED)
        check_gradient(dtype, p_coef=True, q_coef=True, masked=MASKED)
        check_gradient(dtype, q_coef=True)


def gradient_of_several_kinds():
    kinds = [("jsd", 0.3), ("skew_rkl", None), ("tv", None)]
    for dtype in DTYPES:
        check_gradient(dtype, kinds[:2], p_coef=True, px_coef=True, masked=MASKED)
        check_gradient(dtype, kinds, p_coef=True, q_coef=True, pd_coef=True)


def sums_of_several_kinds():
    s, t, s_rest, t_rest = logits(torch.bfloat16)
    exact, norm = norms(torch.cat([s, s_rest], 1), torch.cat([t, t_rest], 1), {})
    kinds = [(name, a, torch.full((C,), 0.5 + i)) for i, (name, a) in enumerate(
        [("jsd", 0.3), ("fkl", None), ("alpha", 0.6)])]  # fmt: skip
    got = divergence_sums(s, t, norm, kinds)
    w = laws(s, t, exact, {})
    pairs = [KINDS[name].pair(w, a) for name, a, _ in kinds]
    for i, (term, _) in enumerate(pairs):
        close(got[i], term.sum(1), (term.abs() + w.p + w.q).sum(1) * 10, what=kinds[i][0])
    total = sum(coef.double() * g.sum(1) for (_, _, coef), (_, g) in zip(kinds, pairs, strict=True))
    close(got[-1], total, 100.0, what="sum of G")


def two_shards_equal_dense_autograd():
    """Moments of shards -> norms -> sums -> gradient: all of a loss, as a caller would combine."""
    tau, softcap = 2.0, 8.0
    scaling = {"softcap": softcap, "inv_temperature": 1 / tau}
    s1, t1, s2, t2 = (z.contiguous() for z in logits(torch.float32))
    raw = torch.cat([s1, s2], 1).double().requires_grad_()
    x = torch.log_softmax(softcap * torch.tanh(raw / softcap) / tau, 1)
    y = torch.log_softmax(scaled(torch.cat([t1, t2], 1), **scaling), 1)
    m = (x.exp() + y.exp()) / 2
    jsd = ((x.exp() * (x - m.log()) + y.exp() * (y - m.log())) / 2).sum(1)
    loss = jsd + 0.5 * (x.exp() * (x - y)).sum(1)
    loss.sum().backward()

    shards, names = [(s1, t1), (s2, t2)], ("z_s", "z_t", "d_s")
    parts = [local_moments(s, t, names, **scaling) for s, t in shards]
    top = torch.maximum(parts[0][0], parts[1][0])
    w = [(offsets - top).exp()[[0, 1, 0]] for offsets, _ in parts]
    z_s, z_t, d_s = sum(sums * weight for (_, sums), weight in zip(parts, w, strict=True))
    norm = (top[0], z_s.log(), top[1], z_t.log())
    rkl = d_s / z_s - (norm[0] + norm[1]) + (norm[2] + norm[3])
    one = torch.ones(C)
    sums = sum(divergence_sums(s, t, norm, [("jsd", 0.5, one)], **scaling) for s, t in shards)
    close(sums[0] + 0.5 * rkl, loss.detach(), 10.0, what="loss")
    c = 0.5 / tau
    for s, t in shards:
        gradient_(s, t, norm, p_coef=-sums[1] / tau - c * d_s / z_s, pd_coef=c * one,
                  parts=[("jsd", 0.5, one / tau)], **scaling)  # fmt: skip
    close(torch.cat([s1, s2], 1), raw.grad, 2.0, what="gradient")


def teacher_probability_zero():
    """-1e30 in the teacher only: everything stays finite."""
    for dtype in DTYPES:
        s, t, _, _ = logits(dtype)
        t[:, 5:60] = OUT
        offsets, sums = local_moments(s, t, MOMENTS)
        assert sums.isfinite().all()
        norm = (offsets[0], sums[0].log(), offsets[1], sums[1].log())
        one = torch.ones(C)
        for name in KINDS:
            got = divergence_sums(s, t, norm, [(name, None, one)])
            z = s.clone()
            gradient_(z, t, norm, p_coef=one, parts=[(name, None, one)])
            assert got.isfinite().all() and z.isfinite().all(), name
        gradient_(s, t, norm, p_coef=one, px_coef=one, pd_coef=-one, q_coef=one)
        assert s.isfinite().all()


def maxima_of_groups():
    for dtype in (*DTYPES, torch.float16):
        for width, group in ((4500, 64), (4096, 64), (1, 64), (63, 64), (130, 16), (9000, 1024)):
            s = logits(dtype, width=max(width, 20))[0][:, :width]
            padded = torch.nn.functional.pad(s, (0, -width % group), value=-torch.inf)
            got = group_maxima(s, group)
            assert got.dtype == dtype and torch.equal(got, padded.unflatten(1, (-1, group)).amax(2))


def every_kind(name):
    def case():
        for dtype in DTYPES:
            check_sums(name, dtype, masked=MASKED)
            check_gradient(dtype, [(name, parameters(name)[-1])], p_coef=True, masked=MASKED)

    return case


CASES = {
    f.__name__: f
    for f in (
        moments_all,
        moments_named,
        moments_of_infinities_and_nan,
        width_zero,
        shard_that_is_out_of_the_law,
        sums_of_several_kinds,
        gradient_coefficients,
        gradient_of_several_kinds,
        two_shards_equal_dense_autograd,
        teacher_probability_zero,
        maxima_of_groups,
    )
} | {f"kind_{name}": every_kind(name) for name in KINDS}


def main():
    assert available()
    torch.set_num_threads(1)
    results = {}
    for name in sys.argv[1:] or CASES:
        try:
            CASES[name]()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
