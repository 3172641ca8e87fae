"""What a layout must not change besides the trajectory: checkpoints, log-probs, evaluation."""

import multiprocessing

import pytest

from tests.dist import layouts
from tests.dist.layouts import LAYOUTS, SINGLE, Layout, trajectory

# Each saves after one step what the next one resumes.
CHAIN = [
    Layout(1),
    LAYOUTS["pp2-vpp2"],
    LAYOUTS["cp2"],
    LAYOUTS["packed-cp2-tp2-sp"],
    LAYOUTS["packed-pp2-vpp2-dp2"],
    Layout(1),
    LAYOUTS["pp2-vpp2-cp2"],
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return layouts.checkpoints(tmp_path_factory.mktemp("hf"), tied=True)


def one_more_step(paths, layout, folder, step, steps, **values):
    """Resume at `step` (0: begin), take one step and save; (loss, gradient norm, learning rate)."""
    from pathlib import Path

    from megaopd.trainer.checkpoint import Checkpoints

    # Ranks of the pool are daemons, which may not have the children that write a checkpoint.
    multiprocessing.current_process()._config["daemon"] = False
    layout = Layout(*layout)
    grid, student, teacher = layouts.build(paths, layout, steps, **values)
    checkpoints = Checkpoints(Path(folder), grid, keep=2)
    if step:
        assert checkpoints.latest_good() == step
        assert checkpoints.load(step, student) == {"step": step, "note": f"after {step}"}
    found = student.update(layouts.batch(step, grid, layout, student), teacher)
    state = {"note": f"after {step + 1}"}
    checkpoints.save(step + 1, student, state, Path(paths[0]))
    return found["loss"], found["grad_norm"], found["lr"]


def chain(ranks, paths, layouts_of_steps, folder, **values):
    """Each step under its layout, out of the checkpoint before: the trajectory of one rank."""
    steps = len(layouts_of_steps)
    ((curve, _),) = ranks.run(trajectory, 1, paths, SINGLE, steps=steps, **values)
    for step, layout in enumerate(layouts_of_steps):
        per_rank = ranks.run(
            one_more_step, layout.world, paths, layout, str(folder), step, steps, **values
        )
        loss, norm, _ = per_rank[0]
        off = abs(loss / curve[step][0] - 1), abs(norm / curve[step][1] - 1)
        print(f"{layout}: loss {off[0]:.1e}, gradient norm {off[1]:.1e}")
        assert off[0] <= 2e-6 and off[1] <= 1e-5, (layout, off)


def test_a_run_goes_on_under_any_other_layout(ranks, paths, tmp_path):
    """Weights, moments and schedule survive every change of layout."""
    chain(ranks, paths, CHAIN, tmp_path)


def scores_of(paths, layout):
    """Log-probs of one sequence, and the objective's metrics without a gradient."""
    layout = Layout(*layout)
    grid, student, teacher = layouts.build(paths, layout)
    ids = [5, 17, 3, 88, 41, 9, 60]
    metrics = student.score(layouts.batch(0, grid, layout, student), teacher)
    return student.log_probs(ids), metrics


@pytest.mark.parametrize(
    "name", ["cp2", "cp2-tp2-sp", "pp2-vpp2", "packed-pp2-vpp2-dp2", "packed-cp2-pp2"]
)
def test_log_probs_and_scores(ranks, paths, name):
    ((want, metrics),) = ranks.run(scores_of, 1, paths, SINGLE)
    layout = LAYOUTS[name]
    for got, found in ranks.run(scores_of, layout.world, paths, layout):
        assert got == pytest.approx(want, abs=1e-5) and len(got) == 6
        assert found == pytest.approx(metrics, rel=1e-5)


def rows_held(paths, layout):
    """(positions of hidden states, rows that the loss takes) of each micro-batch on this rank."""
    layout = Layout(*layout)
    grid, student, _ = layouts.build(paths, layout, loss="sft")
    made = layouts.batch(0, grid, layout, student)
    return [
        (micro.tokens.numel(), micro.select(hidden_like(micro)).shape[0], int(micro.mask_T.sum()))
        for micro in made
    ]


def hidden_like(micro):
    import torch

    rows, positions = micro.tokens.shape
    return torch.zeros(positions, rows, 1)


@pytest.mark.parametrize("name", ["packed", "cp2", "packed-cp2", "packed-dp2"])
def test_the_loss_sees_only_rows_with_a_label(ranks, paths, name):
    """Padding and prompts cost no row of logits, and context parallel ranks share the rows out."""
    layout = LAYOUTS[name]
    per_rank = ranks.run(rows_held, layout.world, paths, layout)
    total = sum(len(s.response_ids) for s in layouts.samples(0))
    assert sum(kept for rank in per_rank for _, kept, _ in rank) == total
    for rank in per_rank:
        assert len(rank) == len(per_rank[0])
        for positions, kept, labels in rank:
            assert kept == labels < positions
    if layout.tokens:
        assert {positions for rank in per_rank for positions, *_ in rank} == {32 // layout.context}
