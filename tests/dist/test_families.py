"""Every family agrees with transformers, both ways: logits, gradients, gradient norm, round trip.

The default suite runs each family on one rank and each kind of layout on the family that has most
to lose there; the whole table is marked slow (tools/family_table.py writes it down).
"""

import pytest
import torch
import transformers

from megaopd.rollout.hf import EmbeddedEngine
from tests.dist.families import CASES, LAYOUTS, Case, Layout, backward, measure
from tests.dist.models import tokens

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


def aux_gradients(path, layout, pad=0, empty=0):
    """name -> gradient of the load-balancing loss alone: the other loss has no weight.

    Behind every sequence come `pad` places of padding, and `empty` micro-batches hold nothing else.
    """
    from dataclasses import replace

    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.build import build_model
    from megaopd.models.config import ModelConfig
    from megaopd.models.weights import WeightStream, load_hf_weights
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.optim import wrap_ddp

    sequence = layout.tensor > 1
    grid = make_grid(
        ParallelConfig(layout.tensor, layout.pipeline, expert=layout.expert, sequence=sequence)
    )
    arch = architecture(read_hf_config(path))
    model = build_model(arch, ModelConfig(path=path, moe_aux_loss_coef=0.5), grid)
    load_hf_weights(model, path, arch, grid)
    (ddp,) = wrap_ddp([model], OptimConfig(lr=1e-9, distributed=False), grid)
    ids = tokens(4)
    padding = torch.ones(len(ids) + empty, ids.shape[1] + pad, dtype=torch.bool)
    padding[: len(ids), : ids.shape[1]] = False
    ids = torch.nn.functional.pad(ids, (0, pad, 0, empty), value=3)
    backward(ddp, model, arch, grid, ids, ids, weight=0.0, padding=padding)
    stream = WeightStream(model, arch, grid)
    stream.own = [replace(entry, parameter=entry.parameter.main_grad) for entry in stream.own]
    return {name: grad.clone() for name, grad in stream}


def balancing_gradients(path):
    """The same of transformers' router scores: mean over sequences of 0.5 E / (K S^2) n . p."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    ids = tokens(4)
    for one in ids:
        made = model(one[None], output_router_logits=True)
        for scores in made.router_logits:
            probs = scores.softmax(-1)
            counts = torch.zeros(experts).index_add(
                0, probs.topk(top_k).indices.flatten(), torch.ones(probs.shape[0] * top_k)
            )
            loss = 0.5 * experts / (top_k * len(one) ** 2) * (counts * probs.sum(0)).sum()
            (loss / len(ids)).backward(retain_graph=True)
    return {n: p.grad for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")}


def test_the_load_balancing_loss_is_a_mean_over_micro_batches(ranks, checkpoints):
    path = checkpoints["qwen3_moe"]
    wanted = balancing_gradients(path)
    assert len(wanted) == 3
    for layout in (Layout(), Layout(2, expert=2), Layout(expert=2, data=2), Layout(2, 2)):
        for got in ranks.run(aux_gradients, layout.world, path, layout):
            for name, grad in wanted.items():
                worst = float((got[name] - grad).abs().max() / grad.abs().max())
                assert worst < 1e-4, (str(layout), name, worst)


def test_padding_does_not_count_in_the_load_balancing_loss(ranks, checkpoints):
    """Behind a sequence, in micro-batches of nothing else, on every stage and tensor rank."""
    path = checkpoints["qwen3_moe"]
    wanted = balancing_gradients(path)
    for layout in (Layout(), Layout(2, expert=2), Layout(expert=2, data=2), Layout(2, 2)):
        for got in ranks.run(aux_gradients, layout.world, path, layout, 8, 2):
            for name, grad in wanted.items():
                mean = grad * 4 / 6  # over the micro-batches, two of which have no loss
                worst = float((got[name] - mean).abs().max() / mean.abs().max())
                assert worst < 1e-4, (str(layout), name, worst)


def test_the_embedded_engine_takes_every_family(ranks, checkpoints):
    """Weights that came off the ranks give transformers' law, in its own form of the experts."""
    for name in ("gemma2", "gemma3", "mixtral, window", "deepseek_v3"):
        path = checkpoints[name]
        layout = Layout(2, expert=2 if CASES[name].expert else 1)
        weights = ranks.run(streamed, layout.world, path, layout)[0]
        engine = EmbeddedEngine(
            path, eos_ids=[0], pad_id=0, dtype=torch.float32, device=torch.device("cpu")
        )
        engine.update_weights(weights.items(), 0)
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager"
        )
        with torch.no_grad():
            got, wanted = (model(tokens(2)).logits for model in (engine.model, reference))
        assert float((got - wanted).abs().max()) < 1e-5, name


