"""Losses on whole sequences under layouts, against dense autograd in fp64: loss, gradient norm."""

import math
from itertools import pairwise

import pytest

from tests.dist import layouts
from tests.dist.layouts import LAYOUTS, SINGLE, Layout

OBJECTIVES = {
    "minillm": {"loss": "rkl", "returns": "mean", "coef": 0.5},
    "rewards": {
        "loss": "k1_reward", "returns": "sum", "coef": 0.05, "rl": "ppo", "advantage": "centred",
        "loss_agg": "seq-mean-token-sum",
    },
    "opsd_grpo": {"loss": "none", "rl": "ppo", "rl_weigh": "teacher", "rl_weigh_clip": 0.4},
    "posterior_fkl": {"loss": "none", "rl": "dpg", "reward_scale": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return layouts.checkpoints(tmp_path_factory.mktemp("hf"), tied=True)


def ours(paths, layout, values):
    layout = Layout(*layout)
    grid, student, teacher = layouts.build(paths, layout, **values)
    return student.update(layouts.batch(0, grid, layout, student), teacher)


def dense(paths, values):
    """(loss, gradient norm, mean return), written down sample by sample."""
    import torch
    import transformers

    from megaopd.objectives.spec import ObjectiveConfig

    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in paths
    )
    objective = ObjectiveConfig(**values)
    samples = layouts.samples(0)
    if objective.needs_rewards:
        samples = layouts.told(samples, objective)
    losses, log_weights, returns = [], [], []
    for sample in samples:
        ids = torch.tensor([sample.tokens])
        at = slice(len(sample.prompt.token_ids) - 1, -1)
        law = student(ids).logits[0, at].log_softmax(-1)
        with torch.no_grad():
            taught = teacher(ids).logits[0, at].log_softmax(-1)
        labels = torch.tensor(sample.response_ids)[:, None]
        log_p, log_q = law.gather(1, labels)[:, 0], taught.gather(1, labels)[:, 0]
        ratio = (log_q - log_p).detach()
        after = [ratio[t + 1 :] for t in range(len(ratio))]
        if objective.rl == "dpg":
            log_weights.append(float(ratio.sum()) + sample.reward / objective.reward_scale)
            losses.append(-log_p)
            continue
        if objective.rl_weigh:
            spread = ratio.std(correction=0)
            z = (ratio - ratio.mean()) / spread if spread > 1e-8 else torch.zeros_like(ratio)
            sign = 1.0 if sample.advantage > 0 else -1.0
            weight = (2 * torch.sigmoid(z * sign)).clamp(0.6, 1.4)
            losses.append(-sample.advantage * weight * (log_p - log_p.detach() + 1.0))
            continue
        if objective.returns == "mean":
            long = torch.stack([x.mean() if len(x) else x.sum() for x in after])
            short = (law.exp() * (law - taught)).sum(1)
        else:
            long = torch.stack([x.sum() for x in after])
            short = -ratio * (log_p - log_p.detach()) - ratio
        once = log_p - log_p.detach() + 1.0  # the ratio to the sampling weights
        returns.append(long)
        loss = objective.coef * (short - long * once)
        losses.append(loss - sample.advantage * once if objective.rl else loss)
    if objective.rl == "dpg":
        groups = torch.tensor(log_weights, dtype=torch.float64).view(-1, 2)
        advantages = (2 * groups.softmax(1) - 1).flatten()
        losses = [a * (x - x.detach() - 1) for a, x in zip(advantages, losses, strict=True)]
    if objective.loss_agg == "token-mean":
        loss = torch.cat(losses).mean()
    else:
        loss = torch.stack([x.sum() for x in losses]).mean()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in student.parameters()))
    return float(loss), norm, float(torch.cat(returns).mean()) if returns else None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_on_sequences(ranks, paths, name):
    values = OBJECTIVES[name]
    ((loss, norm, mean_return),) = ranks.run(dense, 1, paths, values)
    chosen = [SINGLE, *(LAYOUTS[n] for n in ("tp2", "cp2-tp2-sp", "packed-pp2", "dp2-zero1"))]
    for layout in chosen:
        per_rank = ranks.run(ours, layout.world, paths, layout, values)
        assert all(a == b for a, b in pairwise(per_rank))
        found = per_rank[0]
        off = abs(found["loss"] / loss - 1), abs(found["grad_norm"] / norm - 1)
        print(f"{name} {layout}: loss {off[0]:.1e}, gradient norm {off[1]:.1e}")
        assert off[0] < 2e-5 and off[1] < 2e-5, (layout, off)
        if mean_return is not None:
            assert found["return"] == pytest.approx(mean_return, rel=1e-5)
