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
from megaopd.plan.job import Job, Side, check_job, misfit
from megaopd.plan.layer import backward_peak, layer_modules, saved_bytes
from megaopd.plan.memory import in_flight, stage_memory, stage_weights
from megaopd.plan.models import as_model, find_model, known_models
from megaopd.plan.search import best, evaluate, search
from megaopd.plan.times import estimate
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
TINY = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, "hidden_size": 256,
    "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
}  # fmt: skip
DENSE = as_model(TINY, name="dense")
SPARSE = as_model(
    {
        **TINY, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True,
    },
    name="sparse",
)  # fmt: skip


def job(**changes):
    side = Side(changes.pop("model", DENSE), changes.pop("layout", ParallelConfig()))
    side = dataclasses.replace(
        side, **{k: changes.pop(k) for k in ("recompute", "itemsize") if k in changes}
    )
    values = {"world": 8, "samples": 64, "sequence": 256, "rows": 128, "teacher": side}
    return Job(student=side, **values | changes)


@pytest.mark.parametrize("name", known_models())
def test_known_models_have_the_published_sizes(name):
    shape = find_model(name)
    every, active = PUBLISHED[name]
    assert shape.parameters() / 1e9 == pytest.approx(every, rel=0.01)
    assert shape.parameters(active=True) / 1e9 == pytest.approx(active, rel=0.01)


