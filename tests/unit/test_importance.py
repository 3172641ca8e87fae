"""What is known before a sampled loss: vOPD's baselines, TIS weights, posterior weights."""

import math

import pytest
import torch

from megaopd.errors import UserError
from megaopd.losses.importance import TIS_MODES, posterior_weights, tis_weights, vopd_baseline
from megaopd.losses.sampled import sampled_terms

F64 = torch.float64


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------ vOPD's baselines


def moments(log_p, log_q):
    rho, p = log_p - log_q, log_p.exp()
    return {
        "rkl": (p * rho).sum(-1),
        "sum_p2": (p * p).sum(-1),
        "sum_p2_rho": (p * p * rho).sum(-1),
    }


def baselines(log_p, log_q, k=4):
    """Every mode, [N] each."""
    ids = log_p.topk(k, dim=-1).indices
    lists = {
        "student_log_probs": log_p.gather(-1, ids),
        "teacher_log_probs": log_q.gather(-1, ids),
    }
    m = moments(log_p, log_q)
    return {
        "none": vopd_baseline("none").expand(len(log_p)),
        "value": vopd_baseline("value", rkl=m["rkl"]),
        "topk": vopd_baseline("topk", **lists),
        "unnorm": vopd_baseline("unnorm", **lists),
        "optimal": vopd_baseline("optimal", **m),
    }


def test_topk_baselines_on_the_whole_vocabulary_are_the_value():
    torch.manual_seed(0)
    log_p, log_q = torch.randn(2, 50, 9, dtype=F64).log_softmax(-1)
    found = baselines(log_p, log_q, k=9)
    close(found["topk"], found["value"]), close(found["unnorm"], found["value"])
    ids = log_p.topk(4, dim=-1).indices
    pt, qt = (x.gather(-1, ids).softmax(-1) for x in (log_p, log_q))
    close(baselines(log_p, log_q)["topk"], (pt * (pt / qt).log()).sum(-1))


def test_every_baseline_is_unbiased_and_the_optimal_one_has_the_least_variance():
    torch.manual_seed(1)
    pairs, n = 100, 12
    log_p, log_q = 2 * torch.randn(2, pairs, n, dtype=F64)
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    p = log_p.exp()
    score = torch.eye(n, dtype=F64) - p[:, None, :]  # [pair, y, n]
    variance = {}
    for mode, baseline in baselines(log_p, log_q).items():
        flat = baseline[:, None].expand(pairs, n).reshape(-1).to(F64)
        _, slope = sampled_terms(
            log_p.reshape(-1), log_q.reshape(-1), estimator="vopd", baseline=flat
        )
        grads = slope.view(pairs, n, 1) * score
        mean = (p[..., None] * grads).sum(1)
        rho = log_p - log_q
        close(mean, p * (rho - (p * rho).sum(-1, keepdim=True)))
        variance[mode] = (p * (grads**2).sum(-1)).sum(1) - (mean**2).sum(-1)
    for mode, other in variance.items():
        assert (variance["optimal"] <= other + 1e-12).all(), mode
    assert (variance["optimal"] < variance["value"] - 1e-6).any()


def test_optimal_baseline_of_a_certain_student_is_finite():
    log_p = torch.tensor([[0.0, -40.0, -40.0]]).log_softmax(-1)
    log_q = torch.tensor([[0.0, 1.0, 2.0]]).log_softmax(-1)
    found = vopd_baseline("optimal", **moments(log_p, log_q))
    assert found.item() == pytest.approx(-log_q[0, 0].item())


def test_reward_floor():
    log_p, log_q = torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -6.0])
    _, slope = sampled_terms(log_p, log_q, estimator="vopd", reward_floor=0.5)
    close(slope, torch.tensor([0.5, 2 * math.log(2)]), 1e-6)


# ------------------------------------------------------------------ importance weights

