"""Sampled-token losses: golden rows, expectations over the sampled token, clips, and refusals."""

import math

import pytest
import torch

from megaopd.errors import UserError
from megaopd.losses.sampled import (
    ESTIMATORS,
    F_KINDS,
    sampled_loss,
    sampled_terms,
    vopd_baseline,
)

F64 = torch.float64
Z_S = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=F64)
Z_T = torch.tensor([1.0, 2.0, 0.5, -2.0], dtype=F64)
K2 = [0.368771, -0.245322, -0.090249, -0.033201]
K3 = [0.229674, -0.152788, -0.056208, -0.020678]
VOPD = [0.215247, -0.143191, -0.052677, -0.019379]
V = 7


def laws(seed=0, scale=1.0):
    """log p, log q, log p_old over V tokens."""
    torch.manual_seed(seed)
    return (scale * torch.randn(3, V, dtype=F64)).log_softmax(-1)


def gradient_of(divergence, log_p):
    """d divergence(log softmax(z)) / dz at z = log p."""
    z = log_p.clone().requires_grad_()
    return torch.autograd.grad(divergence(z.log_softmax(-1)), z)[0]


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum()


def expected(law, log_p, log_q, **options):
    """E_{y ~ law}[slope (e_y - p)], every token y enumerated."""
    _, slope = sampled_terms(log_p, log_q, **options)
    return ((law.exp() * slope)[:, None] * (torch.eye(V, dtype=F64) - log_p.exp())).sum(0)


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------ golden numbers, METHODS 21


@pytest.mark.parametrize(
    ("estimator", "value", "grad"),
    [
        ("k1_reward", 1.035625, K2),
        ("k2", 0.536260, K2),
        ("k3", 0.390630, K3),
        ("k3pp", 0.390630, K2),
        ("k5", -0.367651, K3),
        ("pg", -0.455872, K2),
        ("vopd", -0.266087, VOPD),
    ],
)
def test_golden_rows(estimator, value, grad):
    z = Z_S.clone().requires_grad_()
    log_p, log_q = z.log_softmax(-1)[:1], Z_T.log_softmax(-1)[:1]
    baseline = vopd_baseline("value", rkl=kl(Z_S.log_softmax(-1), Z_T.log_softmax(-1)))
    options = {"baseline": baseline} if estimator == "vopd" else {}
    loss = sampled_loss(log_p, log_q, estimator=estimator, **options)
    (got,) = torch.autograd.grad(loss.sum(), z)
    close(got, torch.tensor(grad, dtype=F64), 2e-6)
    assert got.sum().abs() < 1e-12
    if estimator in ("pg", "vopd"):  # the table lists -A log p; -rho A is reported
        advantage = -loss.item()
        assert -advantage * log_p.item() == pytest.approx(value, abs=2e-6)
    else:
        assert loss.item() == pytest.approx(value, abs=2e-6)


# ------------------------------------------------------------------ expectations, METHODS 6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("estimator", ["k1_reward", "k2", "k3", "k3pp", "k5", "rapo"])
def test_expected_gradients(estimator, off_policy, seed):
    """Reverse KL for some, forward KL for the others, whichever policy sampled."""
    log_p, log_q, log_old = laws(seed)
    want = {
        "rkl": gradient_of(lambda x: kl(x, log_q), log_p),
        "fkl": gradient_of(lambda x: kl(log_q, x), log_p),
    }
    options = {"estimator": estimator}
    if "cap" in ESTIMATORS[estimator].parameters:
        options["cap"] = 1e3
    if off_policy:
        options["old_log_prob"] = log_old
    law = log_old if off_policy else log_p
    kind = "fkl" if estimator in ("k3", "k5", "rapo") else "rkl"
    close(expected(law, log_p, log_q, **options), want[kind])
    assert (want["rkl"] - want["fkl"]).abs().max() > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_policy_gradient_keeps_the_reward_of_the_sampling_policy(seed):
    log_p, log_q, log_old = laws(seed)
    at_home = gradient_of(lambda x: kl(x, log_q), log_p)
    close(expected(log_p, log_p, log_q, estimator="pg"), at_home)
    away = gradient_of(lambda x: kl(x, log_q) - kl(x, log_old), log_p)
    close(expected(log_old, log_p, log_q, estimator="pg", old_log_prob=log_old), away)
    for baseline in (torch.zeros(()), torch.tensor(3.7, dtype=F64)):
        options = {"estimator": "vopd", "old_log_prob": log_old, "baseline": baseline}
        close(expected(log_old, log_p, log_q, **options), away)


