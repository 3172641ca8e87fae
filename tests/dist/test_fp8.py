"""Emulated FP8 layers in megatron-core's parallel linear layers, in training and in checkpoints."""

import multiprocessing

import pytest
import torch

from tests.dist.layouts import samples
from tests.dist.models import save_tiny
from tests.often import often

# Per tensor rank every dimension is a whole number of 128-blocks, so that blocks do not depend on
# the layout either.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
STEPS = 4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    make = {"tied": False, **WIDE}
    return (
        str(save_tiny(root / "student", "qwen3", **make)),
        str(save_tiny(root / "teacher", "qwen3", seed=11, **make)),
    )


def build(path, grid, **settings):
    """A loaded model."""
    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.build import build_model
    from megaopd.models.config import ModelConfig
    from megaopd.models.weights import load_hf_weights

    arch = architecture(read_hf_config(path))
    model = build_model(arch, ModelConfig(path=path, **settings), grid)
    load_hf_weights(model, path, arch, grid)
    return model


def one_layer(path, tensor, sequence, recipe):
    """Of a column and a row parallel layer: what is known of y, dx, dW and q(W) on this rank."""
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region as gather,
    )

    from megaopd.parallel import ParallelConfig, make_grid

    grid = make_grid(ParallelConfig(tensor, sequence=sequence))
    layer = build(path, grid, fp8=recipe).decoder.layers[1]
    make = torch.Generator().manual_seed(3)
    found = {}
    for name, linear in (("qkv", layer.self_attention.linear_qkv), ("fc2", layer.mlp.linear_fc2)):
        column = name == "qkv"
        rows, columns = linear.output_size, linear.input_size
        x = torch.randn(16, 2, columns, generator=make) * torch.randn(columns, generator=make).exp()
        grad = torch.randn(16, 2, rows, generator=make) * 1e-3
        if not column:
            x = x.chunk(tensor, -1)[grid.tp_rank]
        if sequence:
            x = x.chunk(tensor, 0)[grid.tp_rank] if column else x
            grad = grad if column else grad.chunk(tensor, 0)[grid.tp_rank]
        if column:
            grad = grad.chunk(tensor, -1)[grid.tp_rank]
        x = x.contiguous().requires_grad_()
        y, _ = linear(x)
        y.backward(grad.contiguous())
        with torch.no_grad():
            full_x = gather(x.grad) if sequence and column else x.grad
            full_y = gather(y) if sequence and not column else y
        rounded = linear._forward_impl.__closure__  # the Scaling is in the closure
        scaling = next(c.cell_contents for c in rounded if callable(c.cell_contents))
        weight = scaling("weight", linear.weight.detach(), "both")
        found[name] = {"y": full_y.detach(), "dx": full_x, "dw": linear.weight.grad, "q": weight}
    return found


@pytest.mark.parametrize("sequence", [False, True])
def test_a_layer_does_not_depend_on_tensor_parallelism(ranks, checkpoints, sequence):
    for recipe in ("current", "blockwise"):
        (whole,) = ranks.run(one_layer, 1, checkpoints[0], 1, False, recipe)
        parts = ranks.run(one_layer, 2, checkpoints[0], 2, sequence, recipe)
        # Along which dimension the ranks' parts make the whole; None: each rank has all of it.
        along = {"qkv": {"y": -1, "dx": None, "dw": 0, "q": 0}}
        along["fc2"] = {"y": None, "dx": -1, "dw": 1, "q": 1}
        for name, dims in along.items():
            for what, dim in dims.items():
                pieces = [part[name][what] for part in parts]
                got = pieces[0] if dim is None else torch.cat(pieces, dim)
                want = whole[name][what]
                assert got.shape == want.shape, (name, what)
                error = float((got - want).norm() / want.norm())
                print(f"{recipe} {name} {what}: {error:.1e}")
                assert error < 1e-6, (recipe, name, what, error)
                if what == "q":
                    assert torch.equal(got, want)