def streamed(path, layout):
    """What rank 0 gets of the weights."""
    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.build import build_model
    from megaopd.models.config import ModelConfig
    from megaopd.models.weights import WeightStream, load_hf_weights
    from megaopd.parallel import ParallelConfig, make_grid

    grid = make_grid(ParallelConfig(layout.tensor, expert=layout.expert, sequence=True))
    arch = architecture(read_hf_config(path))
    model = build_model(arch, ModelConfig(path=path), grid)
    load_hf_weights(model, path, arch, grid)
    return {n: t.clone() for n, t in WeightStream(model, arch, grid, only_rank_0=True)}


def divergence(paths, layout):
    """(rkl of a student with a soft-cap from a teacher with another one or none, log-probs)."""
    from megaopd.data.types import Prompt, Sample
    from megaopd.models.arch import architecture, padded_vocab, read_hf_config
    from megaopd.models.config import ModelConfig
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.batch import make_micro_batches
    from megaopd.trainer.student import Student
    from megaopd.trainer.teacher import Teacher

    grid = make_grid(ParallelConfig(layout.tensor, layout.pipeline, sequence=layout.tensor > 1))
    archs = [architecture(read_hf_config(path)) for path in paths]
    student = Student(ModelConfig(path=paths[0]), archs[0], grid, ObjectiveConfig(), None)
    rows = padded_vocab(archs[0].vocab, layout.tensor, 8)
    teacher = Teacher(ModelConfig(path=paths[1]), archs[1], grid, vocab_rows=rows)
    ids = tuple(tokens(1)[0].tolist())
    sample = Sample(Prompt("p", ids[:1], "", None, ""), ids[1:], None, "stop", weight_version=0)
    micro_batches = make_micro_batches(
        [sample], grid=grid, micro_batch_size=1, pad_id=0, loss_agg="token-mean"
    )
    return student.score(micro_batches, teacher)["kl"], student.log_probs(ids)


@pytest.mark.parametrize("teacher", ["llama", "gemma2"])
def test_each_model_has_its_own_soft_cap_in_the_loss(ranks, checkpoints, tmp_path, teacher):
    paths = [checkpoints["gemma2"], checkpoints[teacher]]
    if teacher == "gemma2":
        changes = {**CASES["gemma2"].changes, "final_logit_softcapping": 1.0}
        paths[1] = Case("Gemma2Config", changes).save(tmp_path, "other")
    ids, laws = tokens(1), []
    for path in paths:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        with torch.no_grad():
            laws.append(model(ids).logits[0, :-1].double().log_softmax(-1))
    wanted = float((laws[0].exp() * (laws[0] - laws[1])).sum(-1).mean())
    chosen = laws[0].gather(1, ids[0, 1:, None])[:, 0]
    for layout in (Layout(), Layout(2)):
        for kl, log_probs in ranks.run(divergence, layout.world, paths, layout):
            assert kl == pytest.approx(wanted, rel=1e-4)
            assert torch.allclose(torch.tensor(log_probs).double(), chosen, atol=1e-4)
