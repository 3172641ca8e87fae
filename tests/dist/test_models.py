"""Logits equal transformers', and weights come back bit for bit, for every family and layout."""

from pathlib import Path

import pytest
import torch

from megaopd.errors import UserError
from tests.dist.models import CONFIGS, save_tiny, tiny, tokens

LAYOUTS = [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return [str(save_tiny(root, f, tied=t)) for f in CONFIGS for t in (False, True)]


def logits(model, ids, grid):
    """[B, S, V padded] on the last stage, else None."""
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
    )

    from megaopd.trainer.batch import MicroBatch
    from megaopd.trainer.step import run_schedule

    positions = torch.arange(ids.shape[1]).expand_as(ids)
    empty = torch.zeros(0)
    micro = MicroBatch(ids, positions, None, empty, empty, empty, empty, False)

    def forward_step(iterator, stage):
        batch = next(iterator)
        return stage(batch.tokens, batch.position_ids, None), lambda h, non_loss_data=True: h

    with torch.no_grad():
        out = run_schedule(model, grid, [micro], forward_step, forward_only=True, collect=True)
        if not out:
            return None
        hidden = out[0]
        if grid.config.sequence:
            hidden = gather_from_sequence_parallel_region(hidden)
        shard = hidden @ model.output_weight().t()
        return gather_from_tensor_model_parallel_region(shard).transpose(0, 1)


def compare(paths, tensor, pipeline, sequence):
    """Per checkpoint: largest logit difference, and the tensors that changed on a round trip."""
    import transformers

    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.build import build_model
    from megaopd.models.config import ModelConfig
    from megaopd.models.weights import WeightStream, load_hf_weights
    from megaopd.parallel import ParallelConfig, make_grid

    grid = make_grid(ParallelConfig(tensor, pipeline, sequence=sequence))
    results = []
    for path in paths:
        arch = architecture(read_hf_config(path))
        model = build_model(arch, ModelConfig(path=path), grid)
        load_hf_weights(model, path, arch, grid)
        reference = transformers.AutoModelForCausalLM.from_pretrained(path)
        ids = tokens()
        mine = logits(model, ids, grid)
        difference = None
        if mine is not None:
            wanted = reference(ids).logits
            difference = float((mine[..., : wanted.shape[-1]] - wanted).abs().max())
            assert float(mine[..., wanted.shape[-1] :].abs().max()) == 0.0
        state = reference.state_dict()
        if arch.tied:
            state.pop("lm_head.weight")
        streamed = {n: t.clone() for n, t in WeightStream(model, arch, grid)}
        assert streamed.keys() == state.keys()
        changed = [n for n, t in streamed.items() if not torch.equal(t, state[n])]
        results.append((difference, changed))
    return results


@pytest.mark.parametrize(("tensor", "pipeline", "sequence"), LAYOUTS)
def test_logits_and_round_trip(ranks, checkpoints, tensor, pipeline, sequence):
    per_rank = ranks.run(compare, tensor * pipeline, checkpoints, tensor, pipeline, sequence)
    for path, *results in zip(checkpoints, *per_rank, strict=True):
        worst = max(d for d, _ in results if d is not None)
        print(f"{Path(path).name}: logits differ by {worst:.1e}")
        assert worst < 1e-4, f"{path}: logits differ by {worst}"
        assert all(changed == [] for _, changed in results), path


def refuse(path, tensor, pipeline, edit):
    """The message with which this checkpoint or layout is refused."""
    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.build import build_model
    from megaopd.models.config import ModelConfig
    from megaopd.models.weights import load_hf_weights
    from megaopd.parallel import ParallelConfig, make_grid

    try:
        grid = make_grid(ParallelConfig(tensor, pipeline))
        arch = architecture({**read_hf_config(path), **edit})
        load_hf_weights(build_model(arch, ModelConfig(path=path), grid), path, arch, grid)
    except UserError as err:
        return str(err)
    return ""


@pytest.mark.parametrize(
    ("edit", "tensor", "pipeline", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, 1, 1, "architecture GPT2LMHeadModel"),
        ({"num_hidden_layers": 5}, 1, 1, "model.layers.4.input_layernorm.weight"),
        ({"num_hidden_layers": 3}, 1, 1, "unexpected ['model.layers.3."),
        ({"intermediate_size": 96}, 1, 1, "mlp.gate_proj.weight has shape (128, 64)"),
        ({"hidden_size": 32}, 1, 1, "give a shard of shape"),
        ({"mlp_bias": True}, 1, 1, "missing ['model.layers.0.mlp.down_proj.bias'"),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None}, 1, 1, "rope scaling"),
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, 2, 1, "9 attention heads"),
        ({"num_hidden_layers": 3}, 1, 2, "3 layers with pipeline parallel 2"),
    ],
)
def test_what_does_not_fit_is_refused(ranks, checkpoints, edit, tensor, pipeline, said):
    messages = ranks.run(refuse, tensor * pipeline, checkpoints[0], tensor, pipeline, edit)
    assert all(said in message for message in messages), messages


def test_corrupt_safetensors_is_refused(ranks, tmp_path):
    tiny("llama", tied=True).save_pretrained(tmp_path)
    file = Path(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    (message,) = ranks.run(refuse, 1, str(tmp_path), 1, 1, {})
    assert "cannot read" in message and "intact safetensors" in message
