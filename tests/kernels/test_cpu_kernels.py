"""The C kernels of cpu.py against plain fp64. C rows of a shard, Vp columns, padded row strides."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaopd.losses.divergences import KINDS, Laws
from megaopd.losses.kernels import cpu

ROOT = Path(__file__).parents[2]
OUT = -1e30
C, V, PADDED = 5, 9001, 9024  # two segments of 4096, whole vectors, and a rest within a vector
EPS = 1e-6  # norm-wise
MASKED = (0, 3, 7, 8, 9, *range(4090, 4200), V - 1)
NAMED = {"rkl": ("z_s", "z_t", "d_s"), "fkl": ("z_s", "z_t", "d_t")}

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C compiler, or MEGAOPD_NO_NATIVE")


@pytest.fixture(params=[1, 3], ids="{}-threads".format)
def threads(request, monkeypatch):
    monkeypatch.setattr(cpu, "_THREAD_WORK", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def logits(scale=1.0, shift=(0.0, 0.0), masked=(), width=V, rows=C):
    """Student and teacher as views with a row stride above the width."""
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(rows, max(width, PADDED), generator=g) * scale for _ in range(2))
    t = 0.8 * s + 0.5 * t + shift[1]
    s = s + shift[0]
    s[:, list(masked)] = t[:, list(masked)] = OUT
    return s[:, :width], t[:, :width]


def laws(s, t):
    return Laws.of(s.double().log_softmax(1), t.double().log_softmax(1))


def norm_of(*both):
    """(m, log z) of each, fp32: the logarithm of Z and the digits that it lacks."""
    exact = [z.double().logsumexp(1) for z in both]
    return tuple(x for e in exact for x in (e.float(), (e - e.float().double()).float()))


def error(got, want):
    assert got.isfinite().all()
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def terms_of_moments(s, t, offsets):
    s, t = s.double(), t.double()
    e_s, e_t = (
        (z - m.double()[:, None]).exp() for z, m in zip((s, t), offsets[[0, -1]], strict=True)
    )
    return {
        **{"z_s": e_s, "z_t": e_t, "d_s": e_s * (s - t), "d_t": e_t * (t - s)},
        **{"a_s": e_s * s, "a_t": e_t * t, "q_s": e_s**2, "r_s": e_s**2 * (s - t)},
    }


def check_moments(s, t, names):
    kept = s.clone(), t.clone()
    offsets, sums = cpu.local_moments(s, t, names)
    assert torch.equal(s, kept[0]) and torch.equal(t, kept[1])
    assert offsets.shape == (2, s.shape[0]) and sums.shape == (len(names), s.shape[0])
    terms = terms_of_moments(s, t, offsets)
    for name, row in zip(names, sums, strict=True):
        size = terms[name].abs().sum(1)
        assert ((row.double() - terms[name].sum(1)).abs() <= 3e-7 * size + 1e-30).all(), name
    return offsets, sums


def parameters(name):
    kind = KINDS[name]
    return [None] if kind.parameter is None else [kind.default, 0.7]


@pytest.mark.parametrize(
    "names",
    [("z_s", "z_t"), NAMED["rkl"], NAMED["fkl"], ("r_s", "a_t"), ("a_s",), (), cpu.MOMENTS],
    ids="-".join,
)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_moments(names, scale, threads):
    check_moments(*logits(scale), names)
    check_moments(*logits(scale, masked=MASKED), names)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 4096, 4097])
def test_moments_at_every_kind_of_width(width):
    check_moments(*logits(width=width), cpu.MOMENTS)


def test_student_alone():
    s, t = logits()
    offsets, sums = cpu.local_moments(s, None, ("a_s", "z_s", "q_s"))
    both, want = check_moments(s, t, ("a_s", "z_s", "q_s"))
    assert torch.equal(offsets, both[:1])
    assert torch.allclose(sums, want, rtol=1e-6)


@pytest.mark.parametrize("shift", [(300.0, -300.0), (-300.0, 300.0), (50.0, 0.0)])
def test_offsets_keep_sums_in_range(shift):
    s, t = logits(2.0, shift)
    offsets, sums = check_moments(s, t, cpu.MOMENTS)
    for z, offset, given in zip((s, t), offsets, shift, strict=True):
        assert torch.equal(offset, z.amax(1) if given else torch.zeros(C))
    assert (sums[:2] < 1e15).all() and (sums[:2] > 1e-15).all()


def test_a_shard_that_is_all_masked():
    s, t = torch.full((C, V), OUT), torch.full((C, V), OUT)
    offsets, sums = cpu.local_moments(s, t, cpu.MOMENTS)
    assert (offsets == torch.tensor(OUT)).all() and sums.isfinite().all()
    assert (sums[:2] == V).all() and (sums[2:4] == 0).all()
    zero, one = torch.zeros(C), torch.ones(C)
    parts = [(name, None, one) for name in KINDS]
    assert (cpu.divergence_sums(s, t, (zero, one, zero, one), parts) == 0).all()
    cpu.gradient_(s, t, (zero, one, zero, one), p_coef=one, px_coef=one, q_coef=one, parts=parts)
    assert (s == 0).all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_kind(name, scale, threads):
    """divergence_sums, gradient_ and complete_ of one kind."""
    for masked, a in ((m, a) for m in ((), MASKED) for a in parameters(name)):
        s, t = logits(scale, masked=masked)
        w = laws(s, t)
        term, g = KINDS[name].pair(w, KINDS[name].default if a is None else a)
        coef = torch.linspace(-1.0, 2.0, C)
        got = cpu.divergence_sums(s, t, norm_of(s, t), [(name, a, coef)])
        assert error(got[0], term.sum(1)) < EPS
        assert error(got[1], coef * g.sum(1)) < EPS

        z = s.clone()
        cpu.gradient_(z, t, norm_of(s, t), p_coef=coef + 1, parts=[(name, a, coef)])
        want = w.p * (coef.double()[:, None] + 1) + g * coef.double()[:, None]
        assert error(z, want) < EPS

        kept = t.clone()
        z = torch.nn.functional.pad(s, (0, 23), value=7.0)
        names = NAMED.get(name, ("z_s", "z_t"))
        offsets, sums, value = cpu.complete_(z[:, :V], t, name, a, names)
        assert error(value, term.sum(1)) < EPS
        assert error(z[:, :V], g - w.p * g.sum(1, keepdim=True)) < EPS
        assert (z[:, V:] == 7).all() and torch.equal(t, kept)
        assert (z[:, list(masked)] == 0).all()
        again = cpu.local_moments(s, t, names)
        assert torch.equal(offsets, again[0]) and torch.equal(sums, again[1])


def test_complete_with_other_moments():
    s, t = logits()
    for name in ("rkl", "fkl", "jsd"):
        z = s.clone()
        _, sums, _ = cpu.complete_(z, t, name, None, ("z_s", "z_t", "d_s", "d_t", "a_s", "a_t"))
        w = laws(s, t)
        g = KINDS[name].pair(w, 0.5)[1]
        assert error(z, g - w.p * g.sum(1, keepdim=True)) < EPS
        assert error(sums[4] / sums[0], (w.p * s.double()).sum(1)) < EPS


@pytest.mark.parametrize("masked", [(), MASKED], ids=["", "masked"])
@pytest.mark.parametrize(
    "given",
    [("p",), ("p", "px"), ("p", "pd"), ("p", "pd", "px", "q"), ("q",), ("p", "px", "jsd"),
     ("p", "q", "pd", "tv", "chi2", "alpha")],
    ids="-".join,
)  # fmt: skip
def test_gradient_terms(given, masked, threads):
    s, t = logits(2.0, masked=masked)
    w = laws(s, t)
    g = torch.Generator().manual_seed(1)
    by = {name: torch.randn(C, generator=g) for name in given}
    col = {name: by[name].double()[:, None] if name in by else 0.0 for name in ("p", "px", "pd")}
    want = w.p * (col["p"] + col["px"] * w.x + col["pd"] * (s - t).double())
    if "q" in by:
        want = want + w.q * by["q"].double()[:, None]
    parts = [(name, KINDS[name].default, by[name]) for name in given if name in KINDS]
    for name, a, coef in parts:
        want = want + KINDS[name].pair(w, a)[1] * coef.double()[:, None]
    buffer = torch.nn.functional.pad(s, (0, 23), value=7.0)
    kept = t.clone()
    needs_t = bool({"q", "pd"} & set(given)) or bool(parts)
    cpu.gradient_(
        buffer[:, :V],
        t if needs_t else None,
        norm_of(s, t) if needs_t else (*norm_of(s), None, None),
        p_coef=by.get("p"),
        **{f"{name}_coef": by.get(name) for name in ("px", "pd", "q")},
        parts=parts,
    )
    assert error(buffer[:, :V], want) < EPS
    assert (buffer[:, V:] == 7).all() and torch.equal(t, kept)
    assert (buffer[:, list(masked)] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_probabilities_sum_to_one(scale):
    for shift in (0.0, 300.0, -300.0):
        s, _ = logits(scale, (shift, 0.0))
        p = s.clone()
        cpu.gradient_(p, None, (*norm_of(s), None, None), p_coef=torch.ones(C))
        assert (p.double().sum(1) - 1).abs().max() < 1e-6
        assert error(p, s.double().softmax(1)) < 2e-7


def test_exponential_over_its_whole_range():
    x = torch.linspace(-87.3, 88.3, 40000)[None]
    z = x.clone()
    zero = torch.zeros(1)
    cpu.gradient_(z, None, (zero, zero, None, None), p_coef=torch.ones(1))
    want = x.double().exp()
    assert ((z.double() - want).abs() < 2.4e-7 * want + 2e-38).all()
    z = torch.tensor([[-88.1, -1e4, OUT, -torch.inf, 89.0, 1e4, torch.nan]])
    cpu.gradient_(z, None, (zero, zero, None, None), p_coef=torch.ones(1))
    assert torch.equal(z[0, :6], torch.tensor([0.0, 0.0, 0.0, 0.0, torch.inf, torch.inf]))
    assert z[0, 6].isnan()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("low", [OUT, -1e15])
def test_teacher_probability_zero(name, low):
    s, t = logits()
    t[:, 5:60] = low
    one = torch.ones(C)
    _, sums = cpu.local_moments(s, t, cpu.MOMENTS)
    got = cpu.divergence_sums(s, t, norm_of(s, t), [(name, None, one)])
    z = s.clone()
    cpu.gradient_(
        z, t, norm_of(s, t), p_coef=one, px_coef=one, pd_coef=one, parts=[(name, None, one)]
    )
    _, _, value = cpu.complete_(s, t, name, None, NAMED.get(name, ("z_s", "z_t")))
    for x in (sums, got, z, value, s):
        assert x.isfinite().all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("which", [0, 1], ids=["student", "teacher"])
def test_nan_stays_nan(name, which):
    both = logits()
    both[which][1, 4321] = torch.nan
    s, t = both
    _, sums = cpu.local_moments(s, t, ("z_s", "z_t", "d_s"))
    assert sums[which, 1].isnan() and sums[2, 1].isnan() and sums[:, [0, 2, 3, 4]].isfinite().all()
    one, zero = torch.ones(C), torch.full((C,), 9.0)
    norm = (zero, zero, zero, zero)
    z = s.clone()
    cpu.gradient_(z, t, norm, p_coef=one, px_coef=one, q_coef=one, parts=[(name, None, one)])
    assert z[1, 4321].isnan() and z.isnan().sum() == 1
    got = cpu.divergence_sums(s, t, norm, [(name, None, one)])
    assert got[0, 1].isnan() and got[:, 0].isfinite().all()
    _, _, value = cpu.complete_(s, t, name, None, NAMED.get(name, ("z_s", "z_t")))
    assert value[1].isnan() and value[[0, 2, 3, 4]].isfinite().all()
    assert s[1].isnan().all() and s[0].isfinite().all()


def test_infinite_logits_are_masked():
    for low in (OUT, -torch.inf):
        s, t = logits(masked=MASKED)
        for z in (s, t):
            z[:, list(MASKED)] = low
        z = s.clone()
        _, sums, value = cpu.complete_(z, t, "jsd", 0.5, ("z_s", "z_t"))
        assert sums.isfinite().all() and value.isfinite().all()
        assert (z[:, list(MASKED)] == 0).all()


def test_width_zero_and_no_rows():
    s, row = torch.empty(C, 0), torch.zeros(C)
    offsets, sums = cpu.local_moments(s, s, ("z_s", "d_t"))
    assert (offsets == -torch.inf).all() and torch.equal(sums, torch.zeros(2, C))
    norm, parts = (row, row, row, row), [("rkl", None, row), ("tv", None, row)]
    assert torch.equal(cpu.divergence_sums(s, s, norm, parts), torch.zeros(3, C))
    cpu.gradient_(s, s, norm, p_coef=row, parts=parts)
    assert cpu.complete_(s, s, "rkl", None, NAMED["rkl"])[0].shape == (2, C)
    values, columns = cpu.topk(s, 2)
    assert (values == -3.0e38).all() and (columns == 2**31 - 1).all()
    empty, none = torch.empty(0, 70000), torch.empty(0)
    assert cpu.local_moments(empty, None, ("z_s",))[1].shape == (1, 0)
    cpu.gradient_(empty, None, (none, none, None, None), p_coef=none)
    assert cpu.topk(empty, 3)[1].shape == (0, 3)


def ordered(x, k):
    """Stable: equal values by column; -0.0 equals 0.0."""
    columns = torch.sort(x + 0.0, dim=1, descending=True, stable=True).indices
    return x.gather(1, columns[:, :k]), columns[:, :k]


@pytest.mark.parametrize("k", [1, 20, 33, 300, 1000, 2500, V])
@pytest.mark.parametrize("case", ["random", "coarse", "rising", "falling", "equal", "clustered"])
def test_topk(k, case, threads):
    x, _ = logits(3.0)
    if case == "coarse":  # many ties, both zeros
        x.mul_(2).round_()
        assert ((x == 0) & x.signbit()).any() and ((x == 0) & ~x.signbit()).any()
    elif case in ("rising", "falling"):
        x.copy_(x.sort(1, descending=case == "falling").values)
    elif case == "equal":
        x.fill_(-2.5)
        x[0] = 0.0
        x[0, ::3] = -0.0
    elif case == "clustered":  # all in one class of columns
        x[:, ::4096].add_(100.0)
        x[:, ::64].add_(50.0)
    values, columns = cpu.topk(x, k)
    want = ordered(x, k)
    assert torch.equal(columns, want[1])
    assert torch.equal(values.view(torch.int32), want[0].view(torch.int32))


def test_topk_of_short_rows_and_special_values():
    x = torch.tensor([[1.0, -torch.inf, OUT, 1.0, -1e38, torch.inf]])
    values, columns = cpu.topk(x, 8)
    assert columns.tolist() == [[5, 0, 3, 2, 4, 1, 2**31 - 1, 2**31 - 1]]
    assert torch.equal(values[0, :6], x[0, columns[0, :6]])
    assert (values[0, 6:] == -3.0e38).all()
    x = logits()[0].clone()
    x[:, 4000] = torch.nan
    x[:, 4064] = -torch.tensor(torch.nan)
    values, columns = cpu.topk(x, 5)
    assert (columns[:, :2] == torch.tensor([4000, 4064])).all() and values[:, :2].isnan().all()
    assert values[:, 2:].isfinite().all()


def test_threads_do_not_change_results(monkeypatch):
    monkeypatch.setattr(cpu, "_THREAD_WORK", 1)
    before, found = torch.get_num_threads(), []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        s, t = logits(2.0, (0.0, 40.0))
        found.append((s, *cpu.complete_(s, t, "jsd", 0.3, cpu.MOMENTS), *cpu.topk(t, 9)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def available_with(**env):
    code = "from megaopd.losses.kernels import cpu; print(cpu.available())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return run.stdout.strip(), run.stderr


def test_no_compiler_and_the_switch(tmp_path):
    assert available_with(MEGAOPD_NO_NATIVE="1") == ("False", "")
    assert available_with(CC="", PATH=str(tmp_path)) == ("False", "")


def test_a_compiler_that_fails_and_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    assert cpu._built(["false"]) is None
    command = [*cpu._compilers()[0], *cpu._FLAGS, "-O0"]
    sources = tmp_path / "kernels"
    sources.mkdir()
    for name in cpu._SOURCES:
        (sources / name).write_bytes((cpu._FOLDER / name).read_bytes())
    monkeypatch.setattr(cpu, "_FOLDER", sources)
    (sources / "build").write_text("in the way")
    assert cpu._built(command) is not None
    (sources / "build").unlink()
    assert cpu._built(command) is not None
    assert len(list((sources / "build").iterdir())) == 1
