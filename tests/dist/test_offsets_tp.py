"""What sharding itself can get wrong: ties in top-k across shards, shards of unequal size."""

import itertools

import pytest
import torch
import torch.distributed as dist

from megaopd.losses import (
    reference,
    vocab_parallel_divergence,
    vocab_parallel_log_prob,
    vocab_parallel_topk,
)
from tests.dist.test_gradient_matrix import options
from tests.dist.test_losses_tp import CHUNK, PADDED, T, V, error, group, require, shard


def topk_on_rank():
    """Integer logits: many ties, in and across shards, cut at every place."""
    wrong = {}
    torch.manual_seed(2)
    for dtype, k in itertools.product((torch.float32, torch.float64), (1, 5, 64, 300)):
        for spread in (2, 30):
            logits = (torch.randn(23, PADDED) * spread).round().to(dtype)
            logits[0] = 0.0
            logits[1] = -logits[1].abs()  # holds -0.0
            values, ids = vocab_parallel_topk(shard_columns(logits), k, group=group(), vocab_size=V)
            want = reference.topk_ids(logits[:, :V].double(), k)
            same = torch.equal(ids, want) and torch.equal(values, logits.gather(1, want))
            wrong[dtype, k, spread] = 0.0 if same else 1.0
    return wrong


def shard_columns(logits):
    return logits.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_top_k_is_exact_with_ties(ranks, world):
    require(ranks.run(topk_on_rank, world), lambda case: 0.0)


def far_shards_on_rank():
    """All of one shard's logits lie 300 below another's; logits far from zero."""
    errors = {}
    torch.manual_seed(4)
    for shift, kind in itertools.product((0.0, 200.0, -200.0), ("rkl", "fkl", "jsd", "tail", "ce")):
        student, teacher = torch.randn(T, PADDED) * 3, torch.randn(T, PADDED) * 3
        student[:, : PADDED // 2] += 300.0
        teacher[:, : PADDED // 2] += 300.0
        full = (student + shift).double().requires_grad_()
        mine = shard(student + shift).requires_grad_()
        labels = torch.randint(0, V, (T,))
        if kind == "ce":
            want = reference.cross_entropy(full, labels, 1.0, V)
            got = -vocab_parallel_log_prob(mine, labels, group=group(), vocab_size=V)
        else:
            case = options(
                *(("rkl", "student_topk", "tail") if kind == "tail" else (kind, "full", None)), 1.0
            )
            want = reference.divergence(full, teacher.double(), vocab_size=V, **case)
            got = vocab_parallel_divergence(
                mine, shard(teacher), group=group(), vocab_size=V, chunk_size=CHUNK, **case
            )
        want.sum().backward(), got.sum().backward()
        errors[kind, shift] = max(
            error(got.detach(), want.detach()), error(mine.grad, shard(full.grad))
        )
    return errors


def small_shards_on_rank():
    """Lists longer than what a rank owns: 18 ids in 24, so that at TP 4 the last shard has none."""
    errors = {}
    torch.manual_seed(6)
    student, teacher = torch.randn(9, 24), torch.randn(9, 24)
    for k, valid in itertools.product((3, 7, 13, 18, 40), (18, 14)):
        for support in ("student_topk", "teacher_topk", "intersection"):
            case = options("rkl", support, "tail", 1.0) | {"k": k, "vocab_size": valid}
            full = student.double().requires_grad_()
            mine = student.chunk(dist.get_world_size(), 1)[dist.get_rank()].clone()
            theirs = teacher.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()
            want = reference.divergence(full, teacher.double(), **case | {"k": min(k, valid)})
            got = vocab_parallel_divergence(mine.requires_grad_(), theirs, group=group(), **case)
            want.sum().backward(), got.sum().backward()
            wanted = full.grad.chunk(dist.get_world_size(), 1)[dist.get_rank()]
            errors[k, valid, support] = max(
                (got.detach().double() - want.detach()).abs().max().item(),
                (mine.grad.double() - wanted).abs().max().item(),
            )
    return errors


@pytest.mark.parametrize("world", [1, 2, 4])
def test_lists_longer_than_a_shard(ranks, world):
    require(ranks.run(small_shards_on_rank, world), lambda case: 2e-6)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_far_apart(ranks, world):
    require(ranks.run(far_shards_on_rank, world), lambda case: 1e-4)
