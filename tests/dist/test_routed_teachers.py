"""Several teachers, each for its samples; and a teacher's longer prompt, aligned by response."""

import dataclasses

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
)

STEPS = 3


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A student and two teachers of other widths and depths."""
    root = tmp_path_factory.mktemp("hf")
    wide = {"hidden_size": 96, "num_hidden_layers": 6}
    return [
        str(save_tiny(root / "student", "qwen3", tied=True)),
        str(save_tiny(root / "a", "qwen3", tied=False, seed=11, **wide)),
        str(save_tiny(root / "b", "llama", tied=False, seed=12, num_hidden_layers=2)),
    ]


def mixed(step):
    """Samples of two sources, one in three from the second."""
    made = samples(step)
    for i, sample in enumerate(made):
        meta = {"source": "b" if i % 3 == 2 else "a"}
        prompt = dataclasses.replace(sample.prompt, meta=meta)
        made[i] = dataclasses.replace(sample, prompt=prompt)
    return made


def make_frozen(paths, grid, arrangement, bridge=None):
    from megaopd.models.arch import padded_vocab
    from megaopd.models.config import ModelConfig
    from megaopd.trainer.config import TeacherConfig, TeacherParallelConfig
    from megaopd.trainer.teachers.build import make_teacher

    student_arch, *teacher_archs = archs(paths)
    student = make_student(paths[0], student_arch, grid)
    frozen = {
        name: (ModelConfig(path=path), arch)
        for name, path, arch in zip("ab", paths[1:], teacher_archs, strict=True)
    }
    assert student.vocab_rows == padded_vocab(student_arch.vocab, grid.tp_size, 8)
    layout = TeacherParallelConfig(pipeline=2 if arrangement == "regrouped" else 1)
    config = TeacherConfig(placement=arrangement)
    teacher = make_teacher(config, layout, frozen, grid, student, ModelConfig(paths[0]), bridge)
    return student, teacher


def batches(grid, some, router=None):
    from megaopd.trainer.batch import make_micro_batches
    from megaopd.trainer.teachers.routed import routed_micro_batches

    def make(part, whole=None):
        return make_micro_batches(
            part,
            grid=grid,
            micro_batch_size=2,
            pad_id=0,
            loss_agg="token-mean",
            whole=whole,
        )

    return make(some) if router is None else routed_micro_batches(some, router, make)


def routed(paths, student_layout, arrangement):
    """The curve and the weights, as test_trajectory.differences compares them."""
    import torch.distributed as dist

    from megaopd.models.config import ModelConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.teachers.ranks import serve
    from megaopd.trainer.teachers.routed import Router
    from megaopd.worlds import join_worlds

    bridge = None
    if arrangement == "separate":
        dist.barrier()
        dist.destroy_process_group()
        bridge = join_worlds(1)
        if bridge.is_teacher:
            _, *teacher_archs = archs(paths)
            models = [ModelConfig(path=path) for path in paths[1:]]
            frozen = dict(zip("ab", zip(models, teacher_archs, strict=True), strict=True))
            serve(frozen, ParallelConfig(), bridge)
            return None
    grid = make_grid(parallel(student_layout))
    student, teacher = make_frozen(paths, grid, arrangement, bridge)
    router = Router({"a": [], "b": ["source=b"]})
    curve = []
    for step in range(STEPS):
        metrics = student.update(batches(grid, mixed(step), router), teacher)
        curve.append((metrics["loss"], metrics["grad_norm"]))
    teacher.close()
    return curve, {n: float(t.double().abs().sum()) for n, t in student.weights()}


@pytest.fixture(scope="module")
def reference(ranks, paths):
    return ranks.run(routed, 1, paths, (1, 1, False), "same")[0]


@pytest.mark.parametrize(
    ("world", "layout", "arrangement"),
    [
        (4, (2, 1, True), "same"),
        (4, (2, 2, False), "regrouped"),
        (3, (1, 2, False), "separate"),
        (3, (2, 1, True), "separate"),
    ],
    ids=str,
)
def test_two_teachers_train_alike_under_every_arrangement(
    ranks, paths, reference, world, layout, arrangement
):
    found = ranks.run(routed, world, paths, layout, arrangement)
    assert_same(reference, found[:2] if arrangement == "separate" else found, arrangement)


def sums(paths):
    """(loss, tokens) of the routed step, and of each teacher on its samples alone."""
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.teachers.routed import Router

    grid = make_grid(ParallelConfig())
    student, teachers = make_frozen(paths, grid, "same")
    router = Router({"a": [], "b": ["source=b"]})
    whole = student.score(batches(grid, mixed(0), router), teachers)
    alone = []
    for name, teacher in teachers.teachers.items():
        some = [s for s in mixed(0) if s.prompt.meta["source"] == name]
        alone.append(student.score(batches(grid, some), teacher))
    return [(m["loss"], m["tokens"]) for m in (whole, *alone)]


def test_the_loss_is_the_sum_over_the_teachers(ranks, paths):
    ((whole, *parts),) = ranks.run(sums, 1, paths)
    assert whole[1] == sum(tokens for _, tokens in parts)
    assert whole[0] * whole[1] == pytest.approx(sum(a * b for a, b in parts), rel=1e-6)
    assert abs(parts[0][0] / parts[1][0] - 1) > 0.01, "the teachers say the same"


def test_a_prompt_has_exactly_one_teacher():
    from megaopd.errors import UserError
    from megaopd.trainer.teachers.routed import Router

    prompt = dataclasses.replace(samples(0)[0].prompt, task="math", meta={"level": 3})
    assert Router({"x": ["task=math"], "y": []})(prompt) == "x"
    assert Router({"x": ["task=code"], "y": []})(prompt) == "y"
    assert Router({"x": ["level=3"], "y": ["task=code"]})(prompt) == "x"
    for routes in ({"x": ["task=math"], "y": ["level=3"]}, {"x": ["task=code"]}):
        with pytest.raises(UserError, match="exactly one teacher"):
            Router(routes)(prompt)
    with pytest.raises(UserError, match="no routes"):
        Router({"x": [], "y": []})


def hidden(paths, layout, arrangement):
    """The teacher's rows of privileged samples, and the samples' rows: (hidden, sources)."""
    from megaopd.models.arch import padded_vocab
    from megaopd.models.config import ModelConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.teacher import Teacher
    from megaopd.trainer.teachers.exchange import RegroupedTeacher
    from megaopd.worlds import second_layout

    grid = make_grid(parallel(layout))
    arch, teacher_arch, _ = archs(paths)
    config, rows = ModelConfig(path=paths[1]), padded_vocab(arch.vocab, grid.tp_size, 8)
    if arrangement == "same":
        teacher = Teacher(config, teacher_arch, grid, vocab_rows=rows)
    else:
        second = second_layout(ParallelConfig(pipeline=2))
        teacher = RegroupedTeacher(config, teacher_arch, grid, second, vocab_rows=rows)
    micro_batches = batches(grid, privileged(0))
    made = teacher.hidden_states(micro_batches)
    return [(h, m.sources_T) for h, m in zip(made, micro_batches, strict=True) if h is not None]


@pytest.mark.parametrize(
    ("world", "layout", "arrangement"),
    [(1, (1, 1, False), "same"), (2, (2, 1, False), "regrouped"), (2, (1, 2, False), "same")],
    ids=str,
)
def test_rows_are_those_of_the_longer_prompt(ranks, paths, world, layout, arrangement):
    """transformers on the teacher's own sequence, at the rows that predict the response."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(paths[1]).float().eval()
    made = privileged(0)
    dense = []
    for sample in made:
        ids = torch.tensor([sample.teacher_prompt + sample.response_ids])
        with torch.no_grad():
            dense.append(model.model(ids).last_hidden_state[0])
    seen = set()
    for per_rank in ranks.run(hidden, world, paths, layout, arrangement):
        for rows, sources in per_rank:
            assert len(rows) == len(sources) and len(rows) > 0
            for row, source in zip(rows, sources.tolist(), strict=True):
                number, position = source >> 32, source & 0xFFFFFFFF
                offset = position - len(made[number].prompt.token_ids)  # -1 predicts the first
                want = dense[number][len(made[number].teacher_prompt) + offset]
                assert torch.allclose(row, want, atol=2e-5), (number, offset)
                seen.add((number, offset))
    assert len(seen) == sum(len(sample.response_ids) for sample in made)
    assert any(sample.privileged for sample in made)
