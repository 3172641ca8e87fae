"""Sinkhorn divergence in one process: against dense fp64 autograd, and its own laws."""

import pytest
import torch

from megaopd.errors import UserError
from megaopd.losses import sinkhorn
from megaopd.losses.sinkhorn import row_chunks, sinkhorn_divergence, transport_plan

F64 = torch.float64


def reference(student, teacher, chunks, temperature=2.0, epsilon=0.1, iterations=20):
    """The definition, dense, on probabilities: [N, N, V] at once and autograd through it all."""
    total = student.new_zeros(())
    for rows in chunks:
        p, q = (x[rows].div(temperature).softmax(-1) for x in (student, teacher))
        cost = (p[:, None] - q[None]).abs().sum(-1)
        plan = (-cost / epsilon).exp()
        for _ in range(iterations):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        total = total + (plan * cost).sum()
    return total / sum(map(len, chunks))


def value_and_grad(loss, logits):
    z = logits.clone().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(1.7 * value, z)[0] / 1.7


def close(got, want, tolerance=1e-11):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.fixture
def logits():
    torch.manual_seed(2)
    student = 2 * torch.randn(23, 31, dtype=F64)
    return student, student + 2 * torch.randn(23, 31, dtype=F64)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"epsilon": 0.01}, {"epsilon": 0.5, "iterations": 3}],
)
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_value_and_gradient(options, block, logits, monkeypatch):
    monkeypatch.setattr(sinkhorn, "BLOCK_ELEMENTS", block)
    student, teacher = logits
    mask = torch.ones(23, dtype=torch.bool)
    mask[[3, 11]] = False
    student[3] = float("nan")  # a row that does not count is not looked at
    chunks = row_chunks(mask, 8, seed=5)
    want, want_grad = value_and_grad(lambda z: reference(z, teacher, chunks, **options), student)

    def ours(z):
        return sinkhorn_divergence(z, teacher, mask=mask, chunk=8, seed=5, **options)

    got, got_grad = value_and_grad(ours, student)
    close(got, want)
    close(got_grad[mask], want_grad[mask])
    assert got_grad[~mask].abs().max() == 0
    assert got_grad.sum(1).abs().max() < 1e-12


def test_one_row_is_twice_the_total_variation(logits):
    student, teacher = (x[:1] for x in logits)
    total_variation = (student.softmax(-1) - teacher.softmax(-1)).abs().sum() / 2
    close(sinkhorn_divergence(student, teacher, temperature=1.0), 2 * total_variation)
    alone = sinkhorn_divergence(*logits, chunk=1, temperature=1.0)
    close(alone, (logits[0].softmax(-1) - logits[1].softmax(-1)).abs().sum(1).mean())


def test_order_does_not_matter_and_a_sharp_plan_finds_the_matching_rows(logits):
    student, teacher = logits
    shuffled = teacher[torch.randperm(len(teacher))]
    close(
        sinkhorn_divergence(student, teacher, iterations=500),
        sinkhorn_divergence(student, shuffled, iterations=500),
        1e-8,
    )
    assert sinkhorn_divergence(teacher, shuffled, epsilon=0.005) < 1e-6
    matched = sinkhorn_divergence(student, shuffled, epsilon=0.005, iterations=500)
    paired, mispaired = (sinkhorn_divergence(student, x, chunk=1) for x in (teacher, shuffled))
    assert matched.item() == pytest.approx(paired.item(), abs=1e-3)
    assert matched < 0.9 * mispaired


def test_envelope_holds_the_plan(logits):
    student, teacher = logits
    z = student.clone().requires_grad_()
    p, q = (x.div(2).softmax(-1) for x in (z, teacher))
    cost = (p[:, None] - q[None]).abs().sum(-1)
    held = (transport_plan(cost, 0.1, 20).detach() * cost).sum() / 23
    (want,) = torch.autograd.grad(held, z)
    got, grad = value_and_grad(lambda x: sinkhorn_divergence(x, teacher, envelope=True), student)
    close(got, held.detach()), close(grad, want)
    _, exact = value_and_grad(lambda x: sinkhorn_divergence(x, teacher), student)
    assert (grad - exact).norm() > 1e-3 * exact.norm()


def test_the_plan_has_unit_columns_and_nearly_unit_rows():
    torch.manual_seed(0)
    plan = transport_plan(2 * torch.rand(16, 16, dtype=F64), 0.1, 200)
    close(plan.sum(0), torch.ones(16, dtype=F64))
    close(plan.sum(1), torch.ones(16, dtype=F64), 1e-3)
    sharp = transport_plan(2 * torch.rand(16, 16), 1e-3, 20)
    assert sharp.isfinite().all()


def test_equal_probabilities_pull_nowhere():
    """sign(0) = 0: a student that is the teacher gets no gradient from its own row."""
    z = torch.zeros(1, 4, requires_grad=True)
    sinkhorn_divergence(z, torch.zeros(1, 4)).backward()
    assert z.grad.abs().max() == 0


def test_row_chunks_are_a_seeded_partition():
    mask = torch.rand(300) < 0.7
    chunks = row_chunks(mask, 128, seed=3)
    assert sorted(torch.cat(chunks).tolist()) == mask.nonzero()[:, 0].tolist()
    sizes = [len(c) for c in chunks]
    assert max(sizes) <= 128 and max(sizes) - min(sizes) <= 1
    again, other = row_chunks(mask, 128, seed=3), row_chunks(mask, 128, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(chunks, again, strict=True))
    assert not torch.equal(chunks[0], other[0])


def test_no_rows_denominator_padding_and_no_grad(logits):
    student, teacher = logits
    z = student.clone().requires_grad_()
    silent = sinkhorn_divergence(z, teacher, mask=torch.zeros(23))
    silent.backward()
    assert silent.item() == 0 and z.grad.abs().max() == 0
    mean = sinkhorn_divergence(student, teacher)
    close(sinkhorn_divergence(student, teacher, denominator=46), mean / 2)
    pad = torch.full((23, 5), float("inf"), dtype=F64)
    padded = [torch.cat([x, pad], 1) for x in logits]
    value, grad = value_and_grad(
        lambda x: sinkhorn_divergence(x, padded[1], vocab_size=31), padded[0]
    )
    close(value, mean)
    assert grad[:, 31:].abs().max() == 0 and grad.isfinite().all()
    with torch.no_grad():
        assert not sinkhorn_divergence(z, teacher).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype, logits):
    student, teacher = (x.to(dtype) for x in logits)
    want, want_grad = value_and_grad(
        lambda z: sinkhorn_divergence(z, teacher.double()), student.double()
    )
    got, grad = value_and_grad(lambda z: sinkhorn_divergence(z, teacher), student)
    assert got.dtype == torch.float32 and grad.dtype == dtype
    assert abs(got.item() - want.item()) < 1e-6
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert (grad.double() - want_grad).norm() < bound * want_grad.norm()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature=0"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"iterations": 0}, "iterations"),
        ({"chunk": 0}, "chunk"),
        ({"denominator": 0.0}, "denominator"),
        ({"mask": torch.ones(4)}, "mask of shape"),
        ({"teacher": torch.zeros(3, 6)}, "teacher logits"),
        ({"vocab_size": 9}, "vocab_size 9"),
    ],
)
def test_refusals(change, words):
    teacher = change.pop("teacher", torch.zeros(3, 5))
    with pytest.raises(UserError, match=words):
        sinkhorn_divergence(torch.zeros(3, 5), teacher, **change)
