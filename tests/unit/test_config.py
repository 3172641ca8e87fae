"""A config is either right or refused with what was got, what was expected and how to fix it."""

import ast
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import megaopd
from megaopd import config as config_io
from megaopd.errors import UserError
from megaopd.inputs import check_run_dir
from megaopd.recipes import recipe
from megaopd.schema import Config, load_config, make_config, sampling_values
from megaopd.trainer.config import RoutedTeacherConfig

GOOD = ["student.path=s", "teacher.path=t", "data.source=task:addition3"]


def test_defaults_and_overrides():
    config = load_config(None, [*GOOD, "optim.lr=1", "run.dir=some/where", "objective.loss=fkl"])
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.run.dir == "some/where" and config.objective.loss == "fkl"


def test_the_resolved_config_round_trips(tmp_path):
    config = load_config(None, [*GOOD, "optim.lr=3e-5", "rollout.top_p=0.9"])
    config_io.save(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("optm.lr=1", "did you mean optm.lr?|did you mean optim?"),
        ("optim.lr=fast", "optim.lr = 'fast'"),
        ("run.steps=1.5", "run.steps = 1.5"),
        ("run.steps=0", "at least 1"),
        ("objective.loss=rlk", "'rkl'"),
        ("objective.temperature=0", "above 0"),
        ("optim.min_lr=1", "min_lr <= lr"),
        ("optim.warmup_steps=1000", "warm-up that ends within the run"),
        ("parallel.sequence=true", "parallel.tensor=2"),
        ("rollout.top_p=0", "(0, 1]"),
        ("rollout.teacher_mix=0.6", "in [0, 0.5]"),
        ("objective.loss=sft", "remove teacher.path"),
        ("teacher.path=", "set teacher.path"),
        ("teacher.kind=ema", "remove teacher.path"),
        ("teacher.ema_decay=1.0", "0 <= decay < 1"),
        ("teacher.window=0", "teacher.window = 0"),
        ("teacher.placement=separate", "set teacher_parallel.ranks"),
        ("teacher_parallel.tensor=2", "teacher.placement = same"),
        ("teacher_parallel.ranks=2", "teacher.placement = same"),
        ("teachers.math.path=m", "each in [teachers.NAME]"),
        ("teachers.math.pth=m", "did you mean teachers.math.path?"),
        ("data.source=", "data.source = ''"),
        ("trainer.micro_batch_tokens=100", "room for the longest sample"),
        ("parallel.virtual=2", "parallel.pipeline=2"),
        ("rollout=3", "rollout = 3"),
        ("steps", "section.key=value"),
        ("run.dir.x=1", "run.dir"),
    ],
)
def test_what_is_wrong_is_said(override, said):
    with pytest.raises(UserError) as caught:
        load_config(None, [*GOOD, override])
    assert any(option in str(caught.value) for option in said.split("|")), str(caught.value)


def test_kinds_of_teachers(tmp_path):
    values = ["student.path=s", "data.source=task:addition3"]
    config = load_config(None, [*values, "teacher.kind=live"])
    assert config.local_teachers == {} and config.ranks == 1
    named = ["teachers.math.path=m", 'teachers.math.routes=["task=math"]', "teachers.rest.path=r"]
    own = ["teacher.placement=separate", "teacher_parallel.ranks=4", "teacher_parallel.tensor=2"]
    config = load_config(None, [*values, *named, *own, "parallel.tensor=2"])
    assert list(config.local_teachers) == ["math", "rest"] and config.ranks == 6
    assert config.teachers["math"].routes == ("task=math",)
    config_io.save(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config
    for more in (["teacher.kind=live", *own], ["teachers.math.dtype=bfloat16"], ["teacher.kind=x"]):
        with pytest.raises(UserError):
            load_config(None, [*values, *more])


SEPARATE = ["teacher.path=t", "teacher.placement=separate"]


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        (["parallel.expert=4"], 4),
        (["parallel.tensor=2", "parallel.expert=4", "parallel.pipeline=2"], 8),
        (["parallel.tensor=2", "parallel.context=2", "parallel.expert=2"], 4),
        (["teacher.placement=regrouped", "teacher_parallel.tensor=4", "parallel.pipeline=2"], 4),
        ([*SEPARATE, "teacher_parallel.ranks=2", "teacher_parallel.expert=2"], 3),
    ],
)
def test_the_fewest_ranks_of_a_layout(layout, ranks):
    values = ["student.path=s", "data.source=task:addition3", "teacher.path=t"]
    config = load_config(None, [*values, *layout])
    assert config.ranks == ranks and config.ranks - config.teacher_parallel.ranks == (
        config.student_ranks
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["rollout.engine=sglang"], "a server has one model"),
        (["rollout.temperature=0"], "and sampling"),
        (["teacher.offload=true"], "set teacher.offload=false"),
        (["teacher.placement=regrouped"], "set teacher.placement=same"),
        (["teacher.path=", "teacher.kind=ema"], "no teacher.path"),
        (["data.teacher_sees=answer"], "data.teacher_sees"),
        (
            ["objective.preset=posterior_fkl", "rollout.samples_per_prompt=8"],
            "set objective.rl=ppo",
        ),
        (["objective.second_loss=k2", "objective.second_from=10"], "set objective.tis=token"),
        (["objective.loss=k2", "objective.tis=reject"], "set objective.tis=token"),
        (["teacher.path=", "objective.loss=sft"], "objective.loss = sft"),
        (["objective.loss=k2"], "set objective.tis=token"),
        (["objective.preset=minillm"], "set objective.tis=token"),
    ],
)
def test_samples_that_a_teacher_has_a_part_in(values, said):
    with pytest.raises(UserError, match=said):
        load_config(None, [*GOOD, "rollout.teacher_mix=0.2", *values])


