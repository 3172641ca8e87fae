"""Teachers that are the student itself, against dense references; resume; offload."""

import pytest
import torch

from tests.dist.layouts import samples
from tests.dist.models import save_tiny
from tests.dist.test_teacher_grids import (
    archs,
    assert_same,
    make_student,
    parallel,
    privileged,
    train,
)

DECAY = 0.9


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("hf") / "student", "qwen3", tied=True))


def make(path, layout, kind, dtype="float32", **values):
    """(grid, student, its teacher)"""
    from megaopd.models.config import ModelConfig
    from megaopd.parallel import make_grid
    from megaopd.trainer.teachers.selves import CopiedTeacher, LiveTeacher

    grid = make_grid(parallel(layout))
    (arch,) = archs([path])
    student = make_student(path, arch, grid, dtype=dtype)
    if kind == "live":
        return grid, student, LiveTeacher(student)
    return grid, student, CopiedTeacher(student, ModelConfig(path, dtype), kind, **values)


def dense(model, student):
    """{name: full tensor} of a model in the student's layout."""
    from megaopd.models.weights import WeightStream

    return {n: t.clone() for n, t in WeightStream(model, student.arch, student.grid)}


def one_step(student, teacher, grid, batch):
    from megaopd.trainer.batch import make_micro_batches

    micro_batches = make_micro_batches(
        batch, grid=grid, micro_batch_size=2, pad_id=0, loss_agg="token-mean"
    )
    return student.update(micro_batches, teacher)


def averages(path, layout, dtype):
    """Largest differences of the average and of the teacher's weights from a dense average."""
    grid, student, teacher = make(path, layout, "ema", dtype, decay=DECAY)
    reference = {n: t.float() for n, t in dense(student.chunks, student).items()}
    before = {n: t.clone() for n, t in reference.items()}
    for step in range(3):
        one_step(student, teacher, grid, privileged(step))
        teacher.after_update()
        for name, theirs in dense(student.chunks, student).items():
            reference[name] = DECAY * reference[name] + (1 - DECAY) * theirs.float()
    exact = teacher.master or teacher.chunks
    average, used = dense(exact, student), dense(teacher.chunks, student)
    return (
        max(float((average[n] - reference[n]).abs().max()) for n in reference),
        max(float((used[n].float() - average[n]).abs().max()) for n in reference),
        max(float((reference[n] - before[n]).abs().max()) for n in reference),
    )


@pytest.mark.parametrize(
    ("world", "layout", "dtype"),
    [
        (1, (1, 1, False), "float32"),
        (2, (2, 1, True), "float32"),
        (4, (2, 2, True), "float32"),
        (2, (1, 2, False), "bfloat16"),
    ],
    ids=str,
)
def test_the_average_is_the_dense_one(ranks, path, world, layout, dtype):
    for off, rounded, moved in ranks.run(averages, world, path, layout, dtype):
        assert off <= 1e-6 and moved > 1e-3, (off, moved)
        assert rounded == 0 if dtype == "float32" else rounded <= 2**-8 * 4