def trainer(paths, grid, settings, objective, steps=STEPS):
    """A student and its teacher, both with these FP8 settings (the teacher never delayed)."""
    from megaopd.models.arch import architecture, padded_vocab, read_hf_config
    from megaopd.models.config import LoraConfig, ModelConfig
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.student import Student
    from megaopd.trainer.teacher import Teacher

    arch = architecture(read_hf_config(paths[0]))
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.5, eps=1e-5)
    lora = LoraConfig(rank=settings.get("rank", 0))
    settings = {k: v for k, v in settings.items() if k != "rank"}
    config = ModelConfig(path=paths[0], **settings)
    student = Student(config, arch, grid, objective, optim, total_steps=steps, lora=lora)
    settings = {**settings, "fp8": "current"} if settings["fp8"] == "delayed" else settings
    settings = {k: v for k, v in settings.items() if k != "fp8_history"}
    rows = padded_vocab(arch.vocab, grid.tp_size, 8)
    config = ModelConfig(path=paths[1], **settings)
    return student, Teacher(config, architecture(read_hf_config(paths[1])), grid, vocab_rows=rows)


def batch_of(step, grid, objective):
    from megaopd.trainer.batch import make_micro_batches

    return make_micro_batches(
        samples(step), grid=grid, micro_batch_size=2, pad_id=0, loss_agg=objective.loss_agg
    )


def scales(student):
    """Every delayed scale and history of this stage, by layer."""
    updates = getattr(student.model, "fp8_updates", None)
    return [s.state() for s in updates.scalings] if updates else []