OLD = torch.log(torch.tensor([[0.2, 0.4, 0.3, 0.9], [0.5, 0.5, 0.2, 0.6]]))
RATIO = torch.tensor([[0.25, 1.0, 4.0, 9.0], [1.1, 6.0, 1.0, 1.0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
ROOT = 6.6**0.5


@pytest.mark.parametrize(
    ("options", "want", "clipped"),
    [
        ({}, [[0.25, 1, 2, 0], [1.1, 2, 0, 0]], 2 / 5),
        ({"low": 0.5, "high": 5.0}, [[0.5, 1, 4, 0], [1.1, 5, 0, 0]], 2 / 5),
        ({"mode": "mask"}, [[0, 1, 4, 0], [1.1, 0, 0, 0]], 2 / 5),
        ({"mode": "seq"}, [[1, 1, 1, 0], [2, 2, 0, 0]], 1 / 2),
        ({"mode": "seq", "high": 3.0}, [[1, 1, 1, 0], [ROOT, ROOT, 0, 0]], 0),
        ({"mode": "reject", "high": 2.0}, [[1, 1, 1, 0], [0, 0, 0, 0]], 1 / 2),
        ({"mode": "off"}, [[1, 1, 1, 0], [1, 1, 0, 0]], 0),
    ],
)
def test_tis_modes(options, want, clipped):
    old = OLD.clone().requires_grad_()
    weights, metrics = tis_weights(old, OLD - RATIO.log(), MASK, **options)
    want = torch.tensor(want, dtype=torch.float32)
    close(weights, want, 1e-5)
    assert not weights.requires_grad
    assert metrics["clip_fraction"].item() == pytest.approx(clipped)
    ess = want.sum() ** 2 / (5 * (want**2).sum())
    assert metrics["ess"].item() == pytest.approx(ess.item(), rel=1e-4)


def test_tis_ignores_what_is_masked_and_takes_a_flat_batch():
    rollout = (OLD - RATIO.log()).masked_fill(~MASK, float("nan"))
    weights, _ = tis_weights(OLD, rollout, MASK)
    flat, _ = tis_weights(OLD[MASK], rollout[MASK])
    close(weights[MASK], flat)
    empty, metrics = tis_weights(OLD, rollout, torch.zeros_like(MASK), mode="seq")
    assert empty.abs().sum() == 0 and all(x.item() == 0 for x in metrics.values())
    assert tis_weights(OLD, None, mode="off")[0].eq(1).all()


def test_posterior_weights_sample_the_posterior():
    ref, old, reward = torch.randn(3, 2, 5, dtype=F64)
    got = posterior_weights(ref, old, reward, beta=0.5, cap=100)
    w = (ref - old + reward / 0.5).exp()
    close(got + 1, 5 * w / w.sum(1, keepdim=True))
    assert posterior_weights(ref, old, 1e3 * reward, cap=3).max() <= 2


# ------------------------------------------------------------------ refusals

X = torch.full((3,), -1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollout": None}, "without rollout log-probs"),
        ({"mode": "tokens"}, "'token', 'seq'"),
        ({"low": 1.5}, "low <= 1"),
        ({"high": 0.5}, "1 <= high"),
        ({"mode": "off", "high": 3.0}, "no bounds"),
        ({"rollout": X[:2]}, "rollout_log_prob of shape"),
        ({"mask": X[:2]}, "mask of shape"),
        ({"mode": "seq"}, r"\[N, S\]"),
        ({"rollout": X / 0}, "3 non-finite"),
    ],
)
def test_tis_refusals(options, words):
    with pytest.raises(UserError, match=words):
        tis_weights(X, options.pop("rollout", X), options.pop("mask", None), **options)
    assert set(TIS_MODES) == {"token", "seq", "mask", "reject", "off"}


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        ("mean", {}, "one of none, value"),
        ("value", {}, "expected: rkl"),
        ("topk", {"student_log_probs": X}, "student_log_probs, teacher_log_probs"),
        ("none", {"rkl": X}, "no input"),
        ("optimal", {"rkl": X}, "sum_p2_rho"),
    ],
)
def test_baseline_refusals(mode, options, words):
    with pytest.raises(UserError, match=words):
        vopd_baseline(mode, **options)


def test_posterior_refusals():
    for shapes, beta in (([(2, 3), (2, 3), (2, 4)], 0.05), ([(2, 1)] * 3, 0.05), ([(2, 3)] * 3, 0)):
        with pytest.raises(UserError):
            posterior_weights(*(torch.zeros(s) for s in shapes), beta=beta)
