"""A teacher under another layout, on the same ranks or on its own, trains the same student.

The trajectory of every arrangement equals that of one rank which holds both models
(test_trajectory.py says why trajectories, and with what samples).
"""

import dataclasses
from itertools import product

import pytest

from tests.dist.layouts import differences, samples
from tests.dist.models import save_tiny
from tests.often import often

STEPS = 4
# world, student (tensor, pipeline, sequence, context, virtual), teacher likewise
REGROUPED = {
    "student tp2, teacher pp2": (2, (2, 1, False), (1, 2, False)),
    "student dp2, teacher tp2": (2, (1, 1, False), (2, 1, False)),
    "student tp2-sp, teacher dp2": (2, (2, 1, True), (1, 1, False)),
    "student tp2-pp2, teacher dp4": (4, (2, 2, False), (1, 1, False)),
    "student tp2-dp2-sp, teacher tp2-pp2-sp": (4, (2, 1, True), (2, 2, True)),
    "student pp2-dp2, teacher tp2-dp2": (4, (1, 2, False), (2, 1, False)),
    "student cp2, teacher dp2": (2, (1, 1, False, 2), (1, 1, False)),
    "student tp2-sp-cp2, teacher pp2-dp2": (4, (2, 1, True, 2), (1, 2, False)),
    "student pp2-vp2, teacher tp2": (2, (1, 2, False, 1, 2), (2, 1, False)),
}
# students, teachers, student, teacher
SEPARATE = {
    "student tp2, teacher of one rank": (2, 1, (2, 1, False), (1, 1, False)),
    "student tp2-sp, teacher pp2": (2, 2, (2, 1, True), (1, 2, False)),
    "student dp2, teacher tp2-sp": (2, 2, (1, 1, False), (2, 1, True)),
    "student pp2, teacher dp2": (2, 2, (1, 2, False), (1, 1, False)),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    wide = {"hidden_size": 96, "num_hidden_layers": 6}
    return {
        tied: (
            str(save_tiny(root / "student", "qwen3", tied=tied)),
            str(save_tiny(root / "teacher", "qwen3", tied=not tied, seed=11, **wide)),
        )
        for tied in (False, True)
    }


def archs(paths):
    from megaopd.models.arch import architecture, read_hf_config

    return [architecture(read_hf_config(path)) for path in paths]


def parallel(layout):
    from megaopd.parallel import ParallelConfig

    tensor, pipeline, sequence, context, virtual = (*layout, 1, 1)[:5]
    return ParallelConfig(tensor, pipeline, virtual, context, sequence=sequence)


def make_student(path, arch, grid, steps=STEPS, dtype="float32", lora=None, **values):
    from megaopd.models.config import ModelConfig
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.student import Student

    optim = OptimConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.5, eps=1e-5, distributed=False)
    objective = ObjectiveConfig(chunk_size=7, **values)
    return Student(
        ModelConfig(path, dtype), arch, grid, objective, optim, total_steps=steps, lora=lora
    )


def train(student, teacher, grid, batch=samples, steps=STEPS, first=0, packed=0, norms=False):
    """(curve, weights) as layouts.differences compares them; packed: tokens of a row; norms: of
    single terms are measured on the way."""
    from megaopd.trainer.batch import make_micro_batches

    curve = []
    for step in range(first, steps):
        micro_batches = make_micro_batches(
            batch(step),
            grid=grid,
            micro_batch_size=1 if packed else 2,
            micro_batch_tokens=packed,
            pad_id=0,
            loss_agg="token-mean",
        )
        metrics = student.updates([micro_batches], teacher, term_norms=norms)
        teacher.after_update()
        curve.append((metrics["loss"], metrics["grad_norm"]))
    return curve, {n: float(t.double().abs().sum()) for n, t in student.weights()}


def privileged(step):
    """Samples whose teacher reads a longer prompt (but one of them, which it shares)."""
    made = samples(step)
    for i, sample in enumerate(made[1:], 1):
        told = tuple((7 * j + i) % 101 for j in range(i + 2)) + sample.prompt.token_ids
        prompt = dataclasses.replace(sample.prompt, teacher_prompt_ids=told)
        made[i] = dataclasses.replace(sample, prompt=prompt)
    return made


BATCHES = {"plain": samples, "privileged": privileged}


def same_ranks(paths, student_layout, teacher_layout, batch="plain", packed=0):
    from megaopd.models.arch import padded_vocab
    from megaopd.models.config import ModelConfig
    from megaopd.parallel import make_grid
    from megaopd.trainer.teacher import Teacher
    from megaopd.trainer.teachers.exchange import RegroupedTeacher
    from megaopd.worlds import second_layout

    grid = make_grid(parallel(student_layout))
    arch, teacher_arch = archs(paths)
    student = make_student(paths[0], arch, grid)
    rows, config = padded_vocab(arch.vocab, grid.tp_size, 8), ModelConfig(path=paths[1])
    if teacher_layout is None:
        teacher = Teacher(config, teacher_arch, grid, vocab_rows=rows)
    else:
        layout = second_layout(parallel(teacher_layout))
        teacher = RegroupedTeacher(config, teacher_arch, grid, layout, vocab_rows=rows)
    return train(student, teacher, grid, BATCHES[batch], packed=packed)


