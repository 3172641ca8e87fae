"""Numbers of whole sequences against the divergences that they are for, by enumeration in fp64."""

from itertools import product

import pytest
import torch

from megaopd.losses.sequences import advantage_weights, posterior_weights, returns_to_go

V, LENGTH = 3, 3


def tables(seed):
    """Logits [states, V] of two models over sequences of LENGTH tokens: one row a prefix."""
    torch.manual_seed(seed)
    states = sum(V**n for n in range(LENGTH))
    return [torch.randn(states, V, dtype=torch.float64) for _ in range(2)]


def rows(sequence):
    """The states that a sequence passes through."""
    found, row, first = [], 0, 0
    for n, token in enumerate(sequence):
        found.append(first + row)
        first, row = first + V**n, row * V + token
    return torch.tensor(found)


SEQUENCES = [torch.tensor(s) for s in product(range(V), repeat=LENGTH)]


def log_probs(logits):
    """[sequences, LENGTH] log-probs of the tokens of every sequence."""
    law = logits.log_softmax(-1)
    return torch.stack([law[rows(s.tolist()), s] for s in SEQUENCES])


def test_the_next_tokens_kl_and_the_summed_returns_are_the_sequences_kl():
    student, teacher = tables(0)
    student.requires_grad_()
    mine, theirs = log_probs(student), log_probs(teacher)
    exact = (mine.sum(1).exp() * (mine - theirs).sum(1)).sum()
    (want,) = torch.autograd.grad(exact, student, retain_graph=True)

    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    next_token = (p.exp() * (p - q)).sum(1)
    mask = torch.ones_like(mine)
    returns = returns_to_go((theirs - mine).detach(), mask, "sum")
    chance = mine.sum(1).exp().detach()
    parts = torch.stack([next_token[rows(s.tolist())].sum() for s in SEQUENCES])
    loss = (chance * (parts - (returns * mine).sum(1))).sum()
    (got,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_returns_are_of_what_follows_and_counts():
    ratio = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, float("nan"), 0.0]])
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0]])
    total = torch.tensor([[10.0, 8.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(returns_to_go(ratio, mask, "sum"), total)
    mean = torch.tensor([[5.0, 8.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(returns_to_go(ratio, mask, "mean"), mean)


@pytest.mark.parametrize("baseline", [0.0, 1.0])
def test_posterior_weights_give_the_gradient_of_forward_kl(baseline):
    """A uniform student, of whose law each sequence once is an exact sample: Z is exact too."""
    student, initial = tables(1)
    student = torch.zeros_like(student, requires_grad=True)
    mine, theirs = log_probs(student).sum(1), log_probs(initial).sum(1)
    torch.manual_seed(2)
    posterior = theirs + torch.rand(len(SEQUENCES)) / 0.3
    chances = posterior.softmax(0)
    (want,) = torch.autograd.grad(-(chances * mine).sum(), student, retain_graph=True)

    weights = posterior_weights(posterior - mine.detach(), [range(len(SEQUENCES))])
    (got,) = torch.autograd.grad(-((weights - baseline) * mine).mean(), student)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_posterior_weights_have_mean_1_in_each_group():
    log_weight = torch.tensor([700.0, 690.0, -5.0, -5.0, 3.0, 0.0])
    found = posterior_weights(log_weight, [[0, 1], [2, 3, 4]])
    assert found.dtype == torch.float64 and found[5] == 0
    torch.testing.assert_close(found[:2].sum(), torch.tensor(2.0, dtype=torch.float64))
    want = 3 * log_weight[2:5].double().softmax(0)
    torch.testing.assert_close(found[2:5], want)


def test_a_token_that_the_teacher_likes_counts_more_where_the_response_was_good():
    ratio = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [0.0, 2.0, 9.0], [3.0, 3.0, 3.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    advantage = torch.tensor([0.5, -2.0, 1.0, 1.0])
    found = advantage_weights(ratio, mask, advantage, 0.9)
    assert found[0, 1] > 1 > found[0, 0] and found[0, 2] == 1
    torch.testing.assert_close(found[1, :2], found[0, :2].flip(0))
    # What does not count is not looked at; z = -1 and 1.
    sure = 2 * torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(found[2], torch.stack([2 - sure, sure, torch.ones_like(sure)]))
    assert (found[3] == 1).all()
    assert advantage_weights(ratio, mask, advantage, 0.2).max() == 1.2
