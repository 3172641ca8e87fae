"""A target whose label share falls over the steps (PS-KD) against dense autograd in fp64."""

import math

import pytest

from tests.dist import layouts
from tests.dist.layouts import LAYOUTS, SINGLE, Layout

PSKD = {
    "loss": "fkl", "target": "one_hot", "target_weight": 0.8, "target_steps": 4,
    "loss_agg": "seq-mean-token-mean",
}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return layouts.checkpoints(tmp_path_factory.mktemp("hf"), tied=True)


def ours(paths, layout, step):
    layout = Layout(*layout)
    grid, student, teacher = layouts.build(paths, layout, **PSKD)
    return student.update(layouts.batch(step, grid, layout, student), teacher, step=step)


def dense(paths, step):
    """(loss, gradient norm): CE to a onehot + (1 - a) past, less the target's entropy."""
    import torch
    import transformers

    student, past = (
        transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in paths
    )
    share, losses = 0.8 * (step + 1) / 4, []
    for sample in layouts.samples(step):
        ids = torch.tensor([sample.tokens])
        at = slice(len(sample.prompt.token_ids) - 1, -1)
        law = student(ids).logits[0, at].log_softmax(-1)
        with torch.no_grad():
            target = share * past(ids).logits[0, at].softmax(-1)
        labels = torch.tensor(sample.response_ids)[:, None]
        target.scatter_add_(1, labels, torch.full_like(labels, 1 - share, dtype=target.dtype))
        losses.append((target * (target.log() - law)).sum(1).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in student.parameters()))
    return float(loss), norm


@pytest.mark.parametrize("step", [0, 3])
def test_the_past_selfs_share_rises(ranks, paths, step):
    ((loss, norm),) = ranks.run(dense, 1, paths, step)
    for layout in (SINGLE, LAYOUTS["tp2"]):
        found, *others = ranks.run(ours, layout.world, paths, layout, step)
        assert all(found == other for other in others)
        assert found["target_weight"] == pytest.approx(0.8 * (step + 1) / 4)
        off = abs(found["loss"] / loss - 1), abs(found["grad_norm"] / norm - 1)
        print(f"{layout}: loss {off[0]:.1e}, gradient norm {off[1]:.1e}")
        assert off[0] < 2e-5 and off[1] < 2e-5, (layout, off)