def test_a_mixture_with_the_teacher_is_no_mismatch():
    fits = ["rollout.teacher_mix=0.2", "objective.preset=minillm", "objective.tis=token"]
    assert not load_config(None, [*GOOD, *fits]).rollout.whole_law
    assert load_config(None, GOOD).rollout.whole_law
    only_sampling = make_config(sampling_values({"rollout": {"teacher_mix": 0.2}}), GOOD[::2])
    assert only_sampling.rollout.teacher_mix == 0


@pytest.mark.parametrize(
    "values",
    [
        ["teacher.kind=ema", "teacher.fp8=current"],
        ["teachers.a.path=t", "teacher.fp8=current"],
        ["teacher.kind=ema", "teacher.dtype=bfloat16"],
        ["teachers.a.path=t", "teacher.vocab_multiple=16"],
        ["teacher.kind=live", "teacher.recompute=full"],
        ["teachers.a.path=t", "teacher.moe_aux_loss_coef=0.1"],
        ["remote_teacher.addresses=['http://h:1']", "teacher.dtype=bfloat16"],
        [
            "teacher.path=t",
            "teacher.fp8=current",
            "teacher.fp8_params=true",
            "teacher.offload=true",
        ],
        [*SEPARATE, "teacher_parallel.expert=2", "teacher_parallel.ranks=1"],
    ],
)
def test_what_a_teacher_would_ignore_or_cannot_do_is_refused(values):
    with pytest.raises(UserError):
        load_config(None, ["student.path=s", "data.source=task:addition3", *values])


def test_a_run_directory_remembers_every_teacher(tmp_path):
    values = ["student.path=s", "data.source=task:addition3", f"run.dir={tmp_path}"]
    both = ["teachers.a.path=a", 'teachers.a.routes=["task=a"]', "teachers.b.path=b"]
    config_io.save(load_config(None, [*values, *both]), tmp_path / "config.toml")
    check_run_dir(load_config(None, [*values, *both, "run.steps=7"]), has_checkpoints=True)
    with pytest.raises(UserError, match=r"teachers\.a"):
        check_run_dir(load_config(None, [*values, both[2]]), has_checkpoints=True)


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(UserError, match="no config file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[run\nsteps = 1")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")


@pytest.mark.parametrize("name", ["teacher", "student", "opd"])
def test_packaged_recipes_load(name):
    extra = ["student.path=s"] + (["teacher.path=t"] if name == "opd" else [])
    load_config(recipe(f"quickstart/{name}"), extra)


def test_the_public_sections_are_pinned():
    sections = {f.name: f.type for f in fields(Config)}
    assert list(sections) == [
        "run", "student", "lora", "teacher", "teachers", "reference", "remote_teacher", "parallel",
        "teacher_parallel", "data", "mix", "rollout", "server", "agent", "objective", "optim",
        "trainer", "checkpoint", "eval", "report",
    ]  # fmt: skip


def test_every_field_is_documented():
    """A field without a comment beside or above it is one that a user cannot understand."""
    package = Path(megaopd.__file__).parent
    files = [*package.glob("*/config.py"), package / "objectives" / "spec.py"]
    for file in [*files, package / "schema.py"]:
        lines = file.read_text().splitlines()
        for section in ast.walk(ast.parse(file.read_text())):
            if not isinstance(section, ast.ClassDef) or section.name == "Config":
                continue
            for field in section.body:
                if isinstance(field, ast.AnnAssign):
                    near = lines[field.lineno - 2 : field.end_lineno]
                    assert any("#" in line for line in near), f"{file.name}: {near[1]}"


def test_config_imports_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megaopd.schema import load_config\n"
        f"print(load_config(None, {GOOD}).run.steps)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "100", out.stderr


def test_sections_are_frozen():
    config = load_config(None, GOOD)
    for f in fields(config):
        section = getattr(config, f.name)
        if f.name == "teachers":  # one section a name
            section = RoutedTeacherConfig(path="m")
        assert is_dataclass(section) and section.__dataclass_params__.frozen
