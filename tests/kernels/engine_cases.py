"""The whole engine on the Triton kernels, in Triton's interpreter: cases of test_interpreter.py.

Run in a process of its own with TRITON_INTERPRET=1; prints {case: norm-wise error} as JSON.
"""

import itertools
import json

import torch

from megaopd.losses import (
    CrossEntropy,
    Divergence,
    Entropy,
    Objective,
    OutputLayer,
    Sampled,
    fused_linear_objectives,
    kernels,
    reference,
    vocab_parallel_divergence,
)
from megaopd.losses.kernels import launch

T, V, PADDED, H = 3, 301, 320, 16
CASES = {
    "rkl": {"kind": "rkl"},
    "fkl": {"kind": "fkl"},
    "jsd": {"kind": "jsd"},
    "rkl tail": {"kind": "rkl", "support": "student_topk", "k": 7},
    "rkl sg": {"kind": "rkl", "support": "student_topk", "k": 7, "variant": "sg"},
    "fkl renorm": {"kind": "fkl", "support": "teacher_topk", "k": 7, "variant": "renorm"},
}
SOFTCAP = 5.0


def error(got, want):
    found = ((got.double() - want).norm() / want.norm().clamp_min(1e-3)).item()
    return found if found == found else float("inf")


def capped(z, softcap):
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def given_logits():
    for (name, case), tau in itertools.product(CASES.items(), (1.0, 1.3)):
        torch.manual_seed(1)
        student = torch.randn(T, PADDED) * 2
        teacher = student * 0.7 + torch.randn(T, PADDED)
        full = student.double().requires_grad_()
        want = reference.divergence(full, teacher.double(), vocab_size=V, temperature=tau, **case)
        want.sum().backward()
        mine = student.clone().requires_grad_()
        got = vocab_parallel_divergence(mine, teacher, vocab_size=V, temperature=tau, **case)
        got.sum().backward()
        yield (
            f"{name} at {tau}",
            max(error(got.detach(), want.detach()), error(mine.grad, full.grad)),
        )


def output_layer(dtype, softcap, tau):
    """Divergence + cross-entropy + entropy from hidden states, one pass."""
    torch.manual_seed(2)
    h, w = torch.randn(T, H), torch.randn(PADDED, H) * 2 / H**0.5
    ht, wt = torch.cat([h, torch.randn(T, 4)], 1), torch.cat([w, torch.randn(PADDED, 4) / 4], 1)
    labels, ones = torch.randint(0, V, (T,)), torch.ones(T)
    h, w, ht, wt = (x.to(dtype) for x in (h, w, ht, wt))
    for name, case in CASES.items():
        full = [x.double().requires_grad_() for x in (h, w)]
        # In bf16 the product's rounding is part of the problem, not of the kernels.
        s = full[0] @ full[1].t()
        s = s + (h @ w.t() - s).detach()
        s, t = capped(s, softcap), capped((ht @ wt.t()).double(), softcap)
        want = reference.divergence(s, t, vocab_size=V, temperature=tau, **case)
        want = want + 0.5 * reference.cross_entropy(s, labels, tau, V)
        want = want - 0.1 * reference.entropy(s, tau, V)
        want.sum().backward()
        mine = [x.clone().requires_grad_() for x in (h, w)]
        out = fused_linear_objectives(
            *mine,
            OutputLayer(ht, wt),
            {
                "kl": Objective(Divergence(temperature=tau, **case), ones),
                "sft": Objective(CrossEntropy(temperature=tau), 0.5 * ones),
                "entropy": Objective(Entropy(temperature=tau), -0.1 * ones),
            },
            labels=labels,
            vocab_size=V,
            softcap=softcap,
            return_stats=True,
        )
        out.loss.backward()
        errors = [error(a.grad, b.grad) for a, b in zip(mine, full, strict=True)]
        yield f"{name} {dtype} cap {softcap} at {tau}", max(errors)


def one_term_in_bf16():
    """The token weights meet the products here, not the kernel; into main_grad too."""
    torch.manual_seed(3)
    h, w = torch.randn(T, H).bfloat16(), (torch.randn(PADDED, H) / 2).bfloat16()
    weights, labels = torch.rand(T), torch.randint(0, V, (T,))
    terms = {"rkl": Divergence(kind="rkl"), "sft": CrossEntropy(), "k2": Sampled(estimator="k2")}
    for (name, term), into in itertools.product(terms.items(), (False, True)):
        mine = [x.clone().requires_grad_() for x in (h, w)]
        mine[1].main_grad = torch.zeros(PADDED, H)
        bias = torch.zeros(PADDED, dtype=torch.bfloat16, requires_grad=True)
        out = fused_linear_objectives(
            *mine,
            OutputLayer(h + 0.1, w),
            {"loss": Objective(term, weights)},
            labels=labels,
            vocab_size=V,
            bias=bias,
            into_main_grad=into,
        )
        out.loss.backward()
        full = [x.double().requires_grad_() for x in (h, w)]
        s = full[0] @ full[1].t()
        s = s + (h @ w.t() - s).detach()
        t = ((h + 0.1) @ w.t()).double()
        log_p, log_q = (-reference.cross_entropy(z, labels, 1.0, V) for z in (s, t))
        want = {
            "rkl": reference.rkl(s, t, 1.0, V),
            "sft": -log_p,
            "k2": 0.5 * (log_p - log_q.detach()) ** 2,
        }[name]
        (want * weights.double()).sum().backward()
        found = mine[1].main_grad if into else mine[1].grad
        yield (
            f"one {name} bfloat16 {into}",
            max(error(mine[0].grad, full[0].grad), error(found, full[1].grad)),
        )


def confident_label_in_bf16():
    """p(label) = .999: the gradient p - 1 must not be made of two rounded numbers."""
    z = torch.zeros(1, PADDED)
    z[0, 5] = 13.0
    h, w = torch.ones(1, 1).bfloat16(), z.t().bfloat16().contiguous()
    mine = w.clone().requires_grad_()
    out = fused_linear_objectives(
        h,
        mine,
        None,
        {"sft": Objective(CrossEntropy(), torch.ones(1))},
        labels=torch.tensor([5]),
        vocab_size=V,
    )
    out.loss.backward()
    full = z.double().requires_grad_()
    reference.cross_entropy(full, torch.tensor([5]), 1.0, V).sum().backward()
    got, want = mine.grad[5, 0].double(), full.grad[0, 5]
    yield "confident label bfloat16", ((got - want) / want).abs().item()


def main():
    kernels.forced = launch
    found = dict(given_logits())
    for dtype, softcap, tau in (
        (torch.float32, None, 1.0),
        (torch.float32, SOFTCAP, 1.3),
        (torch.bfloat16, SOFTCAP, 1.0),
    ):
        found |= dict(output_layer(dtype, softcap, tau))
    found |= dict(one_term_in_bf16()) | dict(confident_label_in_bf16())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
