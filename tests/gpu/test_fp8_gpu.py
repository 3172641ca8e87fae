"""Transformer Engine's FP8 layers: against the emulation, in training, in checkpoints.

Written from Transformer Engine 2.11's sources; the bounds are bf16's rounding of what the kernels
give back, and have not been measured on a GPU yet.
"""

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False", allow_module_level=True)

from megaopd import platform
from tests.dist import test_fp8
from tests.dist.models import save_tiny
from tests.gpu.test_gpu import error
from tests.gpu.test_gpu import grid as grid

pytestmark = pytest.mark.gpu
RECIPES = ["delayed", "current", "blockwise"]
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
ROUNDED = 1e-2  # bf16 keeps 8 bits of what an FP8 product gives; FP8 itself is 3 to 6 times that


def need(recipe):
    if not platform.use_transformer_engine():
        pytest.skip("transformer_engine does not import")
    wanted = (9, 0) if recipe == "blockwise" else (8, 9)
    have = platform.compute_capability()
    if have is None or have < wanted:
        pytest.skip(f"{recipe} needs compute capability {wanted}, this GPU has {have}")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return (
        str(save_tiny(root / "student", "qwen3", tied=False, **SHAPE)),
        str(save_tiny(root / "teacher", "qwen3", tied=False, seed=11, **SHAPE)),
    )


def padded(grid):
    """The same grid with lengths that the kernels take."""
    from dataclasses import replace

    return replace(grid, config=replace(grid.config, pad_multiple=128))


def build(path, grid, **settings):
    return test_fp8.build(path, padded(grid), dtype="bfloat16", **settings).to(platform.device())


@pytest.mark.parametrize("recipe", ["current", "blockwise"])
def test_a_layer_equals_its_emulation(grid, paths, recipe):
    """y, dx and dW of one row parallel layer, from the same bf16 operands."""
    need(recipe)
    from megatron.core.fp8_utils import get_fp8_context

    from megaopd.models.fp8_emulation import BlockScaling, CurrentScaling, linear_forward

    model = build(paths[0], grid, fp8=recipe)
    linear = model.decoder.layers[1].mlp.linear_fc2
    make = torch.Generator().manual_seed(3)
    x = torch.randn(128, 1, 512, generator=make) * torch.randn(512, generator=make).exp()
    grad = torch.randn(128, 1, 256, generator=make) * 1e-3
    x, grad = x.bfloat16(), grad.bfloat16()
    on_gpu = x.to(platform.device()).requires_grad_()
    with get_fp8_context(model.config, 1):
        y, _ = linear(on_gpu)
    y.backward(grad.to(platform.device()))
    scaling = BlockScaling("e4m3") if recipe == "blockwise" else CurrentScaling("e5m2", {})
    on_cpu, weight = x.requires_grad_(), linear.weight.detach().cpu().requires_grad_()
    want = linear_forward(scaling, None)(on_cpu, weight, None, False, False, False, None)
    want.backward(grad)
    plain = x.detach().double() @ weight.detach().double().t()
    assert error(y.detach(), want.detach()) < ROUNDED < error(y.detach(), plain)
    assert error(on_gpu.grad, on_cpu.grad) < ROUNDED
    assert error(linear.weight.grad, weight.grad) < ROUNDED


@pytest.mark.parametrize("params", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_three_steps(grid, paths, recipe, params):
    need(recipe)
    from megaopd.objectives.spec import ObjectiveConfig

    grid, objective = padded(grid), ObjectiveConfig(chunk_size=64)
    settings = {"fp8": recipe, "dtype": "bfloat16", "fp8_params": params}
    student, teacher = test_fp8.trainer(paths, grid, settings, objective)
    batch = test_fp8.batch_of(0, grid, objective)
    done = [student.update(batch, teacher) for _ in range(3)]
    values = [step[name] for step in done for name in ("loss", "grad_norm")]
    assert all(map(math.isfinite, values))
    assert done[2]["loss"] < done[0]["loss"]
    names = {name for name, tensor in student.weights() if tensor.dtype == torch.bfloat16}
    assert "model.layers.0.self_attn.q_proj.weight" in names


def histories(model):
    tensors = [m.get_fp8_meta_tensors() for m in model.modules() if hasattr(m, "fp8_meta")]
    return [t.clone() for one in tensors if one for pair in one.values() for t in pair]


def test_a_pass_without_gradients_leaves_the_history_alone(grid, paths):
    need("delayed")
    from megaopd.objectives.spec import ObjectiveConfig

    grid, objective = padded(grid), ObjectiveConfig(chunk_size=64)
    settings = {"fp8": "delayed", "dtype": "bfloat16"}
    student, teacher = test_fp8.trainer(paths, grid, settings, objective)
    student.update(test_fp8.batch_of(0, grid, objective), teacher)
    before = histories(student.model)
    student.score(test_fp8.batch_of(1, grid, objective), teacher)
    after = histories(student.model)
    assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fp8": "current", "dtype": "float32"}, "fp8 = current with dtype = float32"),
        ({"fp8": "mxfp8", "dtype": "bfloat16"}, "fp8 = mxfp8 on a GPU of compute capability"),
    ],
)
def test_what_this_gpu_cannot_do_is_refused(grid, paths, settings, said):
    need("current")
    from megaopd.errors import UserError

    capability = platform.compute_capability()
    if settings["fp8"] == "mxfp8" and capability is not None and capability >= (10, 0):
        pytest.skip("this GPU runs mxfp8")
    with pytest.raises(UserError, match=said):
        test_fp8.build(paths[0], padded(grid), **settings)


def test_lengths_that_the_kernels_do_not_take_are_refused(grid, paths):
    need("current")
    from megaopd.errors import UserError

    with pytest.raises(UserError, match=r"parallel.pad_multiple = 1"):
        test_fp8.build(paths[0], grid, fp8="current", dtype="bfloat16")


def test_a_checkpoint_of_emulated_layers_loads(ranks, grid, paths, tmp_path):
    """Weights and optimizer state go on; the scales, which are of another kind, begin anew."""
    need("delayed")
    from megaopd.models.sharded import load_sharded
    from megaopd.objectives.spec import ObjectiveConfig

    saved, settings = str(tmp_path / "saved"), {"fp8": "delayed", "dtype": "bfloat16"}
    ranks.run(test_fp8.trajectory, 1, paths, (1, 1, False), settings, stop=2, directory=saved)
    grid, objective = padded(grid), ObjectiveConfig(chunk_size=64)
    student, teacher = test_fp8.trainer(paths, grid, settings, objective)
    state = student.sharded_state(loading=True)
    student.load_sharded_state(load_sharded(state, tmp_path / "saved"))
    metrics = student.update(test_fp8.batch_of(2, grid, objective), teacher)
    assert math.isfinite(metrics["loss"])


def test_parameter_names_of_both_specs(grid, paths):
    """Every parameter of a Transformer Engine layer has its place in the table."""
    need("current")
    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.names import entries, expected_names

    arch = architecture(read_hf_config(paths[0]))
    model = build(paths[0], grid, fp8="current")
    named = {name for entry in entries(model, arch) for name in entry.hf_names}
    assert named == expected_names(arch)