def trajectory(paths, layout, settings, *, look=False, stop=0, directory=""):
    """[(loss, grad_norm)] of the steps, and the scales at the end.

    look: score the batch between the steps, without gradients. stop: save after so many steps to
    `directory`; where `directory` is given without it, go on from there.
    """
    from pathlib import Path

    from megaopd.models.sharded import load_sharded, save_sharded
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import ParallelConfig, make_grid

    tensor, pipeline, sequence = layout
    grid = make_grid(ParallelConfig(tensor, pipeline, sequence=sequence))
    objective = ObjectiveConfig(chunk_size=7)
    student, teacher = trainer(paths, grid, settings, objective)
    curve, first = [], 0
    if directory and not stop:
        state = student.sharded_state(loading=True)
        if grid.world_size > 1:
            del state["rng"]  # as Checkpoints.load does under another layout
        student.load_sharded_state(load_sharded(state, Path(directory)))
        first = 2
    for step in range(first, stop or STEPS):
        metrics = student.update(batch_of(step, grid, objective), teacher)
        curve.append((metrics["loss"], metrics["grad_norm"]))
        if look:
            before = scales(student)
            student.score(batch_of(step + 50, grid, objective), teacher)
            student.log_probs([3, 1, 4, 1, 5])
            assert_same(before, scales(student))
    if stop:
        # The pool's ranks are daemons, and dist_checkpointing writes from a child process.
        multiprocessing.current_process()._config["daemon"] = False
        save_sharded(student.sharded_state(loading=False), Path(directory), info={"step": stop})
    return curve, scales(student)


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def difference(one, other):
    """Largest relative difference of loss and gradient norm over the steps."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a / b - 1) for a, b in pairs)


RECIPES = {
    "current": {"fp8": "current"},
    "blockwise": {"fp8": "blockwise"},
    "delayed": {"fp8": "delayed", "fp8_history": 8},
}


PP2 = ((1, 2, False), 1, 1e-5)


@pytest.mark.parametrize("recipe", often(RECIPES, ["blockwise"]))
def test_the_trajectory_under_every_layout(ranks, checkpoints, recipe):
    """Pipeline stages do the same sums, tensor ranks sum in another order.

    That carries single numbers over the edge between two FP8 numbers (a step of 6%). The first step
    tells; then the weights differ by rounding, and runs of this random model drift apart.
    """
    settings = RECIPES[recipe]
    ((want, _),) = ranks.run(trajectory, 1, checkpoints, (1, 1, False), settings)
    ((plain, _),) = ranks.run(trajectory, 1, checkpoints, (1, 1, False), {"fp8": "none"})
    off = difference(want[:1], plain[:1])
    for layout, steps, bound in (((2, 1, False), 1, 4e-3), ((2, 1, True), 1, 4e-3), PP2):
        for curve, _ in ranks.run(trajectory, 2, checkpoints, layout, settings):
            error = difference(curve[:steps], want[:steps])
            print(f"{recipe} {layout}: {error:.1e} in {steps} steps (without FP8: {off:.1e})")
            assert error < bound < off
            each = [difference([a], [b]) for a, b in zip(curve, want, strict=True)]
            print("by step:", " ".join(f"{one:.1e}" for one in each))
            assert max(each) < 0.5


def test_a_pass_without_gradients_changes_nothing(ranks, checkpoints):
    settings = RECIPES["delayed"]
    ((curve, end),) = ranks.run(trajectory, 1, checkpoints, (1, 1, False), settings)
    ((looked, again),) = ranks.run(trajectory, 1, checkpoints, (1, 1, False), settings, look=True)
    assert curve == looked
    assert_same(end, again)


def test_full_recompute_changes_nothing(ranks, checkpoints):
    for recipe, settings in RECIPES.items():
        again = {**settings, "recompute": "full"}
        ((curve, _),) = ranks.run(trajectory, 1, checkpoints, (1, 1, False), settings)
        ((recomputed, _),) = ranks.run(trajectory, 1, checkpoints, (1, 1, False), again)
        assert curve == recomputed, recipe


def test_a_run_goes_on_with_its_scales(ranks, checkpoints, tmp_path):
    settings, one = RECIPES["delayed"], (1, 1, False)
    ((curve, end),) = ranks.run(trajectory, 1, checkpoints, one, settings)
    saved = str(tmp_path / "saved")
    ((_, middle),) = ranks.run(trajectory, 1, checkpoints, one, settings, stop=2, directory=saved)
    assert all(float(state["scale_input"]) != 1 for state in middle)
    ((rest, again),) = ranks.run(trajectory, 1, checkpoints, one, settings, directory=saved)
    assert rest == curve[2:]
    assert_same(end, again)
    # With adapters, whose checkpoints hold nothing else of the layers under them.
    adapted, saved_too = {**settings, "rank": 4}, str(tmp_path / "adapted")
    ((whole, end),) = ranks.run(trajectory, 1, checkpoints, one, adapted)
    ranks.run(trajectory, 1, checkpoints, one, adapted, stop=2, directory=saved_too)
    ((rest, again),) = ranks.run(trajectory, 1, checkpoints, one, adapted, directory=saved_too)
    assert rest == whole[2:]
    assert_same(end, again)
    # Under other layouts: the scales are those of the layers that each stage holds.
    for layout in ((2, 1, True), (1, 2, False)):
        for rest, _ in ranks.run(trajectory, 2, checkpoints, layout, settings, directory=saved):
            assert difference(rest[:1], curve[2:3]) < 1e-2
    # A run without FP8 leaves them out, and one with it begins anew where there are none.
    ((_, none),) = ranks.run(trajectory, 1, checkpoints, one, {"fp8": "none"}, directory=saved)
    assert none == []
    plain = str(tmp_path / "plain")
    ranks.run(trajectory, 1, checkpoints, one, {"fp8": "none"}, stop=2, directory=plain)
    ((rest, _),) = ranks.run(trajectory, 1, checkpoints, one, settings, directory=plain)
    assert len(rest) == 2


def refused(path, settings, tensor=1):
    """The message with which a model is refused."""
    from megaopd.errors import UserError
    from megaopd.parallel import ParallelConfig, make_grid

    try:
        build(path, make_grid(ParallelConfig(tensor)), **settings)
    except UserError as err:
        return str(err)
    return ""


def kept_out(path):
    """Numbers of the layers that are FP8, of four, with the first and last kept out."""
    from megaopd.parallel import ParallelConfig, make_grid

    model = build(path, make_grid(ParallelConfig()), fp8="blockwise", fp8_first_last_bf16=1)
    marked = [
        (layer.layer_number - 1, name)
        for layer in model.decoder.layers
        for name, module in layer.named_modules()
        if "_forward_impl" in vars(module)
    ]
    assert "_forward_impl" not in vars(model.output_layer)
    return marked


def test_which_layers_and_what_is_refused(ranks, checkpoints, tmp_path):
    student = checkpoints[0]
    (marked,) = ranks.run(kept_out, 1, student)
    linears = ["self_attention.linear_proj", "self_attention.linear_qkv"]
    linears += ["mlp.linear_fc1", "mlp.linear_fc2"]
    assert sorted(marked) == sorted((number, name) for number in (1, 2) for name in linears)
    narrow = str(save_tiny(tmp_path, "llama", tied=True, intermediate_size=40))
    for path, settings, said in (
        (student, {"fp8": "mxfp8"}, "fp8 = mxfp8 without a GPU"),
        (student, {"fp8": "current", "fp8_params": True}, "fp8_params = true without a GPU"),
        (student, {"fp8": "current", "fp8_first_last_bf16": 2}, "fp8_first_last_bf16 = 2"),
        (narrow, {"fp8": "current"}, "mlp.linear_fc2.weight is (64, 40)"),
    ):
        (message,) = ranks.run(refused, 1, path, settings)
        assert said in message, message
