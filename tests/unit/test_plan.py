"""The planner's arithmetic: sizes of known models, what stays on a rank, what is sent."""

import dataclasses
import json
import subprocess
import sys

import pytest

from megaopd import cli
from megaopd.errors import UserError
from megaopd.losses import engine
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.parallel import ParallelConfig
from megaopd.plan import head
from megaopd.plan.communication import step_traffic
from megaopd.plan.configured import job_of, left_out, parse_layout
from megaopd.plan.hardware import GPUS
from megaopd.plan.job import Job, Side, misfit
from megaopd.plan.layer import backward_peak, layer_modules, saved_bytes
from megaopd.plan.memory import in_flight, stage_memory, stage_weights
from megaopd.plan.models import ModelShape, find_shape, known_models, read_shape
from megaopd.plan.search import best, search
from megaopd.recipes import recipe
from megaopd.schema import load_config

RECIPES = {
    "qwen3_32b_to_8b_16gpu": 16,
    "qwen3_235b_to_32b_64gpu": 64,
    "llama_70b_to_8b_8gpu": 8,
    "qwen3_8b_to_1p7b_8gpu": 8,
}
# All parameters and those that one token passes through, in 10^9, as their makers give them.
PUBLISHED = {
    "qwen3-1.7b": (1.72, 1.72),
    "qwen3-8b": (8.19, 8.19),
    "qwen3-32b": (32.8, 32.8),
    "qwen3-235b-a22b": (235, 22),
    "llama-3.1-8b": (8.03, 8.03),
    "llama-3.1-70b": (70.6, 70.6),
    "smollm2-135m": (0.1345, 0.1345),
}
DENSE = ModelShape("dense", 1000, 256, 640, 4, 8, 4, 32, tied=False)


def job(**changes):
    side = Side(changes.pop("shape", DENSE), changes.pop("layout", ParallelConfig()))
    side = dataclasses.replace(
        side, **{k: changes.pop(k) for k in ("recompute", "itemsize") if k in changes}
    )
    values = {"world": 8, "samples": 64, "sequence": 256, "rows": 128, "teacher": side}
    return Job(student=side, **values | changes)


@pytest.mark.parametrize("name", known_models())
def test_known_models_have_the_published_sizes(name):
    shape = find_shape(name)
    every, active = PUBLISHED[name]
    assert shape.parameters() / 1e9 == pytest.approx(every, rel=0.01)
    assert shape.parameters(active=True) / 1e9 == pytest.approx(active, rel=0.01)


def test_a_model_is_found_by_path_or_by_name(tmp_path):
    config = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_shape(str(tmp_path)).head_dim == 4
    assert find_shape("checkpoints/qwen3-8b-megatron").name == "qwen3-8b"
    assert find_shape("Qwen3-8B").name == "qwen3-8b"
    with pytest.raises(UserError, match=r"no known model.*\n.*llama-3\.1-8b"):
        find_shape("checkpoints/no-such-model")
    del config["vocab_size"]
    with pytest.raises(UserError, match="lacks vocab_size"):
        read_shape(config, name="x")


