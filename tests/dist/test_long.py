"""A response of 32,768 tokens: through the limits of data and rollout, and through an update."""

import time

import pytest

from megaopd.errors import UserError
from tests.dist.models import save_tiny
from tools.bench.measure import LiveBytes

PROMPT, RESPONSE, VOCAB = 64, 32_768, 8_192
SMALL = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": PROMPT + RESPONSE,
    "eos_token_id": 1,
}


def long_sample():
    import random

    from megaopd.data.types import Prompt, Sample

    rng = random.Random(4)
    ids = [rng.randrange(VOCAB) for _ in range(PROMPT + RESPONSE)]
    prompt = Prompt("0", tuple(ids[:PROMPT]), "", None, "", {})
    log_probs = tuple(-9.0 for _ in ids[PROMPT:])
    return Sample(prompt, tuple(ids[PROMPT:]), log_probs, "length", 0)


def test_the_limits_let_it_pass(tmp_path):
    """Configuration, requests and padding; one position too few is refused before anything runs."""
    from megaopd.data.packing import pad_batch
    from megaopd.rollout.base import Request, SamplingParams, check_requests
    from megaopd.schema import make_config

    config = make_config(
        {"student": {"path": str(tmp_path)}, "data": {"source": "task:addition3"}},
        ["objective.loss=sft", f"rollout.max_new_tokens={RESPONSE}", "optim.lr=1e-6"],
    )
    sample = long_sample()
    params = SamplingParams.from_config(config.rollout)
    requests = [Request(sample.prompt, 1, 0)]
    check_requests(requests, params, vocab=VOCAB, max_positions=PROMPT + RESPONSE)
    with pytest.raises(UserError, match="64 tokens \\+ 32768 new ones"):
        check_requests(requests, params, vocab=VOCAB, max_positions=PROMPT + RESPONSE - 1)
    batch = pad_batch([sample], pad_id=0, multiple_of=8)
    assert batch.position_ids[0].tolist() == list(range(PROMPT + RESPONSE))
    assert int(batch.loss_mask.sum()) == RESPONSE


def update(paths, recompute):
    """(loss, gradient norm, peak bytes, seconds) of one update on the long sample."""
    from megaopd.models.arch import architecture, padded_vocab, read_hf_config
    from megaopd.models.config import ModelConfig
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.batch import make_micro_batches
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.student import Student
    from megaopd.trainer.teacher import Teacher

    grid = make_grid(ParallelConfig())
    archs = [architecture(read_hf_config(path)) for path in paths]
    student = Student(
        ModelConfig(path=paths[0], recompute=recompute),
        archs[0],
        grid,
        ObjectiveConfig(chunk_size=512),
        OptimConfig(lr=1e-3),
    )
    rows = padded_vocab(VOCAB, 1, 8)
    teacher = Teacher(ModelConfig(path=paths[1]), archs[1], grid, vocab_rows=rows)
    micro_batches = make_micro_batches(
        [long_sample()], grid=grid, micro_batch_size=1, pad_id=0, loss_agg="token-mean"
    )
    begun = time.monotonic()
    with LiveBytes() as live:
        metrics = student.update(micro_batches, teacher)
    return metrics["loss"], metrics["grad_norm"], live.peak, time.monotonic() - begun


@pytest.mark.slow
def test_one_update_in_bounded_memory(ranks, tmp_path):
    """The logits of both models would be 2.1 GB; what is held is far below one of them."""
    paths = [
        str(save_tiny(tmp_path / "student", "qwen3", tied=True, **SMALL)),
        str(save_tiny(tmp_path / "teacher", "qwen3", tied=True, seed=11, **SMALL)),
    ]
    found = {kind: ranks.run(update, 1, paths, kind, timeout=600)[0] for kind in ("none", "full")}
    for kind, (loss, norm, peak, seconds) in found.items():
        print(f"recompute {kind}: peak {peak / 1e6:.0f} MB, {seconds:.0f} s, {loss=} {norm=}")
    assert found["none"][0] == pytest.approx(found["full"][0], rel=1e-6)
    assert found["none"][1] == pytest.approx(found["full"][1], rel=1e-5)
    logits = RESPONSE * VOCAB * 4
    assert found["full"][2] < found["none"][2] < logits / 2