def test_a_model_is_found_by_path_or_by_name(tmp_path):
    config = {k: v for k, v in TINY.items() if k != "head_dim"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_model(str(tmp_path)).arch.head_dim == 32
    assert find_model("checkpoints/qwen3-8b-megatron").name == "qwen3-8b"
    assert find_model("Qwen3-8B").name == "qwen3-8b"
    with pytest.raises(UserError, match=r"no known model.*\n.*llama-3\.1-8b"):
        find_model("checkpoints/no-such-model")
    del config["vocab_size"]
    with pytest.raises(UserError, match="lacks vocab_size"):
        as_model(config, name="x")
    latent = TINY | {"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 4}
    latent |= {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    with pytest.raises(UserError, match="multi-latent attention"):
        as_model(latent | {"moe_intermediate_size": 8, "num_experts_per_tok": 2}, name="x")


def test_every_parameter_of_a_family_is_counted():
    """Against the model that transformers builds, biases and norms included."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kinds = {
        "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True},
        "Qwen2ForCausalLM": {},
        "Qwen3ForCausalLM": {"tie_word_embeddings": True},
        "Gemma2ForCausalLM": {"hidden_activation": "gelu_pytorch_tanh"},
        "Gemma3ForCausalLM": {"hidden_activation": "gelu_pytorch_tanh"},
        "Qwen3MoeForCausalLM": {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
            "decoder_sparse_step": 2, "norm_topk_prob": True,
        },
        "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }  # fmt: skip
    for kind, more in kinds.items():
        made = getattr(transformers, kind)
        plain = {k: v for k, v in TINY.items() if k != "architectures"} | more
        config = made.config_class(**plain)
        with torch.device("meta"):
            real = made(config).num_parameters()
        written = config.to_dict() | {"architectures": [kind]}
        model = as_model(written, name=kind)
        assert model.parameters() == real, kind
        whole = stage_weights(Side(model, ParallelConfig()), 0, vocab_rows=model.arch.vocab)
        assert whole.all == real, kind


def test_chunk_constants_are_the_losses_own():
    sizes = {"local": "cpu", "te": "cuda"}
    for spec, device in sizes.items():
        assert head.CHUNK_ELEMENTS[spec] == engine.CHUNK_ELEMENTS[device]
    assert head.MIN_CHUNK == engine.MIN_CHUNK


@pytest.mark.parametrize("name", ["qwen3-8b", "smollm2-135m", "qwen3-235b-a22b"])
def test_a_single_rank_holds_every_parameter(name):
    model = find_model(name)
    weights = stage_weights(Side(model, ParallelConfig()), 0, vocab_rows=model.arch.vocab)
    assert weights.all == model.parameters()


def test_stages_and_expert_ranks_share_the_parameters():
    model = find_model("qwen3-235b-a22b")
    side = Side(model, ParallelConfig(pipeline=2, expert=8))
    stages = [stage_weights(side, stage, vocab_rows=model.arch.vocab) for stage in (0, 1)]
    assert sum(s.dense + 8 * s.experts for s in stages) == model.parameters()
    tied = as_model(TINY | {"tie_word_embeddings": True}, name="tied")
    halves = [stage_weights(Side(tied, ParallelConfig(pipeline=2)), s, vocab_rows=1000).all
              for s in (0, 1)]  # fmt: skip
    assert sum(halves) == tied.parameters() + 1000 * 256  # the last stage has a copy


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
    assert sent["student tensor"] == one.micro_batches * DENSE.arch.layers * layer
    numbers = stage_weights(one.student, 0, vocab_rows=one.vocab_rows).all
    assert sent["gradients and weights"] == 1 / 2 * numbers * (4 + 2)
    rows = one.micro_batches * one.rows
    assert sent["loss scalars"] == 3 * 20 * rows  # an all-gather


def test_misfits_say_what_does_not_divide():
    side = Side(find_model("qwen3-235b-a22b"), ParallelConfig(pipeline=4))
    assert "94 layers with pipeline parallel 4" in misfit(side, 64)
    side = Side(find_model("llama-3.1-8b"), ParallelConfig(tensor=16))
    assert "8 key/value heads with tensor parallel 16" in misfit(side, 16)
    wide = ParallelConfig(tensor=2, expert=8, sequence=True)
    assert not misfit(Side(SPARSE, wide), 8)  # an expert size that counts the tensor ranks
    assert "4 ranks do not divide by pipeline x expert = 8" in misfit(Side(SPARSE, wide), 4)
    assert "sequence = false" in misfit(Side(SPARSE, ParallelConfig(tensor=2)), 8)


def test_no_tensor_rank_splits_an_expert():
    """A run's: expert tensor parallel 1, experts over all ranks of a stage (parallel.make_grid)."""

    def split(**layout):
        return Side(SPARSE, ParallelConfig(**layout))

    numbers = SPARSE.layer(0)
    one, two = split(), split(tensor=2, sequence=True)
    for side, held in ((one, 8), (two, 8), (split(tensor=2, expert=4, sequence=True), 2)):
        weights = stage_weights(side, 0, vocab_rows=1000)
        assert weights.experts == 4 * held * numbers.expert
    assert [side.expert_data(8) for side in (one, two, split(tensor=2, expert=4, sequence=True))
            ] == [8, 8, 2]  # fmt: skip
    busy = job(model=SPARSE, layout=ParallelConfig(tensor=2, expert=2, sequence=True))
    half, rows = busy.tokens(busy.student) // 2, 2 * 256 * 2
    saved = {m.name: m.saved for m in layer_modules(busy, busy.student, sparse=True)}
    assert saved["experts"]["expert.in"] == pytest.approx(1.2 * half * rows)
    assert saved["experts"]["expert.product"] == pytest.approx(1.2 * half * 2 * 96 * 2)
    sent = {t.name: t for t in step_traffic(busy)}
    passes = busy.micro_batches * 2 * 4 * 2  # dispatch and combine; layers; forward and backward
    assert sent["student experts"].sent == passes * 1 / 2 * half * rows
    assert sent["experts' gradients and weights"].ranks == 4
    assert not any("experts' tensor" in name for name in sent)


def test_padding_of_every_rank_is_counted():
    plain = job(sequence=200, layout=ParallelConfig(tensor=2, sequence=True))
    padded = job(sequence=200, layout=ParallelConfig(tensor=2, sequence=True, pad_multiple=128))
    assert (plain.padded_sequence, padded.padded_sequence) == (200, 256)


def test_a_teacher_on_ranks_of_its_own():
    own = ["teacher.placement=separate", "teacher_parallel.ranks=4", "teacher_parallel.tensor=4"]
    config = load_config(recipe("h100/llama_70b_to_8b_8gpu"), [*own, "parallel.tensor=4"])
    with pytest.raises(UserError, match="4 GPUs, 4 of them the teacher's own"):
        job_of(config, 4)
    apart, together = job_of(config, 8), job_of(config, 4 + 4, teacher_layout="tensor=4")
    assert (apart.world, apart.teacher_world) == (4, 4) and apart == together
    assert apart.placement == "separate" and apart.regrouped
    gpu = GPUS["h100"]
    same = {"world": 8, "teacher_world": 0, "placement": "same"}
    beside = evaluate(dataclasses.replace(apart, **same), gpu)
    found = evaluate(apart, gpu)
    teacher = found.memory[-1]
    assert (teacher.own, teacher.name, teacher.gradients) == (True, "teacher 0", 0)
    # The student keeps the output layer alone, and hidden states of a window for those of a step.
    arch, rows = apart.teacher.arch, apart.vocab_rows
    output = rows // 4 * arch.hidden * 2
    assert found.memory[0].teacher_weights == output
    whole = beside.memory[0].teacher_weights
    assert teacher.teacher_weights == pytest.approx(whole - output, rel=1e-3)
    assert found.memory[0].hidden < beside.memory[0].hidden
    sent = [one.name for one in step_traffic(apart)]
    assert "teacher hidden states" in sent
    assert found.seconds.teacher > 0  # 70B forward takes longer than all of 8B: the rest of it
    large = dataclasses.replace(apart.student, model=apart.teacher.model)
    assert evaluate(dataclasses.replace(apart, student=large), gpu).seconds.teacher == 0
    one = find_model("qwen3-8b")
    larger = dataclasses.replace(apart, teacher_world=3)
    with pytest.raises(UserError, match="3 ranks do not divide"):
        check_job(larger)
    small = dataclasses.replace(apart, student=Side(one, ParallelConfig()))
    assert {fit.job.teacher.layout.tensor for fit in search(small, gpu).fits} == {4}
    thick = dataclasses.replace(apart, teacher=Side(apart.teacher.model, ParallelConfig()))
    with pytest.raises(UserError, match=r"on teacher 0 of its own ranks[^\0]*fix: raise teacher_p"):
        best(search(thick, gpu))
    # A step's hidden states at once where the objective looks at them twice; scored before it.
    held = evaluate(dataclasses.replace(apart, held=True, scored_first=True), gpu)
    assert held.memory[0].hidden == 2 * beside.memory[0].hidden  # of half as many replicas
    assert held.seconds.teacher > found.seconds.teacher


def test_search_finds_what_fits_and_says_why_the_rest_does_not():
    models = find_model("qwen3-8b"), find_model("qwen3-32b")
    sides = [Side(model, ParallelConfig()) for model in models]
    one = Job(*sides, world=8, samples=64, sequence=2048, rows=1024)
    found = search(one, GPUS["h100"])
    assert found.fits and found.too_large and found.reasons
    times = [f.seconds.total for f in found.fits]
    assert times == sorted(times)
    for fit in found.fits:
        layout = fit.job.student.layout
        assert fit.fullest.total <= GPUS["h100"].memory
        assert 8 % layout.model_parallel == 0 and not misfit(fit.job.student, 8)
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
    output = own.vocab_rows // 4 * own.teacher.arch.hidden * 2  # on the student's partition
    half = (theirs.teacher_weights - output) / 2
    assert ours.teacher_weights == pytest.approx(half + output, rel=1e-3)
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


def test_epochs_multiply_all_but_the_old_log_probs():
    config = load_config(recipe("h100/llama_70b_to_8b_8gpu"))
    trainer = dataclasses.replace(config.trainer, epochs=3, mini_batches=2)
    several = dataclasses.replace(config, trainer=trainer)
    job, gpu = job_of(several, 8), GPUS["h100"]
    single = dataclasses.replace(job, epochs=1)
    once, thrice = (estimate(one, gpu, step_traffic(one)) for one in (single, job))
    assert (thrice.teacher, thrice.loss) == pytest.approx((3 * once.teacher, 3 * once.loss))
    sent = [{t.name: t.sent for t in step_traffic(one)} for one in (single, job)]
    for name, bytes_ in sent[0].items():
        times = 1 if name.startswith("weight sync") else 3
        assert job.old_log_probs or sent[1][name] == pytest.approx(times * bytes_), name
    more = job.old_log_probs
    passes = 3 + (job.student.recompute == "full")
    assert thrice.student / once.student == pytest.approx((3 * passes + more) / (passes + more))
    assert "trainer.mini_batches = 2" in left_out(several)


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