def test_sparse_layers_follow_the_config():
    config = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 6}
    config |= {"num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    shape = read_shape(config | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, name="x")
    assert [shape.is_sparse(i) for i in range(6)] == [False, True, False, False, False, True]
    assert shape.sparse_layers == 2


def test_chunk_constants_are_the_losses_own():
    sizes = {"local": "cpu", "te": "cuda"}
    for spec, device in sizes.items():
        assert head.CHUNK_ELEMENTS[spec] == engine.CHUNK_ELEMENTS[device]
    assert head.MIN_CHUNK == engine.MIN_CHUNK


@pytest.mark.parametrize("name", ["qwen3-8b", "smollm2-135m", "qwen3-235b-a22b"])
def test_a_single_rank_holds_every_parameter(name):
    shape = find_shape(name)
    weights = stage_weights(Side(shape, ParallelConfig()), 0, vocab_rows=shape.vocab)
    assert weights.all == shape.parameters()


def test_stages_and_expert_ranks_share_the_parameters():
    shape = find_shape("qwen3-235b-a22b")
    side = Side(shape, ParallelConfig(pipeline=2, expert=8))
    stages = [stage_weights(side, stage, vocab_rows=shape.vocab) for stage in (0, 1)]
    assert sum(s.dense + 8 * s.experts for s in stages) == shape.parameters()
    tied = dataclasses.replace(DENSE, tied=True)
    halves = [stage_weights(Side(tied, ParallelConfig(pipeline=2)), s, vocab_rows=1000).all
              for s in (0, 1)]  # fmt: skip
    assert sum(halves) == tied.parameters() + 1000 * 256  # the last stage has a copy


def test_no_tensor_rank_splits_an_expert():
    """As parallel.make_grid groups the ranks: experts over all ranks of a stage."""
    shape = find_shape("qwen3-235b-a22b")
    layouts = [ParallelConfig(tensor=t, sequence=t > 1, expert=8) for t in (1, 4)]
    one, four = (stage_weights(Side(shape, x), 0, vocab_rows=shape.vocab) for x in layouts)
    assert one.experts == four.experts and four.dense < one.dense
    assert [Side(shape, x).expert_data(64) for x in layouts] == [8, 8]
    assert misfit(Side(shape, layouts[1]), 8, 128) == ""  # 8 experts' ranks of 4 tensor ranks x 2
    assert "ranks of a stage" in misfit(Side(shape, layouts[1]), 4, 128)


def test_the_optimizer_is_split_over_data_and_context_ranks():
    whole = stage_memory(job(world=1), 0)
    split = stage_memory(job(layout=ParallelConfig(context=2)), 0)
    assert whole.optimizer == 6 * whole.weights  # moments and master copy in fp32 of bf16 weights
    assert split.optimizer == whole.optimizer / 8
    assert stage_memory(job(distributed=False), 0).optimizer == whole.optimizer
    wide = stage_memory(job(world=1, itemsize=4), 0)
    assert wide.optimizer == 2 * wide.weights


def test_micro_batches_in_flight():
    assert [in_flight(4, 1, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(4, 1, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    # Megatron's interleaved warm-up: 2 (P - p - 1) + (V - 1) P chunks, and one more.
    assert in_flight(4, 2, 0, 16) == (6 + 4 + 1) / 2
    assert in_flight(4, 2, 3, 16) == (0 + 4 + 1) / 2


def test_recomputation_and_sequence_parallel_save_activations():
    plain = stage_memory(job(layout=ParallelConfig(tensor=2)), 0)
    split = stage_memory(job(layout=ParallelConfig(tensor=2, sequence=True)), 0)
    full = stage_memory(job(layout=ParallelConfig(tensor=2), recompute="full"), 0)
    assert full.saved < split.saved < plain.saved
    # With flash attention selective recomputation gives up one number a row and head.
    selective = stage_memory(job(recompute="selective"), 0)
    assert selective.saved == stage_memory(job(), 0).saved - 4 * 256 * 8 * 4


def test_a_layer_keeps_what_the_formula_says():
    """bf16 on a GPU: 4H of the stream, 3Q + 3K... of attention, 3F of the MLP, and scalars."""
    one = job()
    rows, modules = 256, layer_modules(one, one.student)
    numbers = 4 * 256 + (256 + 128) + (256 + 2 * 128) + 256 + 3 * 640
    assert saved_bytes(modules) == 2 * rows * numbers + 4 * rows * (2 + 8)
    assert backward_peak(modules) > saved_bytes(modules)


def test_tensor_parallel_traffic_is_the_textbook_volume():
    layout = ParallelConfig(tensor=4)
    one = job(layout=layout, teacher=None)
    sent = {t.name: t.sent for t in step_traffic(one)}
    layer = 4 * 2 * 3 / 4 * one.tokens(one.student) * 256 * 2  # four all-reduces
    assert sent["student tensor"] == one.micro_batches * DENSE.layers * layer
    numbers = stage_weights(one.student, 0, vocab_rows=one.vocab_rows).all
    assert sent["gradients and weights"] == 1 / 2 * numbers * (4 + 2)
    rows = one.micro_batches * one.rows
    assert sent["loss scalars"] == 2 * 3 / 4 * 20 * rows


def test_misfits_say_what_does_not_divide():
    side = Side(find_shape("qwen3-235b-a22b"), ParallelConfig(pipeline=4))
    assert "94 layers do not divide by pipeline x virtual = 4" in misfit(side, 64, 1024)
    side = Side(find_shape("llama-3.1-8b"), ParallelConfig(tensor=16))
    assert "8 key/value heads do not divide by tensor = 16" in misfit(side, 16, 1024)


def test_search_finds_what_fits_and_says_why_the_rest_does_not():
    shapes = find_shape("qwen3-8b"), find_shape("qwen3-32b")
    sides = [Side(shape, ParallelConfig()) for shape in shapes]
    one = Job(*sides, world=8, samples=64, sequence=2048, rows=1024)
    found = search(one, GPUS["h100"])
    assert found.fits and found.too_large and found.reasons
    times = [f.seconds.total for f in found.fits]
    assert times == sorted(times)
    for fit in found.fits:
        layout = fit.job.student.layout
        assert fit.fullest.total <= GPUS["h100"].memory
        assert 8 % layout.model_parallel == 0 and not misfit(fit.job.student, 8, 2048)
    # 65 GB of teacher beside 16 GB of student cannot be on every GPU.
    assert not any(f.job.student.layout.model_parallel == 1 for f in found.fits)
    with pytest.raises(UserError, match="no layout fits: the nearest has"):
        best(search(dataclasses.replace(one, world=1), GPUS["h100"]))


def test_a_laid_out_teacher_of_its_own():
    config = load_config(recipe("h100/llama_70b_to_8b_8gpu"), ["parallel.tensor=4"])
    own = job_of(config, 8, teacher_layout="tensor=8,sequence=true")
    assert own.teacher.layout == ParallelConfig(tensor=8, sequence=True)
    shared = job_of(config, 8)
    ours, theirs = stage_memory(own, 0), stage_memory(shared, 0)
    assert ours.teacher_weights == pytest.approx(theirs.teacher_weights / 2, rel=0.01)
    assert "teacher hidden states" in {t.name for t in step_traffic(own)}
    same = ["teacher.placement=regrouped", "teacher_parallel.tensor=8"]
    said = load_config(
        recipe("h100/llama_70b_to_8b_8gpu"),
        ["parallel.tensor=4", *same, "teacher_parallel.sequence=true", "lora.rank=8"],
    )
    assert job_of(said, 8).teacher == own.teacher
    assert left_out(said) == ["lora.rank = 8"] and left_out(config) == []
    with pytest.raises(UserError, match="unknown key tensr"):
        parse_layout("tensr=8")


def test_a_second_law_costs_a_second_pair_of_logits_in_fp32():
    config = load_config(recipe("h100/llama_70b_to_8b_8gpu"))
    law = dataclasses.replace(config.objective, temperature=2.0, sft_coef=0.5)
    assert isinstance(law, ObjectiveConfig)
    two = job_of(dataclasses.replace(config, objective=law), 8)
    one = job_of(config, 8)
    assert head.head_bytes(two).logits == 2 * 2 * head.head_bytes(one).logits


@pytest.mark.parametrize("name", RECIPES)
def test_packaged_recipes_fit(name, capsys):
    path = str(recipe(f"h100/{name}"))
    arguments = ["plan", "--config", path, "--gpus", str(RECIPES[name]), "--json", "--no-suggest"]
    assert cli.main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["seconds"]["total"] > 0
    assert all(s["peak"] < s["total"] for s in plan["stages"])


def test_the_command_prints_tables_and_suggestions(capsys):
    path = str(recipe("h100/llama_70b_to_8b_8gpu"))
    assert cli.main(["plan", "--config", path, "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    for text in ("teacher: llama-3.1-70b", "needed of 79.0", "This layout fits", "Use: parallel."):
        assert text in out
    bad = ["plan", "--config", path, "--gpus", "8", "--gpu", "k80"]
    assert cli.main(bad) == 2 and "one of a100" in capsys.readouterr().err
    uneven = ["plan", "--config", path, "--gpus", "10"]
    assert cli.main(uneven) == 2 and "10 ranks do not divide" in capsys.readouterr().err


def test_planning_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megaopd.plan.command import plan\n"
        f"from pathlib import Path; plan(Path({str(recipe('h100/llama_70b_to_8b_8gpu'))!r}), [],"
        " gpus=8, gpu='h100', as_json=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world"] == 8
