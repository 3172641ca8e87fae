"""Turn-taking: what the trainer puts away comes back, and the trajectory is the same bitwise."""

import pytest

from tests.dist.layouts import samples
from tests.dist.models import save_tiny

STEPS = 3


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return (
        str(save_tiny(root / "student", "qwen3", tied=True)),
        str(save_tiny(root / "teacher", "qwen3", tied=False, seed=11)),
    )


def run(paths, layout, dtype, taking_turns):
    """[(loss, grad_norm)], bytes that were away in each phase, and bytes of the parameters."""
    from megaopd.models.arch import architecture, padded_vocab, read_hf_config
    from megaopd.models.config import ModelConfig
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.batch import make_micro_batches
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.offload import TurnTaking
    from megaopd.trainer.student import Student
    from megaopd.trainer.teacher import Teacher

    tensor, distributed = layout
    grid = make_grid(ParallelConfig(tensor))
    arch, teacher_arch = (architecture(read_hf_config(path)) for path in paths)
    rows = padded_vocab(arch.vocab, tensor, 8)
    student = Student(
        ModelConfig(path=paths[0], dtype=dtype),
        arch,
        grid,
        ObjectiveConfig(),
        OptimConfig(lr=1e-2, distributed=distributed),
        total_steps=STEPS,
    )
    teacher = Teacher(ModelConfig(path=paths[1], dtype=dtype), teacher_arch, grid, vocab_rows=rows)
    turns = TurnTaking(student, teacher)
    curve, away = [], []
    for step in range(STEPS):
        if taking_turns:
            away.append(turns.before_sync())
            assert all(b.grad_data.untyped_storage().nbytes() == 0 for b in student.ddp.buffers)
            before = {name: t.clone() for name, t in student.weights()}  # the sync reads them
            away.append(turns.before_rollout())
            assert all(p.untyped_storage().nbytes() == 0 for p in student.ddp.parameters())
            turns.before_update()
            assert all(t.equal(before[name]) for name, t in student.weights())
        batch = make_micro_batches(
            samples(step), grid=grid, micro_batch_size=2, pad_id=0, loss_agg="token-mean"
        )
        metrics = student.update(batch, teacher)
        curve.append((metrics["loss"], metrics["grad_norm"]))
    size = sum(p.numel() * p.element_size() for p in student.ddp.parameters())
    return curve, away, size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [(2, False), (2, True), (1, True)], ids=str)
def test_taking_turns_changes_nothing(ranks, checkpoints, layout, dtype):
    want = ranks.run(run, 2, checkpoints, layout, dtype, False)
    have = ranks.run(run, 2, checkpoints, layout, dtype, True)
    for (curve, _, _), (again, away, size) in zip(want, have, strict=True):
        assert curve == again
        # Gradients and the teacher are away from the first turn on; Adam's two moments of four
        # bytes a parameter (or this rank's share of them) once there are any.
        assert away[0] >= size and away[2] > away[0] and away[1] >= size