def test_rapo_as_published_has_another_gradient():
    log_p, log_q, _ = laws(1)
    got = expected(log_p, log_p, log_q, estimator="rapo_paper", cap=1e3)
    w = (log_q - log_p).exp()
    score = torch.eye(V, dtype=F64) - log_p.exp()
    close(got, -((log_p.exp() * w * w.log())[:, None] * score).sum(0))
    fkl = gradient_of(lambda x: kl(log_q, x), log_p)
    assert torch.cosine_similarity(got, fkl, dim=0) < 0.999
    for name, options in {"rapo": {"cap": 1e3}, "rapo_paper": {"cap": 1e3}, "k5": {}}.items():
        value, _ = sampled_terms(log_p, log_q, estimator=name, **options)
        close((log_p.exp() * value).sum(), kl(log_q, log_p))


F_OF_R = {
    "rkl": lambda r: -r.log(),
    "fkl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_rkl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "hellinger": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "tv": lambda r: 0.5 * (r - 1).abs(),
    "chi2": lambda r: (r - 1) ** 2,
}


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("kind", F_KINDS)
def test_f_divergences_by_policy_gradient(kind, off_policy):
    log_p, log_q, log_old = laws(2)

    def divergence(x):
        return (x.exp() * F_OF_R[kind]((log_q - x).exp())).sum()

    options = {"estimator": "f_pg", "kind": kind}
    law = log_p
    if off_policy:
        law = options["old_log_prob"] = log_old
    close(expected(law, log_p, log_q, **options), gradient_of(divergence, log_p))
    value, _ = sampled_terms(log_p, log_q, **options)
    close((law.exp() * value).sum(), divergence(log_p))
    assert sampled_terms(log_p, log_p, estimator="f_pg", kind=kind)[1].abs().max() < 1e-12


def test_a_detached_head_and_a_sampled_tail_are_unbiased():
    log_p, log_q, log_old = laws(3)
    p, rho = log_p.exp(), log_p - log_q
    inside = torch.zeros(V, dtype=torch.bool).index_fill(0, log_p.topk(3).indices, True)
    head = p * (inside * rho - (p * rho)[inside].sum())
    _, slope = sampled_terms(log_p, log_q, estimator="k1_reward", old_log_prob=log_old)
    score = torch.eye(V, dtype=F64) - p
    tail = ((log_old.exp() * slope * ~inside)[:, None] * score).sum(0)
    close(head + tail, gradient_of(lambda x: kl(x, log_q), log_p))


@pytest.mark.parametrize("estimator", ["dph_forward", "dph_js", "dph_alpha"])
def test_dph_is_its_divergence_from_the_initial_policy(estimator):
    log_p, log_0, _ = laws(4)

    def divergence(x):
        if estimator == "dph_forward":
            return kl(log_0, x)
        if estimator == "dph_js":
            log_m = ((x.exp() + log_0.exp()) / 2).log()
            return kl(log_0, log_m) + kl(x, log_m)
        a = 0.2
        return (1 - (log_0.exp() ** a * x.exp() ** (1 - a)).sum()) / (a * (1 - a))

    value, _ = sampled_terms(log_p, log_0, estimator=estimator)
    close((log_0.exp() * value).sum(), divergence(log_p))
    close(expected(log_0, log_p, log_0, estimator=estimator), gradient_of(divergence, log_p))
    at_one, slope = sampled_terms(log_0, log_0, estimator=estimator)
    assert at_one.abs().max() < 1e-12 and slope.abs().max() < 1e-12


# ------------------------------------------------------------------ slopes against autograd

# Where something live is held constant, a value alone does not show the gradient.
LIVE = {
    "k1_reward": lambda x, y, rho: (x - y).detach() * rho,
    "k2": lambda x, y, rho: rho.detach() * (x - y) ** 2 / 2,
    "k3": lambda x, y, rho: rho.detach() * ((y - x).exp() - 1 + x - y),
    "k3pp": lambda x, y, rho: rho * ((y - x).exp() - 1 + x - y),
    "k5": lambda x, y, rho: rho.detach() * ((y - x).exp().detach() * (y - x) + x - x.detach()),
}


@pytest.mark.parametrize("estimator", LIVE)
def test_slope_is_the_derivative_of_the_live_formula(estimator):
    log_p, log_q, log_old = laws(5)
    x = log_p.clone().requires_grad_()
    live = LIVE[estimator](x, log_q, (x - log_old).exp())
    (want,) = torch.autograd.grad(live.sum(), x)
    value, slope = sampled_terms(log_p, log_q, estimator=estimator, old_log_prob=log_old)
    close(value, live.detach())
    close(slope, want)


