"""Every recipe is a run that parses, says how it is judged, and has its page."""

import re
from pathlib import Path

import pytest

from megaopd import cli
from megaopd.errors import UserError
from megaopd.recipes import FOLDER, filled, method, methods, places, recipe, stage_values
from megaopd.schema import load_config, make_config, sampling_values
from megaopd.study.methods import as_toml, check
from tools.recipe_table import _with_baselines, judged

DOCS = Path(__file__).parents[2] / "docs" / "methods"
STAGES = sorted(path.stem for path in (FOLDER / "stages").glob("*.toml"))
HEAD = '[recipe]\nabout = "mine"\n'


@pytest.mark.parametrize("variant", ["tiny", "full"])
@pytest.mark.parametrize("name", methods())
def test_both_variants_of_every_method_are_runs(name, variant, tmp_path):
    values = method(name).values(variant)
    assert set(places(values)) <= set(STAGES)
    config = check(values)
    assert (config.rollout.engine == "sglang") == (variant == "full")
    assert config.eval.prompts > 0, "nothing to judge it by"
    # What --show prints is that run.
    path = tmp_path / "run.toml"
    path.write_text(as_toml(name, variant))
    assert load_config(path) == make_config(values)


@pytest.mark.parametrize("name", methods())
def test_every_method_says_how_it_is_judged(name):
    one = method(name)
    assert one.metric and one.direction in ("up", "down", "none")
    assert one.baseline == "student" or one.baseline in methods()
    assert set(places(one.baseline_student)) <= set(STAGES)
    for text in (one.about, one.paper, one.when, one.cost):
        assert text.strip()


@pytest.mark.parametrize("name", methods())
def test_every_method_has_its_page(name):
    text = (DOCS / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n") and f"megaopd recipe {name}" in text
    assert f"[{name}]({name}.md)" in (DOCS / "README.md").read_text()


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_a_run_or_a_model(name):
    values = stage_values(name)
    kind = values.pop("stage")
    if kind["kind"] == "init":
        assert kind["shape"] in ("student", "teacher") and not values
        return
    assert set(places(values)) <= set(STAGES) - {name}
    values = filled(values, {one: f"<{one}>" for one in places(values)})
    if kind["kind"] == "sample":
        assert kind["prompts"] > 0
        values = sampling_values(values)
    make_config(values)


@pytest.mark.parametrize("path", sorted((FOLDER / "h100").glob("*.toml")), ids=lambda p: p.stem)
def test_runs_of_clusters_parse(path):
    load_config(recipe(f"h100/{path.stem}"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[objective]\nloss = 'rkl'\n", "recipe.about is not set"),
        (HEAD + "abuot = 'x'\n", "did you mean recipe.about?"),
        (HEAD + "direction = 'sideways'\n", "recipe.direction = 'sideways'"),
        (HEAD + "[optim]\nlrr = 1.0\n", "did you mean optim.lr?"),
        (HEAD + "[tiny.optm]\nlr = 1.0\n", "did you mean optim?"),
        (HEAD + "[objective]\nloss = 'rlk'\n", "did you mean 'rkl'?"),
        ("[recipe\n", "is not valid TOML"),
    ],
)
def test_a_file_of_ones_own_is_checked(tmp_path, text, said):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        as_toml(str(path), "tiny")
    assert said in str(caught.value)


def test_unknown_names():
    with pytest.raises(UserError, match="no recipe 'grop'"):
        method("grop")
    with pytest.raises(UserError, match=r"no config file .*nowhere\.toml"):
        method("nowhere.toml")
    with pytest.raises(UserError, match="no stage 'nothing'"):
        stage_values("nothing")


def test_the_command_lists_and_shows(capsys, tmp_path):
    assert cli.main(["recipe", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(f" {name} " in said for name in methods())
    assert cli.main(["recipe", "grpo", "--show", "optim.lr=0.5"]) == 0
    said = capsys.readouterr().out
    assert "lr = 0.5" in said and 'preset = "grpo"' in said and "{student}" in said
    own = tmp_path / "mine.toml"
    own.write_text(HEAD + "[objective]\nloss = 'fkl'\n")
    assert cli.main(["recipe", str(own), "--variant", "full", "--show"]) == 0
    assert 'loss = "fkl"' in capsys.readouterr().out
    assert cli.main(["recipe", "grpo", "--show", "optim.lrr=0.5"]) == 2
    assert cli.main(["recipe", "grpo", "--variant", "full"]) == 2
    assert cli.main(["recipe"]) == 2


def test_a_baseline_that_starts_where_the_method_does():
    """opsd_grpo is compared with GRPO from the same student, not with GRPO's own table row."""
    one = method("opsd_grpo")
    pairs = _with_baselines(["opsd_grpo"])
    assert pairs[-2:] == [("grpo", one.baseline_student), ("opsd_grpo", "")]
    assert ("grpo", "") in pairs and one.baseline_student == one.values("tiny")["student"]["path"]

    def run(name, accuracy, start=""):
        figures = {"before": {"accuracy": 0.3}, "after": {"accuracy": accuracy}}
        return {"method": name, "seed": 0, "start": start, **figures}

    records = [run("grpo", 0.9), run("grpo", 0.5, one.baseline_student), run("opsd_grpo", 0.6)]
    assert judged(one, records)["differences"] == pytest.approx([0.1])
    assert judged(method("grpo"), records)["differences"] == pytest.approx([0.6])


def test_what_has_to_be_made_first_stands_above_the_toml():
    text = as_toml("rlvr_teacher", "full")
    assert text.startswith("# on-policy distillation from a teacher")
    assert "megaopd recipe grpo --variant full --show" in text.partition("[run]")[0]
    assert 'dir = "runs/rlvr_teacher"' in text, "the first run's folder is not the second's"


@pytest.mark.parametrize("name", methods())
def test_commands_of_notes_are_commands(name):
    for words in re.findall(r"`megaopd ([^`>]*)", method(name).note):
        cli._parser().parse_args(words.split())
