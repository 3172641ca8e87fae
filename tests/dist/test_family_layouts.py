"""Families with windows, soft-caps, latent attention and experts under packed and split layouts."""

import pytest

from tests.dist.families import CASES
from tests.dist.layouts import EXPERT_LAYOUTS, LAYOUTS, SINGLE, Layout, differences, trajectory
from tests.dist.test_layouts import chain
from tests.often import often

STEPS = 3
FAMILIES = ["gemma2", "gemma3", "mistral, window", "deepseek_v3", "qwen3_moe"]
EXPERTS = "qwen3_moe"
# Adam makes rounding grow: 1.2e-5 after three steps on one machine, 2.6e-7 at the first step.
LATER_NORMS = {("deepseek_v3", LAYOUTS["packed-cp2-pp2"]): 2e-5}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: (CASES[name].save(root, f"m{i}"), "") for i, name in enumerate(FAMILIES)}


@pytest.fixture(scope="module")
def reference(ranks, paths):
    made = {}

    def get(name):
        if name not in made:
            (made[name],) = ranks.run(trajectory, 1, paths[name], SINGLE, steps=STEPS, loss="sft")
        return made[name]

    return get


def check(ranks, paths, single, name, layout):
    per_rank = ranks.run(trajectory, layout.world, paths[name], layout, steps=STEPS, loss="sft")
    assert all(r[0] == per_rank[0][0] for r in per_rank), "ranks report different metrics"
    loss, norm, size = differences(single, per_rank[0])
    first = abs(per_rank[0][0][0][1] / single[0][0][1] - 1)
    print(
        f"{name} {layout}: loss {loss:.1e}, gradient norm {norm:.1e}, at the first step {first:.1e}"
    )
    assert first <= 2e-6 and loss <= 2e-6 and size <= 1e-5, (first, loss, size)
    assert norm <= LATER_NORMS.get((name, layout), 1e-5), norm


@pytest.mark.parametrize(
    "layout",
    often(["packed", "cp2", "packed-cp2", "pp2-vpp2", "packed-cp2-pp2"], ["packed-cp2-pp2"]),
)
@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_attention_in_packed_and_split_rows(ranks, paths, reference, name, layout):
    check(ranks, paths, reference(name), name, LAYOUTS[layout])


@pytest.mark.parametrize("layout", often(EXPERT_LAYOUTS, ["ep2-tp2-sp", "packed-ep2-cp2-pp2"]))
def test_experts_under_every_layout(ranks, paths, reference, layout):
    check(ranks, paths, reference(EXPERTS), EXPERTS, EXPERT_LAYOUTS[layout])


def test_experts_in_checkpoints_of_any_layout(ranks, paths, tmp_path):
    layouts = [
        Layout(1),
        EXPERT_LAYOUTS["ep2-tp2-sp"],
        EXPERT_LAYOUTS["ep2-pp2-vpp2"],
        EXPERT_LAYOUTS["packed-ep2"],
        Layout(1),
    ]
    chain(ranks, paths[EXPERTS], layouts, tmp_path, loss="sft")