@pytest.fixture(scope="module")
def reference(ranks, checkpoints):
    made = {}

    def get(tied, batch="plain"):
        if (tied, batch) not in made:
            single = (1, 1, False)
            (made[tied, batch],) = ranks.run(same_ranks, 1, checkpoints[tied], single, None, batch)
        return made[tied, batch]

    return get


def assert_same(reference, per_rank, what):
    assert all(r[0] == per_rank[0][0] for r in per_rank), "ranks report different metrics"
    assert all(norm > 0.5 for _, norm in per_rank[0][0]), "clipping is not active"
    loss, norm, size = differences(reference, per_rank[0])
    print(f"{what}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= 2e-6 and norm <= 1e-5 and size <= 1e-5, (loss, norm, size)


SOME_REGROUPED = [
    ("student tp2-dp2-sp, teacher tp2-pp2-sp", True),
    ("student pp2-vp2, teacher tp2", False),
]
SOME_SEPARATE = [("student tp2-sp, teacher pp2", True), ("student pp2, teacher dp2", False)]


@pytest.mark.parametrize(("name", "tied"), often(product(REGROUPED, [False, True]), SOME_REGROUPED))
def test_another_layout_on_the_same_ranks(ranks, checkpoints, reference, name, tied):
    world, student, teacher = REGROUPED[name]
    per_rank = ranks.run(same_ranks, world, checkpoints[tied], student, teacher)
    assert_same(reference(tied), per_rank, name)


@pytest.mark.parametrize("batch", BATCHES)
def test_packed_rows_of_the_student(ranks, checkpoints, reference, batch):
    """The teacher scores sequences, whatever rows the student packs them into."""
    for student, teacher in (((1, 2, False), (1, 1, False)), ((2, 1, True), (1, 2, False))):
        found = ranks.run(same_ranks, 2, checkpoints[True], student, teacher, batch, 40)
        assert_same(reference(True, batch), found, f"packed, {batch}")


def own_ranks(
    paths, teachers, student_layout, teacher_layout, batch="plain", window=2, norms=False, **values
):
    """On the student's ranks what `train` returns; on the teacher's (most under way, bytes)."""
    import torch.distributed as dist

    from megaopd.models.arch import padded_vocab
    from megaopd.models.config import ModelConfig
    from megaopd.parallel import make_grid
    from megaopd.trainer.teachers.ranks import SeparateTeacher, serve
    from megaopd.worlds import join_worlds

    dist.barrier()  # nobody leaves the pool's group while another still joins it
    dist.destroy_process_group()
    bridge = join_worlds(teachers)
    arch, teacher_arch = archs(paths)
    config = ModelConfig(path=paths[1])
    if bridge.is_teacher:
        service = serve({"": (config, teacher_arch)}, parallel(teacher_layout), bridge)
        return service.most_under_way, bridge.sent.get("hidden", 0)
    grid = make_grid(parallel(student_layout))
    student = make_student(paths[0], arch, grid, **values)
    rows = padded_vocab(arch.vocab, grid.tp_size, 8)
    teacher = SeparateTeacher(config, teacher_arch, grid, bridge, vocab_rows=rows, window=window)
    result = train(student, teacher, grid, BATCHES[batch], norms=norms)
    teacher.close()
    return result


@pytest.mark.parametrize(("name", "tied"), often(product(SEPARATE, [False, True]), SOME_SEPARATE))
def test_a_teacher_on_ranks_of_its_own(ranks, checkpoints, reference, name, tied):
    students, teachers, student, teacher = SEPARATE[name]
    found = ranks.run(own_ranks, students + teachers, checkpoints[tied], teachers, student, teacher)
    assert_same(reference(tied), found[:students], name)
    under_way = [most for most, _ in found[students:]]
    assert max(under_way) == 2, "the teacher never runs ahead by the window, or runs further"


def test_rows_that_are_looked_at_twice(ranks, checkpoints):
    """Passes that only measure take a separate teacher's rows, and the update has them again."""
    job = (checkpoints[True], 1, (2, 1, True), (1, 1, False))
    plain, told = (
        ranks.run(own_ranks, 3, *job, norms=norms, entropy_coef=0.01) for norms in (False, True)
    )
    assert plain[:2] == told[:2]


@pytest.mark.parametrize("arrangement", ["same", "regrouped", "separate"])
def test_privileged_prompts_under_every_arrangement(ranks, checkpoints, reference, arrangement):
    """The teacher's rows are those of the longer prompt, whoever computes them."""
    paths = checkpoints[True]
    if arrangement == "separate":
        found = ranks.run(own_ranks, 3, paths, 1, (2, 1, True), (1, 1, False), "privileged")[:2]
    else:
        teacher = None if arrangement == "same" else (1, 2, False)
        found = ranks.run(same_ranks, 2, paths, (2, 1, True), teacher, "privileged")
    assert_same(reference(True, "privileged"), found, arrangement)
