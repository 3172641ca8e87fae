"""The dense truth against golden numbers, and the single-process paths against the dense truth."""

import pytest
import torch

from megaopd.errors import UserError
from megaopd.losses import (
    fused_linear_cross_entropy,
    fused_linear_divergence,
    fused_linear_log_prob,
    reference,
    vocab_parallel_divergence,
    vocab_parallel_log_prob,
)
from megaopd.losses.blocks import BLOCK_ELEMENTS

F64 = torch.float64
Z_S = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=F64)
Z_T = torch.tensor([[1.0, 2.0, 0.5, -2.0]], dtype=F64)
GOLDEN = {
    "rkl": (0.431143, [0.389235, -0.330574, -0.078039, 0.019379]),
    "fkl": (0.415104, [0.415322, -0.384496, -0.051504, 0.020678]),
}


def gradient(loss, logits):
    z = logits.clone().requires_grad_()
    value = loss(z)
    (grad,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), grad


@pytest.fixture
def logits():
    torch.manual_seed(1)
    return torch.randn(7, 33, dtype=F64) * 3, torch.randn(7, 33, dtype=F64) * 3


def both(kind):
    """The dense reference and the chunked path, as functions of (student, teacher, **options)."""

    def chunked(s, t, **options):
        return vocab_parallel_divergence(s, t, kind=kind, chunk_size=3, **options)

    return [reference.DIVERGENCES[kind], chunked]


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_values_and_gradients(kind):
    for path in both(kind):
        value, grad = gradient(lambda z, path=path: path(z, Z_T), Z_S)
        assert value.item() == pytest.approx(GOLDEN[kind][0], abs=1e-6)
        torch.testing.assert_close(
            grad[0], torch.tensor(GOLDEN[kind][1], dtype=F64), atol=1e-6, rtol=0
        )


def test_golden_log_ratio_and_its_gradient():
    labels = torch.tensor([0])
    log_p, grad = gradient(lambda z: vocab_parallel_log_prob(z, labels), Z_S)
    log_q = vocab_parallel_log_prob(Z_T, labels)
    ratio = (log_p - log_q).item()
    assert ratio == pytest.approx(1.035625, abs=1e-6)
    assert -(
        reference.cross_entropy(Z_S, labels) - reference.cross_entropy(Z_T, labels)
    ).item() == (pytest.approx(ratio, abs=1e-12))
    golden = torch.tensor([0.356086, -0.236883, -0.087144, -0.032059], dtype=F64)
    torch.testing.assert_close(grad[0], golden, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", GOLDEN)
@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("block", [1, 1 << 17])
def test_chunked_equals_dense(kind, temperature, block, logits, monkeypatch):
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", block)  # 1: a block for each row
    dense, chunked = both(kind)
    options = {"temperature": temperature, "vocab_size": 29}
    want, want_grad = gradient(lambda z: dense(z, logits[1], **options), logits[0])
    got, got_grad = gradient(lambda z: chunked(z, logits[1], **options), logits[0])
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got_grad, want_grad, atol=1e-12, rtol=1e-12)
    assert got_grad[:, 29:].abs().max() == 0


