"""Several optimizer steps per rollout: the same under every layout, ratios to the old weights."""

from dataclasses import replace

import pytest

from tests.dist import layouts
from tests.dist.layouts import LAYOUTS, SINGLE, Layout, differences
from tests.often import often

SMALLER = ("tp2-sp", "dp2-zero1", "packed-cp2-tp2-sp")
RATIO = {"loss": "k2", "rl": "ppo"}
# At the 1e-2 of other tests ratios are exponentials of large numbers, and rounding shows.
LR = 2e-3
VALUES = [
    RATIO,
    layouts.MIXED,
    {"loss": "none", "rl": "ppo", "tis": "token"},
    {"loss": "rkl", "support": "student_topk", "k": 8, "variant": "sampled_tail"},
    {"loss": "fkl"},
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return layouts.checkpoints(tmp_path_factory.mktemp("hf"), True)


def parts_of(step, grid, layout, student, count):
    """Micro-batches of every part of a step's samples."""
    from megaopd.trainer.batch import make_micro_batches, mini_batches_of

    objective = student.objectives
    made = layouts.samples(step, 8)
    if objective.needs_rewards:
        made = layouts.told(made, objective)
    return [
        make_micro_batches(
            part,
            grid=grid,
            micro_batch_size=1 if layout.tokens else layout.samples,
            micro_batch_tokens=layout.tokens,
            pad_id=0,
            loss_agg=objective.loss_agg,
        )
        for part in mini_batches_of(made, count)
    ]


def trajectory(paths, layout, count, epochs, **values):
    """[(loss, gradient norm, what is known of ratios)] of three steps, the size of every weight."""
    layout = Layout(*layout)
    grid, student, teacher = layouts.build(paths, layout, 3, **values)
    curve, told = [], []
    for step in range(3):
        found = student.updates(
            parts_of(step, grid, layout, student, count), teacher, step=step, epochs=epochs
        )
        curve.append((found["loss"], found["grad_norm"]))
        told.append({k: v for k, v in found.items() if k.startswith(("ratio/", "updates", "lr"))})
    weights = {n: float(t.double().abs().sum()) for n, t in student.weights()}
    return curve, weights, told


@pytest.fixture(scope="module")
def single(ranks, checkpoints):
    made = {}

    def get(values):
        if str(values) not in made:
            (found,) = ranks.run(trajectory, 1, checkpoints, SINGLE, 2, 2, lr=LR, **values)
            made[str(values)] = found
        return made[str(values)]

    return get


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(("tp2-dp2-sp-zero1", values) for values in VALUES),
        *often([(name, RATIO) for name in SMALLER], [(SMALLER[-1], RATIO)]),
    ],
    ids=str,
)
def test_the_same_under_every_layout(ranks, checkpoints, single, name, values):
    layout = LAYOUTS[name]
    per_rank = ranks.run(trajectory, layout.world, checkpoints, layout, 2, 2, lr=LR, **values)
    assert all(one == per_rank[0] for one in per_rank), "ranks disagree"
    single = single(values)
    loss, norm, size = differences(single[:2], per_rank[0][:2])
    # Losses are small differences of advantages, and ratios exponentials of rounded log-probs.
    loose = 1 if values.get("loss") == "fkl" else 20
    assert norm <= 1e-5 * loose and size <= 1e-5 * loose, (loss, norm, size)
    for a, b in zip(single[0], per_rank[0][0], strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-5 * loose, abs=1e-6)
    for a, b in zip(single[2], per_rank[0][2], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


def test_one_and_one_are_an_update_bit_for_bit(ranks, checkpoints):
    whole = {"loss": "k2", "tis": "token"}
    for values in (whole, layouts.MIXED):
        (many,) = ranks.run(trajectory, 1, checkpoints, SINGLE, 1, 1, **values)
        (one,) = ranks.run(layouts.trajectory, 1, checkpoints, SINGLE, steps=3, **values)
        assert many[0] == [step[:2] for step in one[0]] and many[1] == one[1]
        assert all("updates" not in told for told in many[2])


def watched(paths, layout, every, **values):
    """[(loss, gradient norm, norms of the terms)] of three steps, of which every n-th tells."""
    layout = Layout(*layout)
    grid, student, teacher = layouts.build(paths, layout, 3, lr=LR, **values)
    told = []
    for step in range(3):
        parts = parts_of(step, grid, layout, student, 2)
        due = every > 0 and step % every == 0
        found = student.updates(parts, teacher, step=step, term_norms=due)
        norms = {k: v for k, v in found.items() if k.startswith("grad_norm/")}
        told.append((found["loss"], found["grad_norm"], norms))
    return told


def test_norms_of_single_terms(ranks, checkpoints):
    """The same under every layout, and what is measured changes nothing."""
    (plain,) = ranks.run(watched, 1, checkpoints, SINGLE, 0, **layouts.MIXED)
    (single,) = ranks.run(watched, 1, checkpoints, SINGLE, 2, **layouts.MIXED)
    assert [one[:2] for one in plain] == [one[:2] for one in single]
    assert [len(norms) for _, _, norms in single] == [5, 0, 5]
    for name in ("tp2-dp2-sp-zero1", "pp2"):
        layout = LAYOUTS[name]
        plain, told = (
            ranks.run(watched, layout.world, checkpoints, layout, every, **layouts.MIXED)
            for every in (0, 2)
        )
        assert [one[:2] for one in plain[0]] == [one[:2] for one in told[0]]
        for of_rank in told:
            for mine, one in zip(of_rank, single, strict=True):
                assert mine[2] == pytest.approx(one[2], rel=1e-3), name
    (alone,) = ranks.run(watched, 1, checkpoints, SINGLE, 1, loss="fkl")
    assert [norms for _, _, norms in alone] == [{}, {}, {}]  # grad_norm is that of its only term


def by_hand(paths, values):
    """A rollout's optimizer steps, each by a call of its own, with old log-probs taken before."""
    from megaopd.trainer.log_probs import token_log_probs

    grid, student, teacher = layouts.build(paths, SINGLE, 3, **values)
    parts = parts_of(0, grid, SINGLE, student, 2)
    given = {"vocab": student.vocab, "chunk_size": student.objective.chunk_size}
    old = [
        token_log_probs(student.wrapped, student.output_weight, grid, part, **given)
        for part in parts
    ]
    parts = [
        [replace(micro, old_log_probs_T=x) for micro, x in zip(part, rows, strict=True)]
        for part, rows in zip(parts, old, strict=True)
    ]
    made = [student.update(part, teacher) for _ in range(2) for part in parts]
    weights = {n: float(t.double().abs().sum()) for n, t in student.weights()}
    ratios = [(one["ratio/clipped"], one["ratio/k3"]) for one in made]
    return [one["grad_norm"] for one in made], ratios, weights


def steady(paths, values):
    grid, student, teacher = layouts.build(paths, SINGLE, 3, **values)
    found = student.updates(parts_of(0, grid, SINGLE, student, 2), teacher, epochs=2)
    return found, {n: float(t.double().abs().sum()) for n, t in student.weights()}


def test_ratios_are_to_the_weights_that_sampled(ranks, checkpoints):
    """Against single updates whose old log-probs were taken before the first of them."""
    (hand,) = ranks.run(by_hand, 1, checkpoints, RATIO)
    norms, ratios, weights = hand
    (one,) = ranks.run(steady, 1, checkpoints, RATIO)
    found, same = one
    assert same == weights and found["updates"] == 4.0
    assert found["grad_norm"] == pytest.approx(sum(norms) / 4)
    assert ratios[0] == (0.0, pytest.approx(0.0, abs=1e-9))  # nothing has moved
    assert ratios[-1][1] > 1e-4 and max(clipped for clipped, _ in ratios) > 0.02
    assert 0 < found["ratio/clipped"] < 1
