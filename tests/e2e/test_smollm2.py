"""A real language model through the converter: SmolLM2-135M-Instruct."""

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.test_models import logits
from tests.e2e.runs import megaopd
from tests.e2e.smollm2 import PACKAGE, make

pytestmark = pytest.mark.slow
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, a small robot")
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    if not make(out):
        pytest.skip(f"{PACKAGE} cannot be downloaded")
    return out


def continuations(megatron, tensor, pipeline, prompts):
    """Per prompt the first forward's logits and a greedy continuation, on the last stage."""
    import torch.distributed as dist

    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.build import build_model
    from megaopd.models.config import ModelConfig
    from megaopd.models.convert import load_weights
    from megaopd.parallel import ParallelConfig, make_grid

    grid = make_grid(ParallelConfig(tensor, pipeline))
    config = ModelConfig(path=megatron)
    arch = architecture(read_hf_config(config.hf_dir))
    model = build_model(arch, config, grid).eval()
    load_weights(model, config, arch, grid)
    made = []
    for ids in prompts:
        ids, first = list(ids), None
        for _ in range(NEW_TOKENS):
            out = logits(model, torch.tensor([ids]), grid)
            chosen = torch.zeros(1, dtype=torch.long)
            if out is not None:
                first = out[0, :, : arch.vocab] if first is None else first
                chosen[0] = out[0, -1, : arch.vocab].argmax()
            dist.broadcast(chosen, src=grid.stage_ranks[-1], group=grid.groups.pp)
            ids.append(int(chosen))
        made.append((first, ids))
    return made


@pytest.mark.parametrize(("tensor", "pipeline"), [(3, 1), (1, 2)])
def test_conversion(ranks, smollm2, tmp_path, tensor, pipeline, record_property):
    import transformers

    megatron = tmp_path / "megatron"
    there = megaopd(
        "convert", "hf-to-megatron", "--hf", smollm2, "--out", megatron,
        "--tp", tensor, "--pp", pipeline, timeout=300,
    )  # fmt: skip
    assert there.returncode == 0, there.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    per_rank = ranks.run(
        continuations, tensor * pipeline, str(megatron), tensor, pipeline, prompts, timeout=500
    )
    worst = 0.0
    for prompt, (first, ids) in zip(prompts, per_rank[-1], strict=True):
        with torch.no_grad():
            wanted = reference(torch.tensor([prompt])).logits[0]
            greedy = reference.generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1
            )
        worst = max(worst, float((first - wanted).abs().max()))
        assert ids == greedy[0].tolist()
    print(f"TP={tensor} PP={pipeline}: logits differ by at most {worst:.2e}")
    assert worst < 1e-3

    back = megaopd(
        "convert", "megatron-to-hf", "--megatron", megatron, "--out", tmp_path / "back", timeout=300
    )
    assert back.returncode == 0, back.stderr
    before = load_file(smollm2 / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_layout_that_does_not_divide_nine_heads(smollm2, tmp_path):
    refused = megaopd(
        "convert", "hf-to-megatron", "--hf", smollm2, "--out", tmp_path / "out", "--tp", 2
    )
    assert refused.returncode == 2
    assert "9 attention heads with tensor parallel 2" in refused.stderr
    assert not (tmp_path / "out").exists()