@pytest.mark.parametrize("kind", GOLDEN)
def test_gradient_sums_to_zero_and_ignores_shifts(kind, logits):
    student, teacher = logits
    shift = torch.linspace(-50, 50, 7, dtype=F64)[:, None]
    for path in both(kind):
        value, grad = gradient(lambda z, path=path: path(z, teacher), student)
        assert grad.sum(-1).abs().max() < 1e-12
        moved, moved_grad = gradient(lambda z, path=path: path(z, teacher - 3), student + shift)
        torch.testing.assert_close(moved, value, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(moved_grad, grad, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", GOLDEN)
def test_finite_differences(kind, logits):
    student, teacher = logits
    for path in both(kind):
        assert torch.autograd.gradcheck(
            lambda z, path=path: path(z, teacher, temperature=1.3), student.requires_grad_()
        )


def test_a_token_the_teacher_excludes(logits):
    student, teacher = logits
    teacher[:, 5] = -torch.inf
    for path in both("fkl"):
        value, grad = gradient(lambda z, path=path: path(z, teacher), student)
        assert value.isfinite().all() and grad.isfinite().all()
        assert (grad[:, 5] > 0).all()  # p - 0
    dense, chunked = both("rkl")
    assert dense(student, teacher).isposinf().all()
    value, grad = gradient(lambda z: chunked(z, teacher), student)
    assert (value > 1e9).all() and grad.isfinite().all()  # -inf is read as -1e15: large, not inf


def test_a_token_that_both_exclude(logits):
    for kind in GOLDEN:
        for excluded in logits:
            excluded[:, 5] = -torch.inf
        for path in both(kind):
            value, grad = gradient(lambda z, path=path: path(z, logits[1]), logits[0])
            assert value.isfinite().all() and grad.isfinite().all()


def test_nan_is_not_hidden(logits):
    student, teacher = logits
    student[2, 4] = torch.nan
    for kind in GOLDEN:
        value, grad = gradient(
            lambda z, kind=kind: vocab_parallel_divergence(z, teacher, kind=kind), student
        )
        assert value[2].isnan() and grad[2].isnan().all()
        assert value[[0, 1, 3, 4, 5, 6]].isfinite().all()


def test_statistics(logits):
    student, teacher = logits
    labels = torch.tensor([0, 3, 28, 1, 2, 4, 5])
    _, stats = vocab_parallel_divergence(
        student, teacher, kind="fkl", vocab_size=29, labels=labels, return_stats=True
    )
    for name, z in (("student", student), ("teacher", teacher)):
        want = -reference.cross_entropy(z, labels, vocab_size=29)
        torch.testing.assert_close(stats[f"{name}_log_prob"], want)
        torch.testing.assert_close(stats[f"{name}_entropy"], reference.entropy(z, vocab_size=29))
    _, stats = vocab_parallel_divergence(student, teacher, kind="rkl", return_stats=True)
    assert set(stats) == {"student_entropy", "teacher_entropy"}


def test_small_divergences_keep_their_digits():
    torch.manual_seed(0)
    student = torch.randn(4, 50_000)
    teacher = student + 3e-3 * torch.randn(4, 50_000)
    for kind in GOLDEN:
        got = vocab_parallel_divergence(student, teacher, kind=kind)
        want = reference.DIVERGENCES[kind](student.double(), teacher.double())
        assert want.max() < 1e-5
        torch.testing.assert_close(got.double(), want, atol=0, rtol=0.1)


def head(seed=2, dtype=F64):
    torch.manual_seed(seed)
    shapes = [(7, 5), (33, 5), (7, 6), (33, 6)]
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("kind", [*GOLDEN, "cross_entropy"])
def test_softcap(kind):
    hidden, weight, teacher_hidden, teacher_weight = head()
    weights, labels = torch.rand(7, dtype=F64), torch.arange(7)
    hidden.requires_grad_(), weight.requires_grad_()

    def cap(h, w):
        return 4.0 * torch.tanh(h @ w.t() / 4.0)

    if kind == "cross_entropy":
        want = reference.cross_entropy(cap(hidden, weight), labels, 1.3)
        got = fused_linear_cross_entropy(
            hidden, weight, labels, token_weights=weights, temperature=1.3, softcap=4.0
        )
    else:
        teacher = cap(teacher_hidden, teacher_weight)
        want = reference.DIVERGENCES[kind](cap(hidden, weight), teacher, 1.3)
        got = fused_linear_divergence(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            token_weights=weights,
            kind=kind,
            temperature=1.3,
            softcap=4.0,
        )
    torch.testing.assert_close(got.per_token, want.detach())
    want_grads = torch.autograd.grad((want * weights).sum(), [hidden, weight])
    got_grads = torch.autograd.grad(got.loss, [hidden, weight])
    for one, other in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(one, other)


def test_only_the_gradients_that_are_needed():
    hidden, weight, teacher_hidden, teacher_weight = head()

    def loss(h, w):
        return fused_linear_divergence(
            h, w, teacher_hidden, teacher_weight, token_weights=torch.ones(7), kind="rkl"
        ).loss

    free_hidden = hidden.clone().requires_grad_()
    free_weight = weight.clone().requires_grad_()
    frozen_head = torch.autograd.grad(loss(free_hidden, weight), free_hidden)[0]
    frozen_body = torch.autograd.grad(loss(hidden, free_weight), free_weight)[0]
    full = torch.autograd.grad(loss(free_hidden, free_weight), [free_hidden, free_weight])
    torch.testing.assert_close(frozen_head, full[0])
    torch.testing.assert_close(frozen_body, full[1])
    with torch.no_grad():
        assert not loss(free_hidden, free_weight).requires_grad
    assert not loss(hidden, weight).requires_grad


def test_labels_out_of_range_with_weight_zero():
    hidden, weight, *_ = head()
    hidden.requires_grad_()
    labels = torch.tensor([-100, 1, 2, 3, 99, 4, 5])
    weights = torch.tensor([0.0, 1, 1, 1, 0, 1, 1], dtype=F64)
    got = fused_linear_cross_entropy(hidden, weight, labels, token_weights=weights)
    want = reference.cross_entropy(hidden @ weight.t(), labels.clamp(0, 32))
    torch.testing.assert_close(got.loss, (want * weights).sum())
    (grad,) = torch.autograd.grad(got.loss, hidden)
    assert grad[[0, 4]].abs().max() == 0
    scored = fused_linear_log_prob(hidden, weight, labels.clamp(0, 32))
    torch.testing.assert_close(scored, -want.detach())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "js"}, ["'js'", "'rkl', 'fkl', 'jsd'"]),
        ({"kind": "rkl", "support": "topk"}, ["topk", "'full'"]),
        ({"kind": "jsd", "beta": 1.0}, ["beta=1.0", "0.0 < beta < 1.0"]),
        ({"kind": "fkl", "support": "teacher_topk", "k": 4, "variant": "sg"}, ["'sg'", "rkl"]),
        ({"kind": "rkl", "k": 8}, ["k=8", "remove k"]),
        ({"kind": "rkl", "beta": 0.5}, ["beta=0.5"]),
        ({"kind": "rkl", "temperature": 0.0}, ["temperature=0.0", "> 0"]),
        ({"kind": "rkl", "vocab_size": 34}, ["vocab_size 34", "<= 33"]),
        ({"kind": "rkl", "chunk_size": 0}, ["chunk_size=0"]),
    ],
)
def test_what_does_not_exist_is_refused(options, words, logits):
    with pytest.raises(UserError) as error:
        vocab_parallel_divergence(*logits, **options)
    for word in words:
        assert word in str(error.value)


def test_shapes_that_disagree_are_refused():
    hidden, weight, teacher_hidden, teacher_weight = head()
    ones = torch.ones(7)
    with pytest.raises(UserError, match="32 ids"):
        fused_linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight[:32], token_weights=ones, kind="rkl"
        )
    with pytest.raises(UserError, match="token_weights has 6 rows"):
        fused_linear_cross_entropy(hidden, weight, torch.arange(7), token_weights=ones[:6])