# What each holds constant is an input (k2, k3 and rapo_paper: without old_log_prob).
DIFFERENTIABLE = {
    **{name: set() for name in ("k2", "k3", "rapo_paper", "dph_forward", "dph_js", "dph_alpha")},
    "k3pp": {"old_log_prob"},
    "pg": {"old_log_prob", "advantage"},
    "vopd": {"old_log_prob", "advantage", "baseline"},
    "trrd": {"old_log_prob", "advantage"},
    "ppo": {"old_log_prob", "advantage"},
}


@pytest.mark.parametrize("estimator", DIFFERENTIABLE)
def test_finite_differences(estimator):
    """Limits included: the tokens of this case are on both sides of the caps and clips."""
    torch.manual_seed(6)
    n, h = 200, 1e-6
    log_p, log_q, old = -6 + 2 * torch.randn(3, n, dtype=F64)
    if estimator == "rapo_paper":
        log_q = torch.minimum(log_q, log_p + 2)  # beyond the cap, w is held
    inputs = {"old_log_prob": old, "advantage": torch.randn(n, dtype=F64), "baseline": old / 3}
    options = {k: v for k, v in inputs.items() if k in DIFFERENTIABLE[estimator]}
    teacher = None if estimator == "ppo" else log_q
    inside = (log_p - old) < math.log(10)  # k3pp: beyond, the token is left out altogether

    def at(x):
        return sampled_terms(x, teacher, estimator=estimator, **options)

    slope = (at(log_p + h)[0] - at(log_p - h)[0]) / (2 * h)
    rows = inside if estimator == "k3pp" else slice(None)
    close(at(log_p)[1][rows], slope[rows], 1e-6)


def test_gradient_reaches_the_logits_and_nothing_else():
    log_p, log_q, log_old = (x.clone().requires_grad_() for x in laws(7))
    weight = torch.full((V,), 1.7, dtype=F64, requires_grad=True)
    loss = sampled_loss(
        log_p, log_q, estimator="k3pp", old_log_prob=log_old, importance_weight=weight
    )
    loss.sum().backward()
    value, slope = sampled_terms(log_p, log_q, estimator="k3pp", old_log_prob=log_old)
    close(loss.detach(), 1.7 * value)
    close(log_p.grad, 1.7 * slope)
    assert not value.requires_grad and not slope.requires_grad
    assert log_q.grad is None and log_old.grad is None and weight.grad is None


# ------------------------------------------------------------------ clips and limits


@pytest.mark.parametrize(
    ("advantage", "q", "ratio", "slope"),
    [
        (1, 0.05, 2.449, 0.0),
        (1, 0.3, 1.0, -1.0),
        (1, 0.6, 0.707, -0.707),
        (-1, 0.05, 2.449, 2.449),
        (-1, 0.6, 0.707, 0.0),
        (-1, 0.03, 3.162, 0.0),  # beyond the dual clip
        (0, 0.6, 0.707, 0.0),
    ],
)
def test_trrd_table(advantage, q, ratio, slope):
    log_p = torch.tensor([0.3], dtype=F64).log()
    assert (log_p.exp() / q).sqrt().item() == pytest.approx(ratio, abs=1e-3)
    options = {"old_log_prob": log_p, "advantage": torch.tensor([float(advantage)], dtype=F64)}
    log_q = torch.tensor([q], dtype=F64).log()
    _, got = sampled_terms(log_p, log_q, estimator="trrd", **options)
    assert got.item() == pytest.approx(slope, abs=1e-3)


def test_trrd_without_teacher_share_is_ppo():
    log_p, log_q, log_old = laws(8)
    options = {"old_log_prob": log_old, "advantage": torch.randn(V, dtype=F64)}
    trrd = sampled_terms(log_p, log_q, estimator="trrd", mix=1.0, **options)
    ppo = sampled_terms(log_p, None, estimator="ppo", clip_high=0.2, **options)
    close(trrd[0], ppo[0]), close(trrd[1], ppo[1])


@pytest.mark.parametrize(
    ("rho", "advantage", "value", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.56, 0.0),  # at most 1.28 A
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),  # at least .8 A
        (2.0, -2.0, 4.0, 4.0),
        (5.0, -2.0, 6.0, 0.0),  # dual clip 3
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_ppo_clip(rho, advantage, value, slope):
    old = torch.tensor([-9.0], dtype=F64)
    options = {"old_log_prob": old, "advantage": torch.tensor([advantage], dtype=F64)}
    got = sampled_terms(old + math.log(rho), None, estimator="ppo", **options)
    assert got[0].item() == pytest.approx(value) and got[1].item() == pytest.approx(slope)


