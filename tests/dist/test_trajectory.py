"""The training trajectory is the same under every layout, and a planted fault is noticed.

Losses alone would not tell: a wrong gradient shows in the gradient norm at once and in the loss a step
later. Clipping is active, micro-batches hold unequal numbers of tokens, teacher and student differ in
width and depth.
"""

import pytest

from tests.dist.models import VOCAB, save_tiny

STEPS = 4
# world, tensor, pipeline, sequence parallel, distributed optimizer
LAYOUTS = {
    "tp2": (2, 2, 1, False, False),
    "tp2-sp": (2, 2, 1, True, True),
    "pp2": (2, 1, 2, False, False),
    "dp2-zero1": (2, 1, 1, False, True),
    "tp2-pp2-sp-zero1": (4, 2, 2, True, True),
    "tp2-dp2-sp-zero1": (4, 2, 1, True, True),
    "pp2-dp2-zero1": (4, 1, 2, False, True),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    wide = dict(hidden_size=96, num_hidden_layers=6)
    return {
        tied: (
            str(save_tiny(root / "student", "qwen3", tied=tied)),
            str(save_tiny(root / "teacher", "qwen3", tied=not tied, seed=11, **wide)),
        )
        for tied in (False, True)
    }


def samples(step, count=8):
    """`count` random samples whose prompts and responses have unequal lengths."""
    import random

    from megaopd.data.types import Prompt, Sample

    rng = random.Random(step)
    made = []
    for i in range(count):
        ids = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 6) + rng.randint(1, 9))]
        cut = rng.randint(1, len(ids) - 1)
        prompt = Prompt(f"{step}/{i}", tuple(ids[:cut]), "", None, "", {})
        log_probs = tuple(-rng.uniform(3, 6) for _ in ids[cut:])  # about log(1 / VOCAB)
        made.append(Sample(prompt, tuple(ids[cut:]), log_probs, "stop", 0))
    return made


def trajectory(paths, layout, fault="", steps=STEPS, **values):
    """[(loss, grad_norm, ...)] of `steps` steps, and the sum of every exported weight.

    values: of the objective. The numbers after the first two are its list and importance metrics.
    """
    from megaopd.models.arch import architecture, padded_vocab, read_hf_config
    from megaopd.models.config import ModelConfig
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.batch import make_micro_batches
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.student import Student
    from megaopd.trainer.teacher import Teacher

    _, tensor, pipeline, sequence, distributed = layout
    grid = make_grid(ParallelConfig(tensor, pipeline, sequence=sequence))
    undo = plant(fault, grid)
    student_path, teacher_path = paths
    arch = architecture(read_hf_config(student_path))
    # Adam divides the smallest gradients by themselves, so that rounding noise becomes a full step; a
    # larger eps keeps the comparison about the gradients.
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.5, eps=1e-5, distributed=distributed)
    objective = ObjectiveConfig(chunk_size=7, **values)
    student = Student(
        ModelConfig(path=student_path), arch, grid, objective, optim, total_steps=steps
    )
    teacher = None
    if objective.needs_teacher:
        teacher = Teacher(
            ModelConfig(path=teacher_path),
            architecture(read_hf_config(teacher_path)),
            grid,
            vocab_rows=padded_vocab(arch.vocab, tensor, 8),
        )
    curve = []
    for step in range(steps):
        batch = make_micro_batches(
            samples(step),
            grid=grid,
            micro_batch_size=2,
            pad_id=0,
            loss_agg=objective.loss_agg,
        )
        metrics = student.update(batch, teacher)
        more = [metrics[n] for n in metrics if n in objective.list_statistics or "tis/" in n]
        curve.append((metrics["loss"], metrics["grad_norm"], *more))
    weights = {n: float(t.double().abs().sum()) for n, t in student.weights()}
    undo()
    return curve, weights


