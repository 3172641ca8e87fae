"""The Sinkhorn divergence in the pass over the output layer, against dense fp64 autograd."""

import pytest
import torch

from megaopd.errors import UserError
from megaopd.losses import (
    CrossEntropy,
    ListedTeacher,
    Objective,
    OutputLayer,
    Sinkhorn,
    Target,
    fused_linear_objectives,
)

F64 = torch.float64
T, H, V, CHUNK = 23, 6, 31, 8
# T rows in chunks of at most 8: of 8, 8 and 7.
CHUNKS = [slice(0, 8), slice(8, 16), slice(16, 23)]


def rows(student, teacher, kept, term):
    """L_i [T] of scaled laws, 0 where a row does not count: the definition, dense."""
    found = torch.zeros(len(student), dtype=student.dtype)
    for chunk in CHUNKS:
        here = torch.arange(len(student))[chunk]
        here = here[kept[here]]
        p, q = (x[here].div(term.temperature).softmax(-1) for x in (student, teacher))
        cost = (p[:, None] - q[None]).abs().sum(-1)
        plan = (-cost / term.epsilon).exp()
        for _ in range(term.iterations):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        found = found.index_add(0, here, (plan * cost).sum(1))
    return found


def inputs(seed=0):
    torch.manual_seed(seed)
    made = {
        "hidden": torch.randn(T, H, dtype=F64),
        "weight": torch.randn(V, H, dtype=F64),
        "taught": torch.randn(T, 4, dtype=F64),
        "layer": torch.randn(V, 4, dtype=F64),
        "weights": torch.rand(T, dtype=F64) / T,
        "labels": torch.randint(V, (T,)),
    }
    made["weights"][[0, 3, 11, 22]] = 0.0
    return made


TERMS = {
    "default": Sinkhorn(),
    "sharp": Sinkhorn(temperature=1.0, epsilon=0.02, iterations=7),
    "tempered": Sinkhorn(target=Target(kind="tempered", weight=0.5)),
}


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient(name, beside, softcap):
    term, x = TERMS[name], inputs()
    leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
    made = {"distill": Objective(term, x["weights"])}
    if beside:
        made["sft"] = Objective(CrossEntropy(), torch.full((T,), 0.3 / T, dtype=F64))
    got = fused_linear_objectives(
        *leaves, OutputLayer(x["taught"], x["layer"]), made, labels=x["labels"],
        chunk_size=CHUNK, softcap=softcap, return_stats=True,
    )  # fmt: skip
    got_grads = torch.autograd.grad(got.loss, leaves)

    student, teacher = leaves[0] @ leaves[1].t(), x["taught"] @ x["layer"].t()
    if softcap:
        student, teacher = (softcap * (z / softcap).tanh() for z in (student, teacher))
    values = rows(student, teacher * term.target.weight, x["weights"] != 0, term)
    loss = (x["weights"] * values).sum()
    if beside:
        loss = loss - 0.3 * student.log_softmax(-1).gather(1, x["labels"][:, None]).mean()
    grads = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(got.terms["distill"], values.detach(), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(got.loss, loss, atol=1e-11, rtol=1e-11)
    for mine, want in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(mine, want, atol=1e-10, rtol=1e-10)
    entropy = torch.distributions.Categorical(logits=student.detach() / term.temperature).entropy()
    torch.testing.assert_close(got.stats["student_entropy"], entropy, atol=1e-10, rtol=1e-10)


def test_one_token_in_a_chunk_is_twice_the_total_variation():
    x = inputs()
    got = fused_linear_objectives(
        x["hidden"], x["weight"], OutputLayer(x["taught"], x["layer"]),
        {"loss": Objective(Sinkhorn(temperature=1.0), torch.ones(T))}, chunk_size=1,
    )  # fmt: skip
    p, q = (x["hidden"] @ x["weight"].t()).softmax(-1), (x["taught"] @ x["layer"].t()).softmax(-1)
    torch.testing.assert_close(got.per_token, (p - q).abs().sum(1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("count", [0, T])
def test_no_token_counts(count):
    x = inputs()
    hidden = x["hidden"][:count].clone().requires_grad_()
    got = fused_linear_objectives(
        hidden, x["weight"], OutputLayer(x["taught"][:count], x["layer"]),
        {"loss": Objective(Sinkhorn(), torch.zeros(count))}, return_stats=True,
    )  # fmt: skip
    got.loss.backward()
    assert got.loss == 0 and hidden.grad.abs().sum() == 0


def test_what_it_needs():
    x = inputs()
    listed = ListedTeacher(label_log_q=torch.zeros(T))
    for teacher, said in ((None, "without a teacher"), (listed, "whole laws")):
        with pytest.raises(UserError, match=said):
            fused_linear_objectives(
                x["hidden"], x["weight"], teacher, {"loss": Objective(Sinkhorn(), torch.ones(T))}
            )
    with pytest.raises(UserError, match="epsilon"):
        Sinkhorn(epsilon=0.0)
