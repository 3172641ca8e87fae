"""The training trajectory is the same under every layout, and a planted fault is noticed.

Losses alone would not tell: a wrong gradient shows in the gradient norm at once and in the loss a
step later. Clipping is active, micro-batches hold unequal numbers of tokens, teacher and student
differ in width and depth.
"""

from itertools import product

import pytest

from tests.dist import layouts
from tests.dist.layouts import LAYOUTS, SINGLE, differences, trajectory
from tests.often import often


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {tied: layouts.checkpoints(root, tied) for tied in (False, True)}


@pytest.fixture(scope="module")
def reference(ranks, checkpoints):
    made = {}

    def get(tied, **values):
        key = (tied, *values.items())
        if key not in made:
            (made[key],) = ranks.run(trajectory, 1, checkpoints[tied], SINGLE, **values)
        return made[key]

    return get


OFTEN = [
    ("dp2-zero1", False),
    ("tp2-pp2-sp-zero1", True),
    ("cp2-tp2-sp", False),
    ("pp2-vpp2-tp2-sp", True),
    ("packed", True),
    ("packed-cp2-pp2", False),
]


@pytest.mark.parametrize(("name", "tied"), often(product(LAYOUTS, [False, True]), OFTEN))
def test_same_trajectory_under_every_layout(ranks, checkpoints, reference, name, tied):
    layout = LAYOUTS[name]
    per_rank = ranks.run(trajectory, layout[0], checkpoints[tied], layout)
    assert all(r[0] == per_rank[0][0] for r in per_rank), "ranks report different metrics"
    loss, norm, size = differences(reference(tied), per_rank[0])
    print(f"{name} tied={tied}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= 2e-6 and norm <= 1e-5 and size <= 1e-5, (loss, norm, size)


OBJECTIVE_LAYOUTS = ["tp2-pp2-sp-zero1", "packed-cp2-tp2-sp", "packed-pp2-vpp2-dp2"]


@pytest.mark.parametrize("name", often(OBJECTIVE_LAYOUTS, OBJECTIVE_LAYOUTS[:1]))
@pytest.mark.parametrize(
    "values",
    [
        {"loss": "fkl"},
        {"loss": "sft"},
        {"loss_agg": "seq-mean-token-mean"},
        {"support": "student_topk", "k": 8, "entropy_coef": 0.1},
        {"loss": "k2", "stats_k": 8, "tis": "mask"},
        {"loss": "k2", "tis": "seq", "loss_agg": "seq-mean-token-mean"},
        layouts.MIXED,
        {"loss": "rapo", "rl": "trrd", "weigh": "pass_rate", "loss_agg": "seq-mean-token-mean"},
        {"target": "geometric", "target_weight": 1.25, "second_loss": "fkl", "second_from": 2},
    ],
    ids=str,
)
def test_same_trajectory_of_other_objectives(ranks, checkpoints, reference, values, name):
    layout = LAYOUTS[name]
    per_rank = ranks.run(trajectory, 4, checkpoints[True], layout, **values)
    assert all(r[0] == per_rank[0][0] for r in per_rank), "ranks report different metrics"
    single = reference(True, **values)
    found = differences(single, per_rank[0])
    # Few tokens hold most of the weight, and each weight is an exponential of a rounded log-prob.
    # Advantages cancel: the loss is a small difference of its families.
    loose = 20 if "tis" in values or "only" in values else 1
    assert found[0] <= 2e-6 * loose and found[1] <= 1e-5 * loose and found[2] <= 1e-5, found
    more = [[step[2:] for step in curve] for curve, _ in (single, per_rank[0])]
    lists = 5 if {"k", "stats_k"} & values.keys() else 0
    assert len(more[0][0]) == lists + (2 if "tis" in values else 0)
    assert more[0] == [pytest.approx(step, rel=1e-5 * loose) for step in more[1]]
    if values.get("tis") == "mask":
        assert all(0.1 < clipped < 0.9 for *_, clipped in more[0]), "nothing is dropped"


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("sequence-parallel norm", "tp2-sp"),
        ("tied embedding", "pp2"),
        ("data-parallel scale", "dp2-zero1"),
        ("data-parallel scale", "cp2"),
        ("key gradients not summed", "cp2"),
        ("positions not zigzag", "cp2"),
        ("positions not zigzag", "packed-cp2"),
        ("packed sequences see each other", "packed"),
        ("every chunk the first", "pp2-vpp2"),
    ],
)
def test_a_planted_fault_is_noticed(ranks, checkpoints, reference, fault, name):
    layout = LAYOUTS[name]
    per_rank = ranks.run(trajectory, layout.world, checkpoints[True], layout, fault=fault)
    _, norm, _ = differences(reference(True), per_rank[0])
    print(f"{fault}: gradient norm off by {norm:.1e}")
    assert norm > 1e-3, f"{fault}: gradient norm off by {norm} only"


def test_the_trajectory_moves(reference):
    """Clipping is active and the objective falls: the comparison above is not of constants."""
    curve, _ = reference(True)
    assert all(norm > 0.5 for _, norm, *_ in curve)
    assert curve[-1][0] != curve[0][0]
