"""The arithmetic of emulated FP8 layers against torchao's and against plain references."""

import dataclasses

import pytest
import torch
import transformers

from megaopd.errors import UserError
from megaopd.models import fp8
from megaopd.models.config import ModelConfig
from megaopd.models.fp8_emulation import (
    FORMATS,
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    DelayedUpdates,
    Fp8Linear,
    linear_forward,
    round_trip,
    scale_of,
)
from megaopd.parallel import ParallelConfig
from megaopd.trainer.config import TeacherParallelConfig

E4M3, E5M2 = FORMATS["e4m3"], FORMATS["e5m2"]
TOKENS, INPUTS, OUTPUTS = 72, 192, 160  # 192 and 160 are not multiples of 128


def operands(dtype=torch.float32, seed=0):
    """x with outlier channels, W and dy as a training step has them."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make)

    x = normal(TOKENS, INPUTS) * torch.exp(normal(INPUTS))
    grad = normal(TOKENS, OUTPUTS) * 1e-3 * torch.exp(normal(TOKENS, 1))
    return x.to(dtype), (normal(OUTPUTS, INPUTS) * 0.03).to(dtype), grad.to(dtype)


def products(scaling, dtype=torch.float32):
    """y, dx, dW of one emulated layer."""
    x, weight, grad = operands(dtype)
    x.requires_grad_()
    weight.requires_grad_()
    y = linear_forward(scaling, None)(x, weight, None, False, False, False, None)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_current_scaling_equals_torchao_bit_for_bit(dtype):
    pytest.importorskip("torchao", reason="torchao, the oracle of this recipe, is not installed")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    x, weight, grad = operands(dtype)
    plain = torch.nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=dtype)
    plain.weight.data.copy_(weight)
    model = convert_to_float8_training(
        torch.nn.Sequential(plain), config=Float8LinearConfig(emulate=True)
    )
    x.requires_grad_()
    y = model(x)
    y.backward(grad)
    assert type(model[0]).__name__ == "Float8Linear"
    mine = products(CurrentScaling("e5m2", {}), dtype)
    for got, want in zip(mine, (y, x.grad, model[0].weight.grad), strict=True):
        assert torch.equal(got, want)


def plain_blocks(x, along, backward=E4M3):
    """q(x) block by block, with python floats: the reference of BlockScaling."""
    height = 1 if along == "columns" else 128
    width = 1 if along == "rows" else 128
    out = torch.empty_like(x, dtype=torch.float32)
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            block = x[i : i + height, j : j + width].double()
            largest = float(block.abs().max())
            power = 0
            if largest:
                limit = float(torch.finfo(backward).max)
                while largest * 2.0**power > limit:
                    power -= 1
                while largest * 2.0 ** (power + 1) <= limit:
                    power += 1
            rounded = (block * 2.0**power).float().to(backward)
            out[i : i + height, j : j + width] = rounded.float() / 2.0**power
    return out


@pytest.mark.parametrize("backward", ["e4m3", "e5m2"])
def test_blockwise_scaling_equals_a_loop_over_blocks(backward):
    x, weight, grad = operands()
    q = plain_blocks
    dtype = FORMATS[backward]
    want = (
        q(x, "columns") @ q(weight, "both").t(),
        q(grad, "columns", dtype) @ q(weight, "both"),
        q(grad, "rows", dtype).t() @ q(x, "rows"),
    )
    got = products(BlockScaling(backward))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class PlainDelayed:
    """Delayed scaling of one tensor, as Transformer Engine documents it: a list of magnitudes."""

    def __init__(self, length, limit, latest=False, margin=0):
        self.length, self.limit, self.latest, self.margin = length, limit, latest, margin
        self.seen, self.scale, self.now = [], 1.0, 0.0

    def round(self, x, dtype):
        self.now = max(self.now, float(x.abs().max()))
        scaled = (x * torch.tensor(self.scale)).clamp(-self.limit, self.limit)
        return scaled.to(dtype).float() / torch.tensor(self.scale)

    def close(self):
        self.seen.append(self.now)
        amax = self.now if self.latest else max(self.seen[-self.length :])
        self.now = 0.0
        if amax > 0:
            wide = torch.tensor(self.limit, dtype=torch.float64) / amax
            self.scale = float(wide.float() / 2.0**self.margin)


@pytest.mark.parametrize(("latest", "history", "margin"), [(False, 3, 0), (True, 4, 1)])
def test_delayed_scaling_equals_a_list_of_magnitudes(latest, history, margin):
    updates = DelayedUpdates(None)
    mine = DelayedScaling("e5m2", history=history, latest=latest, margin=margin)
    updates.scalings.append(mine)
    limits = {"input": E4M3, "weight": E4M3, "gradient": E5M2}
    plain = {
        role: PlainDelayed(history, torch.finfo(dtype).max, latest, margin)
        for role, dtype in limits.items()
    }
    for step, size in enumerate((1.0, 30.0, 0.5, 0.25, 0.125, 0.25)):
        x, weight, grad = operands(seed=step)
        xq, wq = plain["input"].round(x * size, E4M3), plain["weight"].round(weight, E4M3)
        for role in ("input", "weight"):
            plain[role].close()
        gq = plain["gradient"].round(grad, E5M2)
        plain["gradient"].close()
        x = (x * size).requires_grad_()
        weight.requires_grad_()
        y = run_pass(updates, mine, x, weight)
        y.backward(grad)
        assert torch.equal(y, xq @ wq.t()), step
        assert torch.equal(x.grad, gq @ wq) and torch.equal(weight.grad, gq.t() @ xq), step


def run_pass(updates, scaling, x, weight):
    """One forward pass of a model that is this one layer."""
    updates.enter()
    y = linear_forward(scaling, updates)(x, weight, None, False, False, False, None)
    updates.leave()
    return y


def test_a_pass_without_gradients_leaves_the_history_alone():
    updates = DelayedUpdates(None)
    mine = DelayedScaling("e5m2", history=4, latest=False, margin=0)
    updates.scalings.append(mine)
    x, weight, grad = operands()
    weight.requires_grad_()
    run_pass(updates, mine, x, weight).backward(grad)
    before = mine.state()
    with torch.no_grad():
        loud = run_pass(updates, mine, x * 1000, weight)
    assert loud.abs().max() > 0
    after = mine.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = DelayedScaling("e5m2", history=2, latest=False, margin=0)
    again.load(before)
    assert torch.equal(again.scale["input"], mine.scale["input"])


def test_a_recomputed_layer_is_rounded_as_it_was():
    x, weight, grad = operands()

    def gradients(recompute):
        updates = DelayedUpdates(None)
        mine = DelayedScaling("e5m2", history=4, latest=False, margin=0)
        updates.scalings.append(mine)
        layer, found = linear_forward(mine, updates), []
        for step in range(3):
            a = (x * 2.0**step).requires_grad_()
            w = weight.clone().requires_grad_()

            def run(a, w):
                return layer(a, w, None, False, False, False, None)

            updates.enter()
            if recompute:
                y = torch.utils.checkpoint.checkpoint(run, a, w, use_reentrant=True)
            else:
                y = run(a, w)
            updates.leave()
            y.backward(grad)
            found += [y.detach(), a.grad, w.grad, *mine.state().values()]
        return found

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, want)


def test_scales_and_saturation():
    assert scale_of(torch.tensor([0.0, float("inf")]), E4M3).tolist() == [1.0, 1.0]
    assert float(scale_of(torch.tensor(448.0), E4M3, power_of_two=True)) == 1.0
    assert float(scale_of(torch.tensor(449.0), E4M3, power_of_two=True)) == 0.5
    assert torch.isfinite(scale_of(torch.tensor(1e-44), E5M2))
    one = torch.ones(())
    assert float(round_trip(torch.tensor(1e6), one, E5M2)) == 57344.0
    assert float(round_trip(torch.tensor(-1e3), one, E4M3)) == -448.0


@pytest.mark.parametrize("scaling", [CurrentScaling("e5m2", {}), BlockScaling("e4m3")])
def test_errors_are_of_the_size_of_fp8(scaling):
    x, weight, grad = (t.double() for t in operands())
    want = (x @ weight.t(), grad @ weight, grad.t() @ x)
    for got, exact in zip(products(scaling), want, strict=True):
        error = float((got.double() - exact).norm() / exact.norm())
        assert 0.005 < error < 0.08  # e4m3 rounds to 3 bits of mantissa, e5m2 to 2


def test_an_expert_without_tokens():
    x = torch.zeros(0, 32, requires_grad=True)
    weight = torch.ones(16, 32, requires_grad=True)
    y = Fp8Linear.apply(x, weight, None, CurrentScaling("e5m2", {}), None, False, False, None)
    y.sum().backward()
    assert y.shape == (0, 16) and not weight.grad.any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fp8_margin": 1}, "fp8_margin = 1 with fp8 = none"),
        ({"fp8": "current", "fp8_history": 16}, "fp8_history = 16 with fp8 = current"),
        (
            {"fp8": "delayed", "fp8_first_last_bf16": 1},
            "fp8_first_last_bf16 = 1 with fp8 = delayed",
        ),
        ({"fp8": "blockwise", "fp8_first_last_bf16": -1}, "fp8_first_last_bf16 = -1"),
        ({"fp8": "mxfp8", "fp8_params": True}, "fp8_params = true with fp8 = mxfp8"),
    ],
)
def test_combinations_that_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        ModelConfig(**settings)


def test_formats_by_recipe():
    assert ModelConfig(fp8="current").fp8_backward == "e5m2"
    assert ModelConfig(fp8="blockwise").fp8_backward == "e4m3"
    assert ModelConfig(fp8="blockwise", fp8_format="hybrid").fp8_backward == "e5m2"
    assert ModelConfig(fp8="delayed", fp8_format="e4m3").fp8_backward == "e4m3"
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    assert {"fp8", "fp8_format", "fp8_params"} <= names


def test_names_of_both_layer_specs():
    """Transformer Engine's parameter names are those under which megatron-core's local layers save:
    a distributed checkpoint of one loads into the other."""
    from megaopd import platform

    platform.install()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megaopd.models.arch import architecture
    from megaopd.models.names import TE_TO_LOCAL, layer_table

    config = transformers.Qwen3Config(num_hidden_layers=1, architectures=["Qwen3ForCausalLM"])
    arch = architecture(config.to_dict())

    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    saved_as = spec.submodules.sharded_state_dict_keys_map

    def saved(local):
        for ours, theirs in saved_as.items():
            if local.startswith(ours):
                return theirs + local.removeprefix(ours)
        return local

    dense = {"input_layernorm.weight", "pre_mlp_layernorm.weight"}
    of_te = {local: te for te, local in TE_TO_LOCAL.items()}
    assert dense <= of_te.keys()
    for local in layer_table(arch, 0):
        assert saved(local) == (of_te[local] if local in dense else local), local


def test_scales_of_another_kind_of_layer_begin_anew():
    """What a checkpoint may hold for a layer: nothing, bytes of Transformer Engine, our dict."""
    from megaopd.models.fp8 import _drop_foreign_scales

    class Layer(torch.nn.Module):
        def __init__(self, scaling):
            super().__init__()
            self.scaling = scaling

        def get_extra_state(self):
            return self.scaling.state()

        def set_extra_state(self, state):
            if isinstance(state, dict):
                self.scaling.load(state)

    def make():
        return DelayedScaling("e5m2", history=2, latest=False, margin=0)

    model = torch.nn.Sequential(Layer(make()), Layer(make()))
    model.register_load_state_dict_pre_hook(_drop_foreign_scales)
    used = make()
    used.update("input", torch.tensor(2.0))
    model.load_state_dict({"0._extra_state": used.state(), "1._extra_state": torch.zeros(9)})
    assert float(model[0].scaling.scale["input"]) == 224.0
    assert float(model[1].scaling.scale["input"]) == 1.0
    model.load_state_dict({})  # a checkpoint without any scales is not an error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["teacher.fp8=delayed"], "teacher.fp8 = delayed"),
        (["teacher.fp8=none", "teacher.fp8_margin=2"], "fp8_margin = 2 with fp8 = none"),
        (
            ["student.fp8=current", "student.fp8_params=true", "optim.distributed=false"],
            "fp8_params",
        ),
        (["teacher.path=", "teacher.kind=ema", "student.fp8=delayed"], "teacher.kind = ema"),
    ],
)
def test_runs_that_are_refused(changes, said):
    from megaopd.schema import load_config

    run = ["student.path=s", "teacher.path=t", "data.source=task:addition3"]
    load_config(None, [*run, "student.fp8=delayed", "teacher.fp8=blockwise"])
    with pytest.raises(UserError, match=said):
        load_config(None, [*run, *changes])


def test_a_model_without_its_fp8():
    config = ModelConfig(path="x", fp8="delayed", fp8_history=4, dtype="bfloat16")
    assert config.without_fp8() == ModelConfig(path="x", dtype="bfloat16")


def test_the_padding_that_is_missing_is_named_by_its_section():
    model = ModelConfig(fp8="current")
    with pytest.raises(UserError, match=r"with parallel\.pad_multiple = 1\n"):
        fp8._check_padding(model, ParallelConfig())
    with pytest.raises(UserError, match=r"set teacher_parallel\.pad_multiple=16"):
        fp8._check_padding(model, TeacherParallelConfig(ranks=2, pad_multiple=8))
    with pytest.raises(UserError, match=r"teacher_parallel\.tensor = 0"):
        TeacherParallelConfig(tensor=0)
