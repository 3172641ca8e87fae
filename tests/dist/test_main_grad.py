"""The weight gradient written straight into main_grad, as Megatron's fused accumulation does."""

import itertools

import pytest
import torch

from megaopd.errors import UserError
from megaopd.losses import (
    CrossEntropy,
    Divergence,
    Objective,
    OutputLayer,
    fused_linear_divergence,
    fused_linear_objectives,
    loss_weights,
    reference,
)
from tests.dist.test_gradient_matrix import (
    CHUNK,
    PADDED,
    T,
    V,
    close,
    group,
    laws,
    local_rows,
    require,
    shard,
)

H = 24


def parameter(weight):
    """An output layer as DistributedDataParallel leaves it."""
    w = torch.nn.Parameter(weight.clone())
    w.main_grad = torch.zeros_like(w, dtype=torch.float32)
    w.grad_added_to_main_grad = False
    return w


def two_micro_batches_on_rank():
    """12 and 24 tokens, masks of different density, gradients added up in main_grad."""
    errors = {}
    for scale, sp, tail in itertools.product((1.0, 4.0), (False, True), (False, True)):
        hidden, weight, teacher_hidden, teacher_weight, labels, _ = laws(scale)
        masks = [torch.rand(12) < 0.4, torch.rand(24) < 0.9]
        per_step = loss_weights(masks)
        full = [x.double() for x in (hidden, weight)]
        full[0].requires_grad_(), full[1].requires_grad_()
        teacher = (teacher_hidden @ teacher_weight.t()).double()
        case = {"kind": "rkl", "support": "student_topk", "k": 7} if tail else {"kind": "rkl"}
        want = reference.divergence(full[0] @ full[1].t(), teacher, vocab_size=V, **case)
        sft = reference.cross_entropy(full[0] @ full[1].t(), labels, 1.0, V)
        all_weights = torch.cat([per_step[0, :12], per_step[1, :24]]).double()
        ((want + 0.3 * sft) * all_weights).sum().backward()

        w, wt = parameter(shard(weight)), shard(teacher_weight)
        grads = []
        for rows, weights in ((slice(0, 12), per_step[0, :12]), (slice(12, T), per_step[1, :24])):
            h = local_rows(hidden[rows], sp).clone().requires_grad_()
            out = fused_linear_objectives(
                h,
                w,
                OutputLayer(local_rows(teacher_hidden[rows], sp), wt),
                {
                    "kl": Objective(Divergence(**case), weights),
                    "sft": Objective(CrossEntropy(), 0.3 * weights),
                },
                labels=labels[rows],
                vocab_size=V,
                group=group(),
                chunk_size=CHUNK,
                sequence_parallel=sp,
                into_main_grad=True,
            )
            out.loss.backward()
            assert w.grad_added_to_main_grad
            assert w.grad is not None  # Megatron's hooks ask for one
            w.grad, w.grad_added_to_main_grad = None, False
            grads.append((h.grad, local_rows(full[0].grad[rows], sp)))
        errors[scale, sp, tail] = max(
            close(w.main_grad, shard(full[1].grad), 1e-9),
            *(close(got, expected, 1e-9) for got, expected in grads),
        )
    return errors


@pytest.mark.parametrize("world", [1, 2, 4])
def test_two_micro_batches(ranks, world):
    require(ranks.run(two_micro_batches_on_rank, world), lambda case: 1e-5)


def one_loss(w, **options):
    hidden, _, teacher_hidden, teacher_weight, _, weights = laws(1.0)
    return fused_linear_divergence(
        hidden.requires_grad_(),
        w,
        teacher_hidden,
        teacher_weight,
        token_weights=weights,
        kind="rkl",
        into_main_grad=True,
        **options,
    ).loss


def test_an_upstream_other_than_one_is_refused():
    w = parameter(laws(1.0)[1])
    with pytest.raises(RuntimeError, match="must be 1"):
        (2.0 * one_loss(w)).backward()


def test_nothing_is_written_without_gradients():
    w = parameter(laws(1.0)[1])
    with torch.no_grad():
        one_loss(w)
    assert w.main_grad.abs().max() == 0
    frozen = parameter(laws(1.0)[1]).requires_grad_(False)
    frozen.main_grad = torch.zeros_like(frozen)
    one_loss(frozen).backward()
    assert frozen.main_grad.abs().max() == 0


def test_recomputation_writes_once():
    """Activation recompute runs the forward twice: first under no_grad, then with gradients."""
    from torch.utils.checkpoint import checkpoint

    once, twice = parameter(laws(1.0)[1]), parameter(laws(1.0)[1])
    one_loss(once).backward()
    scale = torch.ones((), requires_grad=True)
    checkpoint(lambda s: one_loss(twice) * s, scale, use_reentrant=True).backward()
    assert torch.equal(once.main_grad, twice.main_grad)


def test_a_tied_embedding_adds_its_own_gradient():
    """The same parameter feeds the input: param.grad is the embedding's part alone."""
    hidden, weight, teacher_hidden, teacher_weight, _, weights = laws(1.0)
    tied = parameter(weight)
    tied.zero_out_wgrad = True  # as megatron-core marks it
    ids = torch.randint(0, PADDED, (T,))
    embedded = torch.nn.functional.embedding(ids, tied)
    out = fused_linear_divergence(
        hidden + embedded,
        tied,
        teacher_hidden,
        teacher_weight,
        token_weights=weights,
        kind="rkl",
        into_main_grad=True,
    )
    out.loss.backward()
    free = weight.clone().requires_grad_()
    whole = fused_linear_divergence(
        hidden + torch.nn.functional.embedding(ids, free),
        free,
        teacher_hidden,
        teacher_weight,
        token_weights=weights,
        kind="rkl",
    )
    whole.loss.backward()
    assert close(tied.main_grad + tied.grad, free.grad, 1e-9) < 1e-6


def test_a_weight_without_hooks_gets_no_second_gradient():
    hidden, weight, teacher_hidden, teacher_weight, _, weights = laws(1.0)
    w = parameter(weight)
    del w.grad_added_to_main_grad
    out = fused_linear_divergence(
        hidden, w, teacher_hidden, teacher_weight, token_weights=weights, kind="rkl",
        into_main_grad=True,
    )  # fmt: skip
    out.loss.backward()
    assert w.grad is None and w.main_grad.abs().max() > 0


def test_a_weight_without_main_grad_is_refused():
    with pytest.raises(UserError, match="main_grad None"):
        one_loss(torch.nn.Parameter(laws(1.0)[1]))
