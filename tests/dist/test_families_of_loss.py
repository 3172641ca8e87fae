"""An objective with every loss family against dense autograd in fp64: loss and gradient norm."""

import math

import pytest

from tests.dist import layouts
from tests.dist.layouts import MIXED, SINGLE


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return layouts.checkpoints(tmp_path_factory.mktemp("hf"), tied=True)


def ours(paths, step):
    """Metrics of one update on one rank, with the gradient norm of each term."""
    grid, student, teacher = layouts.build(paths, SINGLE, **MIXED)
    parts = [layouts.batch(step, grid, SINGLE, student)]
    return student.updates(parts, teacher, step=step, term_norms=True)


def dense(paths, step):
    """(loss, gradient norm, means, norms) of MIXED, written down family by family."""
    import torch
    import transformers

    from megaopd.objectives.spec import ObjectiveConfig

    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in paths
    )
    objective = ObjectiveConfig(**MIXED)
    samples = layouts.told(layouts.samples(step), objective)
    families = {name: [] for name in ("distill", "rl", "sft", "replay", "entropy")}
    for sample in samples:
        ids = torch.tensor([sample.tokens])
        rows = slice(len(sample.prompt.token_ids) - 1, -1)
        law = student(ids).logits[0, rows].log_softmax(-1)
        with torch.no_grad():
            taught = teacher(ids).logits[0, rows].log_softmax(-1)
        labels = torch.tensor(sample.response_ids)[:, None]
        log_p, log_q = law.gather(1, labels)[:, 0], taught.gather(1, labels)[:, 0]
        if sample.kind == "sft":
            families["sft"].append(-log_p)
        elif sample.kind == "replay":
            u = (log_p - log_q).exp()
            families["replay"].append(u * u.log() - (u + 1) * ((u + 1) / 2).log())
        else:
            families["entropy"].append(-(law.exp() * law).sum(1))
            families["rl"].append(-sample.advantage * (log_p - log_p.detach()).exp())
            if sample.reward < 1:
                families["distill"].append((log_p - log_q).square() / 2)
    share = min(step / 3, 1.0)
    coefs = {"distill": 0.5 + share * (0.1 - 0.5), "rl": 1.0, "sft": 0.3, "replay": 0.2}
    coefs["entropy"] = -0.1
    means = {name: torch.cat(rows).mean() for name, rows in families.items()}
    losses = {name: coefs[name] * mean for name, mean in means.items()}

    def norm_of(loss):
        student.zero_grad()
        loss.backward(retain_graph=True)
        return math.sqrt(sum(float(p.grad.square().sum()) for p in student.parameters()))

    norms = {name: norm_of(one) for name, one in losses.items()}
    loss = sum(losses.values())
    return float(loss), norm_of(loss), {n: float(m) for n, m in means.items()}, norms


@pytest.mark.parametrize("step", [0, 2])
def test_every_family_has_its_own_denominator(ranks, paths, step):
    (found,) = ranks.run(ours, 1, paths, step)
    ((loss, norm, means, norms),) = ranks.run(dense, 1, paths, step)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert found["nll"] == pytest.approx(means["sft"], rel=1e-5)
    assert found["distill"] == pytest.approx(means["distill"], rel=1e-5)
    assert found["entropy"] == pytest.approx(means["entropy"], rel=1e-5)
    assert found["replay"] == pytest.approx(means["replay"], rel=1e-5)
    for name, one in norms.items():
        assert found[f"grad_norm/{name}"] == pytest.approx(one, rel=1e-5), name