def copies(path, kind, layout):
    """For each step whether the teacher equals the student after it, and the step it equals."""
    grid, student, teacher = make(path, layout, kind, every=2)
    past, found = [dense(student.chunks, student)], []
    for step in range(5):
        one_step(student, teacher, grid, privileged(step))
        teacher.after_update(epoch=(step + 1) // 3)  # an epoch of three steps
        past.append(dense(student.chunks, student))
        mine = dense(teacher.chunks, student)
        found.append(
            [i for i, old in enumerate(past) if all(t.equal(old[n]) for n, t in mine.items())]
        )
    return found


def test_copies_are_taken_when_due(ranks, path):
    for found in ranks.run(copies, 2, path, "periodic", (2, 1, True)):
        assert found == [[0], [2], [2], [4], [4]]
    for found in ranks.run(copies, 2, path, "previous_epoch", (1, 2, False)):
        assert found == [[0], [0], [3], [3], [3]]


def live(path, layout):
    """(KL at equal prompts, at privileged ones, the same from a copy, bytes beside the student)"""
    from megaopd.trainer.batch import make_micro_batches

    grid, student, teacher = make(path, layout, "live")
    mode = [m.training for m in student.ddp.modules()]

    def kl(batch, teacher):
        made = make_micro_batches(
            batch, grid=grid, micro_batch_size=2, pad_id=0, loss_agg="token-mean"
        )
        return student.score(made, teacher)["kl"]

    equal, told = kl(samples(0), teacher), kl(privileged(0), teacher)
    assert [m.training for m in student.ddp.modules()] == mode
    held = {p.untyped_storage().data_ptr() for p in student.ddp.parameters()}
    own = [p for p in teacher.parameters() if p.untyped_storage().data_ptr() not in held]
    if grid.is_last_stage:
        weight = teacher.output_weight()
        assert weight.untyped_storage().data_ptr() in held and not weight.requires_grad
    one_step(student, teacher, grid, samples(0))  # the gradient of a zero divergence
    _, fresh, copy = make(path, layout, "periodic")
    again = fresh.score(
        make_micro_batches(
            privileged(0), grid=fresh.grid, micro_batch_size=2, pad_id=0, loss_agg="token-mean"
        ),
        copy,
    )["kl"]
    size = sum(p.numel() * p.element_size() for p in fresh.ddp.parameters())
    return (
        equal,
        told,
        again,
        sum(p.numel() for p in own),
        size,
        sum(p.numel() * p.element_size() for p in copy.parameters()),
    )


def test_live_is_the_student_itself(ranks, path):
    for world, layout in ((1, (1, 1, False)), (2, (2, 1, True)), (2, (1, 2, False))):
        for equal, told, again, own, size, copied in ranks.run(live, world, path, layout):
            assert abs(equal) <= 1e-7 and told > 0.01, (equal, told)
            assert told == pytest.approx(again, rel=1e-6)
            assert own == 0 and copied == size, "live holds no second copy; a copied teacher does"


def buffers_untouched():
    """A module whose forward pass moves a buffer and FP8 metadata, as amax histories do."""
    from types import SimpleNamespace

    from megaopd.trainer.teachers.scoring import inference

    class Amax(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("history", torch.zeros(4))
            self.fp8_meta = {
                "scaling_fwd": SimpleNamespace(scale=torch.ones(1), amax_history=torch.zeros(4, 1))
            }

        def forward(self, x):
            self.history[0] = self.fp8_meta["scaling_fwd"].amax_history[0] = x.abs().max()
            return x

    module = Amax().train()
    with inference([module]):
        assert not module.training
        module(torch.full((2,), 7.0))
        assert module.history[0] == 7
    return module


def test_amax_histories_come_back():
    module = buffers_untouched()
    assert module.training and not module.history.any()
    assert not module.fp8_meta["scaling_fwd"].amax_history.any()


def resumed(path, layout, kind, directory, stop, **values):
    """The curve of four steps; with `stop`, by two students, the second from a checkpoint."""
    from multiprocessing import current_process
    from pathlib import Path

    from megaopd.trainer.checkpoint import Checkpoints

    grid, student, teacher = make(path, layout, kind, **values)
    if not stop:
        return train(student, teacher, grid, privileged)[0]
    current_process()._config["daemon"] = False  # megatron-core writes in processes of its own
    first = train(student, teacher, grid, privileged, steps=stop)[0]
    saved = Checkpoints(Path(directory), grid, keep=1)
    saved.save(stop, student, {}, Path(path), teacher)
    grid, student, teacher = make(path, layout, kind, **values)
    Checkpoints(Path(directory), grid, keep=1).load(stop, student, teacher)
    return first + train(student, teacher, grid, privileged, first=stop)[0]


@pytest.mark.parametrize(
    ("kind", "values"),
    [("ema", {"decay": 0.5}), ("ema", {"decay": 0.5, "offload": True}), ("periodic", {"every": 3})],
    ids=str,
)
def test_a_resumed_run_has_the_same_teacher(ranks, path, tmp_path, kind, values):
    layout = (2, 1, True)
    whole = ranks.run(resumed, 2, path, layout, kind, "", 0, **values)
    again = ranks.run(resumed, 2, path, layout, kind, str(tmp_path), 2, **values)
    assert whole == again


def test_self_teachers_train_alike_under_every_layout(ranks, path):
    (single,) = ranks.run(trajectory, 1, path, (1, 1, False))
    for world, layout in ((2, (2, 1, True)), (4, (1, 2, False))):
        assert_same(single, ranks.run(trajectory, world, path, layout), f"ema, {layout}")


def trajectory(path, layout, offload=False):
    grid, student, teacher = make(path, layout, "ema", decay=0.5, offload=offload)
    return train(student, teacher, grid, privileged)


def put_away(path, layout):
    """A frozen teacher that is on the host between its turns: same curve, and nothing is left."""
    from megaopd.models.arch import padded_vocab
    from megaopd.models.config import ModelConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.teacher import Teacher
    from megaopd.trainer.teachers.exchange import RegroupedTeacher
    from megaopd.worlds import second_layout

    curves, left = [], []
    for offload in (False, True):
        for regroup in (False, True):
            grid = make_grid(parallel(layout))
            (arch,) = archs([path])
            student = make_student(path, arch, grid)
            config, rows = ModelConfig(path=path), padded_vocab(arch.vocab, grid.tp_size, 8)
            if regroup:
                second = second_layout(ParallelConfig(1, 2))
                teacher = RegroupedTeacher(
                    config, arch, grid, second, vocab_rows=rows, offload=offload
                )
            else:
                teacher = Teacher(config, arch, grid, vocab_rows=rows, offload=offload)
            curves.append(train(student, teacher, grid, privileged)[0])
            held = [teacher.head] if regroup else []
            mine = [p for p in teacher.parameters() if all(p is not h for h in held)]
            away = [p for p in mine if not p.untyped_storage().nbytes()]
            left.append((len(away), len(mine)))
    return curves, left


def test_an_offloaded_teacher_changes_nothing(ranks, path):
    for curves, left in ranks.run(put_away, 2, path, (2, 1, True)):
        assert curves[0] == curves[2] and curves[1] == curves[3]
        (same, _), (other, _), (same_away, all_same), (other_away, all_other) = left
        assert same == other == 0
        # In place the output layer, which the loss reads, stays: here the tied embedding.
        assert same_away == all_same - 1 and other_away == all_other