def plant(fault, grid):
    """Break megatron-core's gradient reduction in one way; a function that mends it."""
    from megatron.core.distributed import finalize_model_grads as module

    from megaopd.trainer import optim

    names = {
        "sequence-parallel norm": "_allreduce_non_tensor_model_parallel_grads",
        "tied embedding": "_allreduce_word_embedding_grads",
    }
    import sys

    module = sys.modules["megatron.core.distributed.finalize_model_grads"]
    if fault in names:
        original = getattr(module, names[fault])
        setattr(module, names[fault], lambda *a, **k: None)
        return lambda: setattr(module, names[fault], original)
    if fault == "data-parallel scale":
        finalize = optim._finalize

        def scaled(*args, **kwargs):
            finalize(*args, **kwargs)
            args[1][0].scale_gradients(1.0 / grid.dp_size)

        optim._finalize = scaled
        return lambda: setattr(optim, "_finalize", finalize)
    return lambda: None


def differences(reference, other):
    """Largest relative difference of loss and of gradient norm, and of any weight's size."""
    (curve, weights), (other_curve, other_weights) = reference, other
    loss = max(abs(a[0] / b[0] - 1) for a, b in zip(curve, other_curve, strict=True))
    norm = max(abs(a[1] / b[1] - 1) for a, b in zip(curve, other_curve, strict=True))
    size = max(abs(weights[n] / other_weights[n] - 1) for n in weights)
    return loss, norm, size


@pytest.fixture(scope="module")
def reference(ranks, checkpoints):
    single = (1, 1, 1, False, False)
    made = {}

    def get(tied, **values):
        key = (tied, *values.items())
        if key not in made:
            (made[key],) = ranks.run(trajectory, 1, checkpoints[tied], single, **values)
        return made[key]

    return get


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_same_trajectory_under_every_layout(ranks, checkpoints, reference, name, tied):
    layout = LAYOUTS[name]
    per_rank = ranks.run(trajectory, layout[0], checkpoints[tied], layout)
    assert all(r[0] == per_rank[0][0] for r in per_rank), "ranks report different metrics"
    loss, norm, size = differences(reference(tied), per_rank[0])
    print(f"{name} tied={tied}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= 2e-6 and norm <= 1e-5 and size <= 1e-5, (loss, norm, size)


@pytest.mark.parametrize(
    "values",
    [
        {"loss": "fkl"},
        {"loss": "sft"},
        {"loss_agg": "seq-mean-token-mean"},
        {"support": "student_topk", "k": 8, "entropy_coef": 0.1},
        {"loss": "k2", "stats_k": 8, "tis": "mask"},
    ],
    ids=str,
)
def test_same_trajectory_of_other_objectives(ranks, checkpoints, reference, values):
    layout = LAYOUTS["tp2-pp2-sp-zero1"]
    per_rank = ranks.run(trajectory, 4, checkpoints[True], layout, **values)
    assert all(r[0] == per_rank[0][0] for r in per_rank), "ranks report different metrics"
    single = reference(True, **values)
    found = differences(single, per_rank[0])
    # Few tokens hold most of the weight, and each weight is an exponential of a rounded log-prob.
    loose = 20 if "tis" in values else 1
    assert found[0] <= 2e-6 * loose and found[1] <= 1e-5 * loose and found[2] <= 1e-5, found
    more = [[step[2:] for step in curve] for curve, _ in (single, per_rank[0])]
    assert len(more[0][0]) == (5 if "k" in values else 7 if "tis" in values else 0)
    assert more[0] == [pytest.approx(step, rel=1e-5 * loose) for step in more[1]]
    if "tis" in values:
        assert all(0.1 < clipped < 0.9 for *_, clipped in more[0]), "nothing is dropped"


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("sequence-parallel norm", "tp2-sp"),
        ("tied embedding", "pp2"),
        ("data-parallel scale", "dp2-zero1"),
    ],
)
def test_a_planted_fault_is_noticed(ranks, checkpoints, reference, fault, name):
    layout = LAYOUTS[name]
    per_rank = ranks.run(trajectory, layout[0], checkpoints[True], layout, fault=fault)
    _, norm, _ = differences(reference(True), per_rank[0])
    print(f"{fault}: gradient norm off by {norm:.1e}")
    assert norm > 1e-3, f"{fault}: gradient norm off by {norm} only"


def test_the_trajectory_moves(reference):
    """Clipping is active and the objective falls: the comparison above is not of constants."""
    curve, _ = reference(True)
    assert all(norm > 0.5 for _, norm, *_ in curve)
    assert curve[-1][0] != curve[0][0]
