"""The Sinkhorn divergence in the pass over the output layer, and in a run, over several ranks."""

import pytest
import torch
import torch.distributed as dist

from megaopd.losses import Objective, OutputLayer, Sinkhorn, fused_linear_objectives
from tests.dist import layouts
from tests.dist.layouts import LAYOUTS, SINGLE, Layout
from tests.unit.test_sinkhorn_pass import CHUNK, inputs, rows

PADDED = 32  # of 31 ids


def padded(weight):
    return torch.nn.functional.pad(weight, (0, 0, 0, PADDED - len(weight)), value=9.0)


def one_pass(dtype):
    """(loss, hidden gradient, the weight gradient of every rank) on this world's shards."""
    x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs().items()}
    world, rank = dist.get_world_size(), dist.get_rank()
    hidden = x["hidden"].requires_grad_()
    weight, layer = (padded(x[n]).chunk(world)[rank].clone() for n in ("weight", "layer"))
    got = fused_linear_objectives(
        hidden, weight.requires_grad_(), OutputLayer(x["taught"], layer),
        {"distill": Objective(Sinkhorn(), x["weights"])}, labels=x["labels"], return_stats=True,
        vocab_size=31, group=dist.group.WORLD if world > 1 else None, chunk_size=CHUNK,
    )  # fmt: skip
    got.loss.backward()
    shards = [torch.empty_like(weight.grad) for _ in range(world)]
    dist.all_gather(shards, weight.grad)
    return got.loss.detach(), hidden.grad, torch.cat(shards)[:31]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pass_on_shards_of_the_vocabulary(ranks, world, dtype):
    x = inputs()
    leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
    student, teacher = leaves[0] @ leaves[1].t(), x["taught"] @ x["layer"].t()
    loss = (x["weights"] * rows(student, teacher, x["weights"] != 0, Sinkhorn())).sum()
    want = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    bound = {torch.float32: 1e-5, torch.float64: 1e-11}[dtype]
    for found in ranks.run(one_pass, world, dtype):
        for mine, exact in zip(found, want, strict=True):
            assert (mine.double() - exact).norm() <= bound * exact.norm()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return layouts.checkpoints(tmp_path_factory.mktemp("hf"), tied=True)


def update(paths, layout):
    layout = Layout(*layout)
    grid, student, teacher = layouts.build(paths, layout, loss="sinkd", temperature=2.0)
    found = student.update(layouts.batch(0, grid, layout, student), teacher)
    return found["loss"], found["grad_norm"], found["distill"], found["entropy"]


def test_a_step_on_tensor_parallel_ranks(ranks, paths):
    """Chunks of 7 tokens, as layouts.build has it; the micro-batches are the same."""
    (want,) = ranks.run(update, 1, paths, SINGLE)
    for found in ranks.run(update, 2, paths, LAYOUTS["tp2"]):
        assert found == pytest.approx(want, rel=1e-5)
    assert want[0] == pytest.approx(want[2], rel=1e-5)  # equal weights: the mean over tokens
