"""A frozen output layer (LoRA): the hidden gradient of a dense model, no weight gradient."""

import pytest
import torch

from megaopd.losses import (
    CrossEntropy,
    Divergence,
    Objective,
    OutputLayer,
    fused_linear_objectives,
    reference,
)
from tools.bench.measure import LiveBytes

T, H, V, CHUNK = 64, 24, 4096, 16
CASES = {"rkl": {"kind": "rkl"}, "topk": {"kind": "rkl", "support": "student_topk", "k": 7}}


def inputs():
    generator = torch.Generator().manual_seed(2)
    draw = [torch.randn(n, H, generator=generator) for n in (T, V, T, V)]
    labels = torch.randint(0, V, (T,), generator=generator)
    return *draw, labels, torch.rand(T, generator=generator) / T


def loss_of(case, *, frozen):
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = inputs()
    hidden.requires_grad_(), weight.requires_grad_(not frozen)
    out = fused_linear_objectives(
        hidden,
        weight,
        OutputLayer(teacher_hidden, teacher_weight),
        {
            "kl": Objective(Divergence(**CASES[case]), weights),
            "sft": Objective(CrossEntropy(), 0.3 * weights),
        },
        labels=labels,
        chunk_size=CHUNK,
        into_main_grad=False,
    )
    return hidden, weight, out.loss


@pytest.mark.parametrize("case", CASES)
def test_the_hidden_gradient_is_the_dense_one(case):
    hidden, weight, loss = loss_of(case, frozen=True)
    loss.backward()
    assert weight.grad is None
    wide, full, teacher_hidden, teacher_weight, labels, weights = (
        x.double() if x.is_floating_point() else x for x in inputs()
    )
    wide.requires_grad_()
    logits, teacher = wide @ full.t(), teacher_hidden @ teacher_weight.t()
    value = reference.divergence(logits, teacher, vocab_size=V, **CASES[case])
    value = value + 0.3 * reference.cross_entropy(logits, labels, 1.0, V)
    (value * weights).sum().backward()
    error = (hidden.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert float(error) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_no_weight_gradient_is_made(case):
    """Its buffer [V, H] is the largest thing in this pass: without it the peak falls by as much."""
    peaks = {}
    for frozen in (False, True, False, True):  # the second round counts
        with LiveBytes() as live:
            _, _, loss = loss_of(case, frozen=frozen)
            loss.backward()
            del loss
        peaks[frozen] = live.peak
    assert peaks[False] - peaks[True] >= 0.9 * V * H * 4
