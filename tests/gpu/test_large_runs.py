"""Adapters, recompute, the optimizer on the host and device timing, on a GPU.

The bounds have not been measured on a GPU yet; they are those of tests/gpu/test_gpu.py.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False", allow_module_level=True)

from megaopd import platform
from tests.dist import lora_cases as cases
from tests.dist.layouts import Layout
from tests.gpu.test_gpu import LOGITS, error, grid, save  # noqa: F401  (grid is a fixture)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("grid")]
ONE = Layout(1)


def models(root, dtype):
    return [
        save(root, "student", dtype, tied=True),
        save(root, "teacher", dtype, tied=False, seed=11, hidden_size=96),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_the_model_with_adapters(tmp_path, dtype):
    """Also with Transformer Engine, whose fused norm the adapters compute once more."""
    from megaopd.models.lora import adapters_off, fold
    from tests.gpu.test_gpu import hidden_states, tokens

    student, teacher, place = cases.make_student(models(tmp_path, dtype), ONE, dtype=dtype)
    model = student.model
    before = hidden_states(model, place, tokens())
    curve = cases.train(student, teacher, place, range(3))
    assert all(norm > 0 for _, norm in curve)
    with_adapters = hidden_states(model, place, tokens())
    with adapters_off(model):
        assert torch.equal(hidden_states(model, place, tokens()), before)
    fold(model)
    assert error(hidden_states(model, place, tokens()), with_adapters) < LOGITS[dtype]
    assert error(with_adapters, before) > 0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recompute_gives_the_same_trajectory(tmp_path, kind, lora):
    paths = models(tmp_path, "float32")
    want, _ = cases.trajectory(paths, ONE, lora=lora)
    have, _ = cases.trajectory(paths, ONE, lora=lora, recompute=kind)
    for a, b in zip(want, have, strict=True):
        assert b == pytest.approx(a, rel=5e-3)


def test_the_optimizer_on_the_host(tmp_path):
    if not platform.use_transformer_engine():
        pytest.skip("transformer_engine does not import")
    paths = models(tmp_path, "bfloat16")
    want, _ = cases.trajectory(paths, ONE, lora=False, dtype="bfloat16")
    student, teacher, place = cases.make_student(
        paths, ONE, lora=False, dtype="bfloat16", cpu_offload=0.5
    )
    have = cases.train(student, teacher, place, range(cases.STEPS))
    for a, b in zip(want, have, strict=True):
        assert b == pytest.approx(a, rel=5e-2)
    inner = student.optimizer.chained_optimizers[0].optimizer
    where = {state["exp_avg"].device.type for state in inner.state.values()}
    assert where == {"cpu", "cuda"}


def test_moments_in_bfloat16(tmp_path):
    if not platform.use_transformer_engine():
        pytest.skip("transformer_engine does not import")
    paths = models(tmp_path, "bfloat16")
    want, _ = cases.trajectory(paths, ONE, lora=False, dtype="bfloat16")
    have, _ = cases.trajectory(paths, ONE, lora=False, dtype="bfloat16", state_dtype="bfloat16")
    for a, b in zip(want, have, strict=True):
        assert b == pytest.approx(a, rel=5e-2)


def test_a_stopwatch_measures_the_device():
    watch = platform.Stopwatch()
    x = torch.randn(4096, 4096, device="cuda")
    watch.start()
    for _ in range(20):
        x = (x @ x).clamp(-1, 1)
    watch.stop()
    assert 1e-4 < watch.seconds() < 10
