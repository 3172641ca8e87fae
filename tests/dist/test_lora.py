"""Adapters: one trajectory under every layout, a dense model's gradients, merged export, resume."""

from itertools import product

import pytest
import torch
import transformers

from megaopd.models.arch import architecture, read_hf_config
from megaopd.models.rules import GateUp, Qkv
from tests.dist import lora_cases as cases
from tests.dist.families import CASES
from tests.dist.layouts import LAYOUTS, SINGLE, Layout, differences, samples
from tests.dist.models import save_tiny, tokens
from tests.often import often

NAMES = [
    "tp2",
    "tp2-sp",
    "pp2",
    "dp2-zero1",
    "tp2-pp2-sp-zero1",
    "cp2-tp2-sp",
    "pp2-vpp2",
    "packed-cp2-pp2",
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {
        family: (
            str(save_tiny(root / "student", family, tied=tied)),
            str(save_tiny(root / "teacher", "qwen3", tied=False, seed=11, hidden_size=96)),
        )
        for family, tied in (("qwen3", True), ("qwen2", False))
    }


@pytest.fixture(scope="module")
def reference(ranks, checkpoints):
    made = {}

    def get(family):
        if family not in made:
            (made[family],) = ranks.run(cases.trajectory, 1, checkpoints[family], SINGLE)
        return made[family]

    return get


OFTEN = [("qwen3", "tp2-pp2-sp-zero1"), ("qwen2", "packed-cp2-pp2")]


@pytest.mark.parametrize(("family", "name"), often(product(["qwen3", "qwen2"], NAMES), OFTEN))
def test_same_trajectory_under_every_layout(ranks, checkpoints, reference, name, family):
    layout = LAYOUTS[name]
    per_rank = ranks.run(cases.trajectory, layout.world, checkpoints[family], layout)
    assert all(r[0] == per_rank[0][0] for r in per_rank), "ranks report different metrics"
    loss, norm, size = differences(reference(family), per_rank[0])
    print(f"{name} {family}: loss {loss:.1e}, gradient norm {norm:.1e}, weights {size:.1e}")
    assert loss <= 2e-6 and norm <= 1e-5 and size <= 1e-5, (loss, norm, size)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_norm_behind_a_layer_sees_the_adapter(ranks, tmp_path, family):
    path = CASES[family].save(tmp_path, "model")
    for beside, folded in ranks.run(cases.beside_and_folded, 2, (path, path), LAYOUTS["tp2-sp"]):
        assert (beside - folded).abs().max() <= 1e-4 * folded.abs().max()


def test_the_trajectory_moves(reference):
    curve, _ = reference("qwen3")
    losses = [loss for loss, _ in curve]
    assert len(set(losses)) == len(losses) and all(norm > 0 for _, norm in curve)


def dense_gradients(paths, values):
    """The same loss on transformers' model in fp64, adapters written out; gradients by key."""
    model = transformers.AutoModelForCausalLM.from_pretrained(paths[0]).double()
    teacher = transformers.AutoModelForCausalLM.from_pretrained(paths[1]).double()
    arch = architecture(read_hf_config(paths[0]))
    leaves = {
        key[:3]: tensor.double().requires_grad_()
        for key, tensor in values.items()
        if key[3] == "value"
    }
    weights = dict(model.named_parameters())
    where = {
        "linear_qkv": (
            "self_attn",
            ["q_proj", "k_proj", "v_proj"],
            Qkv(arch.heads, arch.kv_heads, arch.head_dim),
        ),
        "linear_proj": ("self_attn", ["o_proj"], None),
        "linear_fc1": ("mlp", ["gate_proj", "up_proj"], GateUp(arch.ffn)),
        "linear_fc2": ("mlp", ["down_proj"], None),
    }
    for layer, name in {key[:2] for key in leaves}:
        block, projections, rule = where[name]
        b, a = leaves[layer, name, "b"], leaves[layer, name, "a"]
        parts = rule.merge([b]) if rule else [b]
        for projection, part in zip(projections, parts, strict=True):
            full = f"model.layers.{layer}.{block}.{projection}.weight"
            weights[full] = weights[full].detach() + cases.ALPHA / cases.RANK * part @ a
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in samples(0):
        ids = torch.tensor([sample.tokens])
        rows = slice(len(sample.prompt.token_ids) - 1, ids.shape[1] - 1)
        out = torch.func.functional_call(model, weights, (ids,)).logits[0, rows]
        log_p = out.log_softmax(-1)
        log_q = teacher(ids).logits[0, rows].detach().log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
        count += log_p.shape[0]
    (total / count).backward()
    return {key: leaf.grad for key, leaf in leaves.items()}


# With a distributed optimizer a rank would hold a part of the sums only.
TP2_SP_PLAIN = Layout(2, tensor=2, sequence=True, distributed=False)


@pytest.mark.parametrize("layout", [SINGLE, LAYOUTS["tp2"], TP2_SP_PLAIN, LAYOUTS["pp2"]])
def test_gradients_equal_a_dense_model(ranks, checkpoints, layout):
    paths = checkpoints["qwen3"]
    found = {}
    for part in ranks.run(cases.gradients, layout.world, paths, layout):
        found |= part
    want = dense_gradients(paths, found)
    assert len(want) == 4 * 4 * 2
    worst = max(
        float((found[*key, "grad"].double() - grad).norm() / grad.norm())
        for key, grad in want.items()
    )
    print(f"{layout}: gradients of A and B differ by {worst:.1e}")
    assert worst < 1e-5


def test_what_is_frozen_costs_no_gradient_and_no_optimizer_state(ranks, checkpoints):
    (found,) = ranks.run(cases.memory, 1, checkpoints["qwen3"], SINGLE)
    print({key: value for key, value in found.items() if key != "names"})
    assert found["with gradient"] == 0
    assert found["frozen"] > 8 * found["trained"] > 0
    # The buffer may be padded; Adam keeps two moments beside the adapters themselves.
    assert found["trained"] <= found["gradients"] <= 1.1 * found["trained"]
    assert found["optimizer"] <= 3.3 * found["trained"]
    assert len(found["names"]) == 4 * 4 * 2


@pytest.mark.parametrize("layout", [SINGLE, LAYOUTS["tp2-sp"], LAYOUTS["pp2"]])
def test_the_merged_export_is_the_model_with_adapters(ranks, checkpoints, tmp_path, layout):
    paths = checkpoints["qwen3"]
    out = str(tmp_path / "merged")
    per_rank = ranks.run(cases.export, layout.world, paths, layout, out)
    on, off, base, _ = per_rank[-1]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        wanted = model(tokens()).logits
    difference = float((on[..., : wanted.shape[-1]] - wanted).abs().max())
    print(f"{layout}: merged and with adapters differ by {difference:.1e}")
    assert difference < 1e-4
    assert off.equal(base) and float((on - off).abs().max()) > 0.1
    state = model.state_dict()
    streamed = per_rank[0][3]  # the servers' form of the stream
    assert all(tensor.equal(state[name]) for name, tensor in streamed.items()) and streamed


def test_resume(ranks, checkpoints, tmp_path):
    """Adapters and their optimizer alone are saved; the run goes on bit for bit, under any TP."""
    paths, layout = checkpoints["qwen3"], LAYOUTS["tp2-sp"]
    saved = ranks.run(cases.resume, 2, paths, layout, str(tmp_path), save=True)
    curve, names = saved[0]
    assert names and all("_lora." in name for name in names)
    again = ranks.run(cases.resume, 2, paths, layout, str(tmp_path), save=False)
    assert again[0][0] == curve
    ((other, _),) = ranks.run(cases.resume, 1, paths, Layout(1), str(tmp_path), save=False)
    assert other == [pytest.approx(step, rel=1e-5) for step in curve]

    path = str(tmp_path / "checkpoints" / "step_00000002")
    (one,) = ranks.run(cases.as_base, 1, path, paths[0], SINGLE)
    two = ranks.run(cases.as_base, 2, path, paths[0], layout)[0]
    base = transformers.AutoModelForCausalLM.from_pretrained(paths[0]).state_dict()
    assert all(two[name].allclose(one[name], rtol=1e-6, atol=1e-7) for name in one)
    moved = [name for name in one if not one[name].equal(base[name])]
    assert len(moved) == 4 * 7  # q, k, v, o, gate, up, down of each layer


@pytest.mark.parametrize("layout", [SINGLE, LAYOUTS["tp2-sp"], LAYOUTS["pp2"]])
def test_the_initial_student_as_teacher_needs_no_copy(ranks, checkpoints, layout):
    paths = checkpoints["qwen3"]
    want = ranks.run(cases.initial_teacher, layout.world, paths, layout, "a copy")
    have = ranks.run(cases.initial_teacher, layout.world, paths, layout, "adapters off")
    assert have == want
    assert all(loss > 0 and norm > 0 for loss, norm in want[0])
