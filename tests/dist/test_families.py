"""Every family agrees with transformers, both ways: logits, gradients, gradient norm, round trip.

The default suite runs each family on one rank and each kind of layout on the family that has most
to lose there; the whole table is marked slow (tools/family_table.py writes it down).
"""

import pytest

from tests.dist.families import CASES, LAYOUTS, Layout, measure

# What a layout can break: biases, soft-caps, (1 + w) norms behind row-parallel layers, two rotary
# embeddings, experts and multi-latent attention.
SPLIT = ["llama, biases, yarn", "gemma2", "gemma3", "qwen3_moe", "deepseek_v3"]
SPARSE = ["mixtral, window", "deepseek_v3"]
DEFAULT = [(Layout(), list(CASES)), (Layout(2, 2), SPLIT), (Layout(2, expert=2), SPARSE)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: case.save(root, name) for name, case in CASES.items()}


def check(ranks, checkpoints, layout, names):
    paths = [checkpoints[name] for name in names]
    per_rank = ranks.run(measure, layout.world, paths, layout, timeout=600)
    for name, *measured in zip(names, *per_rank, strict=True):
        logits, gradient, norm = (
            max(getattr(one, what) for one in measured)
            for what in ("logits", "gradient", "grad_norm")
        )
        print(f"{layout}, {name}: logits {logits:.1e}, gradient {gradient:.1e}, norm {norm:.1e}")
        assert logits < 1e-4, (name, logits)
        assert gradient < 1e-4, (name, gradient)
        assert norm < 1e-5, (name, norm)
        assert all(one.changed == [] and one.to_rank_0 == [] for one in measured), (name, measured)


@pytest.mark.parametrize(("layout", "names"), DEFAULT, ids=[str(one[0]) for one in DEFAULT])
def test_some_families(ranks, checkpoints, layout, names):
    check(ranks, checkpoints, layout, names)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_families(ranks, checkpoints, layout):
    names = [name for name, case in CASES.items() if case.expert or layout.expert == 1]
    check(ranks, checkpoints, layout, names)
