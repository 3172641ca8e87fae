"""Experts on several ranks: checkpoints for any layout, training that does not depend on it."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from tests.dist.families import CASES, Case, Layout, backward, changes
from tests.dist.models import tokens

FAMILIES = ("qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    return {name: CASES[name].save(root, name) for name in FAMILIES}


def grid_of(layout):
    from megaopd.parallel import ParallelConfig, make_grid

    return make_grid(
        ParallelConfig(
            layout.tensor, layout.pipeline, expert=layout.expert, sequence=layout.tensor > 1
        )
    )


def may_have_children():
    """megatron-core writes checkpoints in processes of its own; the pool's ranks are daemons."""
    multiprocessing.current_process()._config["daemon"] = False


def write(paths, out, layout):
    from megaopd.models.config import ModelConfig
    from megaopd.models.convert import hf_to_megatron

    may_have_children()
    grid = grid_of(layout)
    for path, name in zip(paths, FAMILIES, strict=True):
        hf_to_megatron(ModelConfig(path=path), Path(out, name), grid)


def back(out, layout):
    from megaopd.models.config import ModelConfig
    from megaopd.models.convert import megatron_to_hf

    grid = grid_of(layout)
    for name in FAMILIES:
        megatron_to_hf(ModelConfig(path=str(Path(out, name))), Path(out, f"hf-{name}"), grid)


def test_a_megatron_checkpoint_is_read_under_another_layout(ranks, checkpoints, tmp_path):
    from megaopd.models.weights import HfReader

    ranks.run(write, 4, list(checkpoints.values()), str(tmp_path), Layout(2, 2, expert=2))
    ranks.run(back, 2, str(tmp_path), Layout(expert=2))
    for name, path in checkpoints.items():
        readers = HfReader(tmp_path / f"hf-{name}"), HfReader(path)
        got, wanted = ({n: r.read(n, None, 0, 0, 0) for n in r.files} for r in readers)
        assert changes(got, wanted) == [], name


def train(path, folder, layout, steps, *, resume):
    """(gradient norms, weights) of a few steps; the state is saved, or read, at the start."""
    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.config import ModelConfig
    from megaopd.models.sharded import load_sharded, save_sharded
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.student import Student

    grid = grid_of(layout)
    arch = architecture(read_hf_config(path))
    optim = OptimConfig(lr=1e-2, eps=1e-5)
    student = Student(ModelConfig(path=path), arch, grid, ObjectiveConfig(loss="sft"), optim)
    norms = []

    def step(seed):
        ids = tokens(4, seed=seed)
        student.optimizer.zero_grad()
        backward(student.ddp, student.model, arch, grid, ids, ids)
        norms.append(float(student.optimizer.step()[1]))

    if not resume:
        may_have_children()
        step(1)
        step(2)
    state = student.sharded_state(loading=resume)
    state = {part: state[part] for part in ("model", "optimizer")}
    if resume:
        state = load_sharded(state, Path(folder))
        student.model.load_state_dict(state["model"])
        student.optimizer.load_state_dict(state["optimizer"])
    else:
        save_sharded(state, Path(folder), info={})
    for seed in range(3, 3 + steps):
        step(seed)
    return norms[-steps:], {name: t.clone() for name, t in student.weights()}


def test_training_goes_on_under_another_layout(ranks, checkpoints, tmp_path):
    """Adam's state of the experts is kept, and the curve is that of one rank."""
    path, folder = checkpoints["deepseek_v3"], tmp_path / "state"
    first = Layout(2, expert=2)
    (norms, weights), *_ = ranks.run(train, 2, path, str(folder), first, 2, resume=False)
    for layout in (first, Layout(expert=2, data=2), Layout()):
        found = ranks.run(train, layout.world, path, str(folder), layout, 2, resume=True)
        again, changed = found[0]
        assert again == pytest.approx(norms, rel=1e-4), str(layout)
        worst = max(float((changed[n] - weights[n]).abs().max()) for n in weights)
        assert worst < 1e-4, (str(layout), worst)
    assert torch.equal(
        weights["model.layers.1.mlp.gate.e_score_correction_bias"],
        changed["model.layers.1.mlp.gate.e_score_correction_bias"],
    )


def stream_peak(path, layout):
    """(peak bytes of a stream to rank 0, bytes of its largest tensor) on this rank."""
    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.build import build_model
    from megaopd.models.config import ModelConfig
    from megaopd.models.weights import WeightStream, load_hf_weights
    from tools.bench.measure import LiveBytes

    grid = grid_of(layout)
    arch = architecture(read_hf_config(path))
    model = build_model(arch, ModelConfig(path=path), grid)
    load_hf_weights(model, path, arch, grid)
    weights = WeightStream(model, arch, grid, only_rank_0=True)
    largest = max(torch.Size(shape).numel() * 4 for _, shape in weights.described())
    with LiveBytes() as live:
        for _, full in weights:
            del full
    return live.peak, largest


WIDE = [Layout(1, 2, expert=2, data=2), Layout(2, 2, expert=2)]


@pytest.mark.parametrize("layout", WIDE, ids=str)
def test_a_stream_holds_one_parameter_of_the_experts_at_a_time(ranks, tmp_path, layout):
    """Gate and up of an expert are one parameter of two tensors: rank 0 holds it and those, the
    first rank of the other stage it alone, the others nothing.
    """
    wide = {**CASES["qwen3_moe"].changes, "num_experts": 8, "moe_intermediate_size": 1024}
    path = Case("Qwen3MoeConfig", {**wide, "hidden_size": 256}).save(tmp_path, "wide")
    per_rank = ranks.run(stream_peak, 4, path, layout)
    for (peak, largest), holds in zip(per_rank, (4, 0, 2, 0), strict=True):
        assert peak <= holds * largest + 1e5, per_rank
