"""The losses' Triton kernels on a GPU: against dense fp64, their memory, no host synchronisation.

What the interpreter and ahead-of-time compilation can show is in tests/kernels. The bounds are the
CPU tests' in fp32, and bf16's rounding of the logits' gradient; not measured on a GPU yet.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False", allow_module_level=True)

from megaopd.losses import (
    CrossEntropy,
    Divergence,
    Entropy,
    Objective,
    OutputLayer,
    fused_linear_divergence,
    fused_linear_objectives,
    kernels,
    reference,
    vocab_parallel_divergence,
    vocab_parallel_topk,
)
from megaopd.losses.kernels import launch
from megaopd.losses.terms import VALID

pytestmark = pytest.mark.gpu

V, PADDED, T, H = 5003, 5120, 70, 64
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
CASES = [(k, s, v) for (k, s), names in VALID.items() for v in names if k != "pld"]


def error(got, want):
    found = ((got.double() - want).norm() / want.norm().clamp_min(1e-6)).item()
    return found if found == found else float("inf")


def options(kind, support, variant):
    found = {"kind": kind, "support": support}
    if support != "full":
        found["k"] = 20
    if variant not in ("none", "soft"):
        found["variant"] = variant
    return found


def laws(dtype=torch.float32):
    torch.manual_seed(0)
    h = torch.randn(T, H)
    w = torch.randn(PADDED, H) * 3 / H**0.5
    ht = torch.cat([h, torch.randn(T, 16)], 1)
    wt = torch.cat([w, torch.randn(PADDED, 16) * 0.3], 1)
    labels = torch.randint(0, V, (T,))
    return [x.to("cuda", dtype) for x in (h, w, ht, wt)], labels.cuda()


def test_triton_is_used():
    assert launch.available(), "triton comes with torch for CUDA"
    assert kernels.native(torch.zeros(1, 1, device="cuda")) is launch


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(c))
def test_gradients_of_given_logits(case):
    (h, w, ht, wt), labels = laws()
    kwargs = options(*case) | {"vocab_size": V, "labels": labels}
    student, teacher = h @ w.t(), ht @ wt.t()
    full = student.double().requires_grad_()
    mine = student.clone().requires_grad_()
    want = reference.divergence(full, teacher.double(), **kwargs)
    got = vocab_parallel_divergence(mine, teacher, chunk_size=32, **kwargs)
    upstream = torch.randn(T, device="cuda")
    want.backward(upstream.double()), got.backward(upstream)
    loose = 10 if case[0] in ("chi2", "jeffreys") else 1
    assert error(mine.grad, full.grad) < loose * BOUND[torch.float32]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_objectives_from_hidden_states(dtype, softcap):
    (h, w, ht, wt), labels = laws(dtype)
    ones = torch.ones(T, device="cuda")
    mine = [x.clone().requires_grad_() for x in (h, w)]
    out = fused_linear_objectives(
        *mine,
        OutputLayer(ht, wt),
        {
            "kl": Objective(Divergence(kind="rkl"), ones),
            "tail": Objective(Divergence(kind="fkl", support="teacher_topk", k=20), 0.5 * ones),
            "sft": Objective(CrossEntropy(), 0.3 * ones),
            "entropy": Objective(Entropy(), -0.1 * ones),
        },
        labels=labels,
        vocab_size=V,
        softcap=softcap,
        chunk_size=32,
    )
    out.loss.backward()
    full = [x.double().requires_grad_() for x in (h, w)]
    s = full[0] @ full[1].t()
    s = s + ((h @ w.t()).double() - s).detach()  # the product's rounding is not the loss's
    t = (ht @ wt.t()).double()
    if softcap is not None:
        s, t = softcap * torch.tanh(s / softcap), softcap * torch.tanh(t / softcap)
    want = reference.divergence(s, t, kind="rkl", vocab_size=V)
    want = want + 0.5 * reference.divergence(
        s, t, kind="fkl", support="teacher_topk", k=20, vocab_size=V
    )
    want = want + 0.3 * reference.cross_entropy(s, labels, 1.0, V)
    want = want - 0.1 * reference.entropy(s, 1.0, V)
    want.sum().backward()
    for got, expected in zip(mine, full, strict=True):
        assert error(got.grad, expected.grad) < BOUND[dtype]


def test_top_k_with_ties():
    logits = (torch.randn(33, PADDED, device="cuda") * 3).round()
    values, ids = vocab_parallel_topk(logits, 50, vocab_size=V)
    want = reference.topk_ids(logits[:, :V].double(), 50)
    assert torch.equal(ids, want) and torch.equal(values, logits.gather(1, want))


@pytest.mark.parametrize("case", [{"kind": "rkl"}, {"kind": "jsd"}], ids=str)
def test_no_host_synchronisation(case):
    (h, w, ht, wt), _ = laws(torch.bfloat16)
    ones = torch.ones(T, device="cuda")
    fused_linear_divergence(h, w, ht, wt, token_weights=ones, **case)  # compiles the kernels
    h.requires_grad_(), w.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_linear_divergence(h, w, ht, wt, token_weights=ones, **case).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow_with_tokens():
    """Beyond inputs and outputs: two chunks of logits and what the allocator rounds up."""
    peaks = []
    for tokens in (2048, 8192, 32768):
        h = torch.randn(tokens, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(PADDED, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        ones = torch.ones(tokens, device="cuda")
        fused_linear_divergence(h, w, h, w, token_weights=ones, kind="rkl", chunk_size=512)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = fused_linear_divergence(h, w, h, w, token_weights=ones, kind="rkl", chunk_size=512)
        peak = torch.cuda.max_memory_allocated() - before
        held = torch.cuda.memory_allocated() - before
        peaks.append(peak - held)
        del out
    assert max(peaks) < 1.1 * min(peaks)