def test_policy_gradient_adds_to_an_advantage_and_clips_when_asked():
    log_p, log_q, log_old = laws(9)
    advantage = torch.randn(V, dtype=F64)
    total = advantage + 0.3 * (log_q - log_old)
    options = {"old_log_prob": log_old, "advantage": advantage, "kl_coef": 0.3}
    rho = (log_p - log_old).exp()
    assert rho.max() > 1.28 and rho.min() < 0.8
    close(sampled_terms(log_p, log_q, estimator="pg", **options)[1], -rho * total)
    clip = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    got = sampled_terms(log_p, log_q, estimator="pg", **options, **clip)
    want = sampled_terms(log_p, None, estimator="ppo", old_log_prob=log_old, advantage=total)
    close(got[0], want[0]), close(got[1], want[1])


def test_limits():
    """Caps bound a slope; the live ratio of k3pp and the value of dph_forward silence it."""

    def slope(estimator, gap, **options):
        """log q - log p = gap."""
        log_p = torch.tensor([-5.0])
        return sampled_terms(log_p, log_p + gap, estimator=estimator, **options)[1].item()

    assert slope("k2", -9.0, cap=5.0) == 5 and slope("k2", 9.0, cap=5.0) == -5
    assert slope("k2", 9.0) == -9
    assert slope("rapo", 9.0) == pytest.approx(-10) and slope("rapo", 1.0) == pytest.approx(-math.e)
    assert slope("rapo_paper", 9.0) == pytest.approx(-10 * math.log(10))
    assert slope("f_pg", 9.0, kind="fkl", cap=10.0) == pytest.approx(-9)
    old = torch.tensor([-5.0 - math.log(11)])
    assert slope("k3pp", 1.0, old_log_prob=old) == 0
    assert slope("k3pp", 1.0, old_log_prob=old, cap=12.0) == pytest.approx(-11)
    value, _ = sampled_terms(old * 0 - 5, old * 0 - 4, estimator="k3pp", old_log_prob=old)
    assert value.item() == pytest.approx(10 * (math.e - 2))
    assert slope("dph_forward", -3.0) == 0
    assert slope("dph_forward", 5.0) == pytest.approx(-1, abs=0.01)


@pytest.mark.parametrize("gap", [-1e4, -50.0, 0.0, 50.0, 1e4])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extreme_log_ratios_stay_finite(estimator, gap):
    log_p = torch.tensor([-5.0])
    options = {"advantage": torch.ones(1), "baseline": torch.zeros(1), "old_log_prob": log_p - gap}
    options = {k: v for k, v in options.items() if k in ESTIMATORS[estimator].inputs}
    for kind in F_KINDS if estimator == "f_pg" else [None]:
        teacher = None if estimator == "ppo" else log_p + gap
        pair = sampled_terms(log_p, teacher, estimator=estimator, kind=kind, **options)
        assert all(x.isfinite().all() for x in pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_precision(dtype):
    x = torch.tensor([-1.0], dtype=dtype)
    value, slope = sampled_terms(x, 2 * x, estimator="k2")
    assert value.dtype == slope.dtype == (F64 if dtype == F64 else torch.float32)
    assert value.item() == 0.5 and slope.item() == 1


# ------------------------------------------------------------------ refusals

X = torch.full((3,), -1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimator": "k9"}, "'k1_reward', 'k2'"),
        ({"estimator": "k1"}, "expected gradient 0"),
        ({"estimator": "trrd"}, "without advantage"),
        ({"estimator": "ppo", "advantage": X}, "teacher_log_prob with estimator='ppo'"),
        ({"estimator": "k2", "teacher": None}, "without teacher_log_prob"),
        ({"estimator": "f_pg"}, "without kind"),
        ({"estimator": "f_pg", "kind": "kl"}, "'softened_rkl'"),
        ({"estimator": "vopd"}, "neither of baseline and reward_floor"),
        ({"estimator": "vopd", "baseline": X, "reward_floor": 0.5}, "both of baseline"),
        ({"estimator": "k2", "advantage": X}, "advantage with estimator='k2'"),
        ({"estimator": "pg", "baseline": X}, "take one of vopd"),
        ({"estimator": "k3", "cap": 3.0}, "cap with estimator='k3'"),
        ({"estimator": "dph_js", "importance_weight": X}, "importance_weight with"),
        ({"estimator": "k2", "cap": 0.0}, "> 0"),
        ({"estimator": "dph_alpha", "alpha": 1.0}, r"in \(0, 1\)"),
        ({"estimator": "vopd", "reward_floor": 1.0}, r"in \(0, 1\)"),
        ({"estimator": "pg", "dual_clip": 0.5}, "> 1"),
        ({"estimator": "pg", "kl_coef": float("nan")}, ">= 0"),
        ({"estimator": "pg", "old_log_prob": torch.zeros(2)}, "old_log_prob of shape"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(UserError, match=words):
        sampled_loss(X, options.pop("teacher", X), **options)
