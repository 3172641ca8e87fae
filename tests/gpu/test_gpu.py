"""What only a GPU can show: Transformer Engine layers, bf16 training, a loss without host syncs.

The bounds were set from the same comparisons on a CPU (fp32 7e-7 and bf16 1.5e-2 for the logits,
bf16 5e-3 for the loss), widened for tensor cores; they have not been measured on a GPU yet.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False", allow_module_level=True)

from megaopd import platform
from tests.dist.models import tiny, tokens

pytestmark = pytest.mark.gpu

DTYPES = ["float32", "bfloat16"]
# Norm-wise. Transformer Engine multiplies fp32 matrices in TF32 (10 bits of mantissa).
LOGITS = {"float32": 5e-3, "bfloat16": 5e-2}
# torch multiplies fp32 in fp32 by default; bf16 rounds logits and their gradient to 8 bits.
LOSS = {"float32": 2e-5, "bfloat16": 2e-2}
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def error(got, want):
    """Norm-wise relative error."""
    want = want.double().cpu()
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.fixture(scope="module")
def grid():
    """A world of one, taken down again so that other tests find none."""
    from megaopd.parallel import ParallelConfig, make_grid

    before = {name: os.environ.pop(name, None) for name in RANK_VARIABLES}
    yield make_grid(ParallelConfig())
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def save(root, name, dtype, **changes):
    """A tiny Qwen3 in `dtype` on disk, and its path."""
    model = tiny("qwen3", **changes).to(getattr(torch, dtype))
    model.save_pretrained(root / name)
    return str(root / name)


def hidden_states(model, grid, ids):
    """[S, B, H]."""
    from megaopd.trainer.batch import MicroBatch
    from megaopd.trainer.step import run_schedule

    ids = ids.to(platform.device())
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    none = torch.zeros(0, device=ids.device)
    micro = MicroBatch(ids, positions, None, none, none, none, none, False)

    def forward_step(iterator, stage):
        batch = next(iterator)
        return stage(batch.tokens, batch.position_ids, None), lambda h, non_loss_data=True: h

    with torch.no_grad():
        return run_schedule(model, grid, [micro], forward_step, forward_only=True, collect=True)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_transformer_engine_layers(grid, tmp_path, dtype, tied):
    """Logits equal transformers' in fp32; the weights come back bit for bit."""
    if not platform.use_transformer_engine():
        pytest.skip("transformer_engine does not import")
    check_layers(grid, tmp_path, dtype, tied)


def check_layers(grid, root, dtype, tied):
    import transformers

    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.build import build_model
    from megaopd.models.config import ModelConfig
    from megaopd.models.weights import WeightStream, load_hf_weights

    path = save(root, "model", dtype, tied=tied)
    arch = architecture(read_hf_config(path))
    model = build_model(arch, ModelConfig(path=path, dtype=dtype), grid).to(platform.device())
    load_hf_weights(model, path, arch, grid)
    ids = tokens()
    got = (hidden_states(model.eval(), grid, ids) @ model.output_weight().t()).transpose(0, 1)
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        want = reference(ids).logits
    assert 0 < error(got[..., : arch.vocab], want) < LOGITS[dtype]

    stored = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()
    if tied:
        stored.pop("lm_head.weight")
    streamed = {name: tensor.cpu().clone() for name, tensor in WeightStream(model, arch, grid)}
    assert streamed.keys() == stored.keys()
    assert [n for n, t in streamed.items() if not torch.equal(t, stored[n])] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rkl", "fkl"])
def test_fused_divergence_without_a_host_sync(dtype, kind):
    check_divergence(dtype, kind, torch.device("cuda"))


def check_divergence(dtype, kind, device):
    from megaopd.losses import fused_linear_divergence, reference

    vocab, padded, count, width, teacher_width = 32003, 32008, 200, 256, 384
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = [
        random(count, width),
        random(padded, width) / width**0.5,
        random(count, teacher_width),
        random(padded, teacher_width) / teacher_width**0.5,
    ]
    tensors = [x.to(getattr(torch, dtype)) for x in tensors]
    weights = torch.rand(count, generator=generator) / count

    full = [x.double() for x in tensors]
    full[0].requires_grad_(), full[1].requires_grad_()
    per_token = reference.DIVERGENCES[kind](
        full[0] @ full[1].t(), full[2] @ full[3].t(), vocab_size=vocab
    )
    want = (per_token * weights.double()).sum()
    want.backward()

    mine = [x.to(device) for x in tensors]
    mine[0].requires_grad_(), mine[1].requires_grad_()
    token_weights = weights.to(device)

    def call():
        result = fused_linear_divergence(
            *mine, token_weights=token_weights, kind=kind, vocab_size=vocab, chunk_size=64
        )
        result.loss.backward()
        return result.loss

    call()  # cuBLAS and the allocator may synchronise the first time
    mine[0].grad = mine[1].grad = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss = call()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    pairs = {
        "loss": (loss.detach(), want.detach()),
        "hidden": (mine[0].grad, full[0].grad),
        "weight": (mine[1].grad, full[1].grad),
    }
    errors = {name: error(got, expected) for name, (got, expected) in pairs.items()}
    assert all(e < LOSS[dtype] for e in errors.values()), errors


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_steps_with_a_teacher(grid, tmp_path, dtype):
    losses, norms = three_steps(grid, tmp_path, dtype)
    assert all(map(math.isfinite, losses + norms))
    assert min(norms) > 0
    assert losses[2] < losses[0]  # the same samples each time


def three_steps(grid, root, dtype):
    """Losses and gradient norms of three updates on the same samples."""
    from megaopd.models.arch import architecture, padded_vocab, read_hf_config
    from megaopd.models.config import ModelConfig
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.trainer.batch import make_micro_batches
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.student import Student
    from megaopd.trainer.teacher import Teacher
    from tests.dist.layouts import samples

    paths = [
        save(root, "student", dtype, tied=True),
        save(root, "teacher", dtype, tied=False, seed=11, hidden_size=96),
    ]
    archs = [architecture(read_hf_config(path)) for path in paths]
    models = [ModelConfig(path=path, dtype=dtype) for path in paths]
    objective = ObjectiveConfig(chunk_size=7)
    student = Student(models[0], archs[0], grid, objective, OptimConfig(lr=2e-3), total_steps=3)
    teacher = Teacher(models[1], archs[1], grid, vocab_rows=padded_vocab(archs[0].vocab, 1, 8))
    micro_batches = make_micro_batches(
        samples(0), grid=grid, micro_batch_size=2, pad_id=0, loss_agg="token-mean"
    )
    done = [student.update(micro_batches, teacher) for _ in range(3)]
    return [step["loss"] for step in done], [step["grad_norm"] for step in done]


def test_quickstart(tmp_path):
    """The whole loop at TP=2 over NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip(
            f"needs 2 GPUs, found {torch.cuda.device_count()}: the quickstart runs two ranks"
        )
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    run = subprocess.run(
        [sys.executable, "-m", "megaopd", "quickstart", "--dir", str(tmp_path / "quickstart")],
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert (tmp_path / "quickstart" / "report.html").is_file()
