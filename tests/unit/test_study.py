"""The study: verdicts by their rules, what is run, laws against sums by hand, and its report."""

import json
import math

import pytest

from megaopd.data.tasks import get_task
from megaopd.data.tasks.keyed import TOLD
from megaopd.errors import UserError
from megaopd.quickstart import make_checkpoint
from megaopd.recipes import filled, merged, places, shared, stage_values
from megaopd.schema import make_config
from megaopd.study import cases, jobs, many_faces, report, runner, system_prompt
from megaopd.study.jobs import Job, all_stored
from megaopd.study.laws import ESTIMATORS, Laws, estimator_noise, mean_laws

SHARED = shared("tiny")


def test_every_case_is_a_run():
    """Its stages exist, with what they start from, and its values make a configuration."""
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names) and cases.CENTRE_NAME in names
    block = [case for case in cases.CASES if case.question == 3]
    assert len(block) == 2 * 3 * 3 * 2
    # The grid and the block: every student, teacher, sight and loss once, five losses at three k.
    crossed = {case.name for case in (*block, *cases.GRID)}
    assert len(crossed) == len(block) + len(cases.GRID) == 2 * 3 * 3 * (5 * 3 + 2)
    for case in (*cases.CASES, *cases.GRID):
        values = merged(SHARED, case.values)
        wanted = list(places(values))
        for name in wanted:
            assert stage_values(name)["stage"]["kind"] in ("train", "init", "sample")
        values = filled(values, dict.fromkeys(wanted, "/somewhere"))
        values["run"] = {**values["run"], "dir": "/somewhere/else"}
        config = make_config(values)
        sees = ("sees" in case.name and "nothing" not in case.name) or "key" in case.name
        shared_text = "rule" in case.name or "brief" in case.name
        assert bool(config.data.teacher_sees) == (sees or shared_text), case.name


def test_findings_are_about_cases_that_are_run():
    names = {case.name for case in cases.CASES}
    for finding in many_faces.FINDINGS:
        assert set(finding.cases) <= names, finding.says


def test_a_verdict_needs_every_seed():
    finding = many_faces.Finding(
        "a beats b", ("a", "b"), lambda f: f["a"]["x"] > f["b"]["x"], ("x",)
    )
    table = {"a": {0: {"x": 1.0}, 1: {"x": 3.0}}, "b": {0: {"x": 0.0}, 1: {"x": 2.0}}}
    assert finding.verdict(table) == "reproduced"
    assert finding.evidence(table) == "a: x 2.000; b: x 1.000"
    table["b"][1]["x"] = 4.0
    assert finding.verdict(table) == "mixed (1 of 2 seeds)"
    table["b"][0]["x"] = 4.0
    assert finding.verdict(table) == "not reproduced"
    assert finding.verdict({"a": {0: {"x": 1.0}}}) == "not testable"


def test_what_is_missing_and_what_it_starts_from(tmp_path):
    names = [case.name for case in cases.CASES if case.question == 4]
    assert runner.missing(tmp_path, 0, [4]) == names
    assert runner.missing(tmp_path, 0, [6])[-1] == "noise"
    Job(tmp_path, 0, names[0]).store({"accuracy": 0.5}, curve={})
    assert runner.missing(tmp_path, 0, [4]) == names[1:]
    assert runner.missing(tmp_path, 1, [4]) == names
    chosen = ((0, "shared rule"), (1, "full"), (0, "noise"))
    jobs = [Job(tmp_path, seed, name) for seed, name in chosen]
    wanted = ("keyed_student", "student", "student_responses", "teacher")
    assert runner.stages_of(jobs, 0) == wanted
    assert runner.stages_of(jobs, 1) == ("student", "teacher")


def test_figures_of_another_version_are_old(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "full-0.curve.json").write_text("{}")
    (tmp_path / "figures" / "prefixes-0.json").write_text("[0.9, 0.5]")
    (tmp_path / "figures" / "full-0.json").write_text('{"case": "full", "seed": 0}')
    for name in ("full", "prefixes"):
        assert all_stored(tmp_path, name) == {} and Job(tmp_path, 0, name).stored() is None
    assert report.load(tmp_path) == {}


def test_figures_of_other_settings_are_old(tmp_path, monkeypatch):
    """Of the case itself, or of a stage that it starts from, at any distance."""
    names = [case.name for case in cases.CASES if case.question == 2]
    for name in names:
        Job(tmp_path, 0, name).store({"accuracy": 0.5})
    Job(tmp_path, 0, "noise").store({})
    assert all_stored(tmp_path, names[0]) == {0: {"accuracy": 0.5}}
    assert runner.missing(tmp_path, 0, [2]) == ["prefixes"]

    def changed(name):
        values = stage_values(name)
        return values if name != "grpo_teacher" else merged(values, {"optim": {"lr": 0.5}})

    monkeypatch.setattr(jobs, "stage_values", changed)
    of_rl = [name for name in names if "RL" in name]
    assert len(of_rl) == 2 and runner.missing(tmp_path, 0, [2]) == [*of_rl, "prefixes"]
    assert all_stored(tmp_path, of_rl[0]) == {} and "noise" not in runner.missing(tmp_path, 0, [6])
    monkeypatch.setattr(
        jobs,
        "stage_values",
        lambda name: {**stage_values(name), **({"n": 1} if name == "student_init" else {})},
    )
    assert "noise" in runner.missing(tmp_path, 0, [6])


def test_the_grid_and_the_real_model_are_asked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    most = [1, 2, 3, 4, 5, 6, 7]
    assert runner._questions([], False, None) == most
    assert runner._questions([4], True, None) == [4, 8]
    assert runner._questions([], False, tmp_path) == [*most, 9]
    assert runner._questions([4], False, tmp_path) == [4, 9]
    assert runner.missing(tmp_path, 0, [9]) == ["system"]
    for only, model, said in (
        ([9], None, "--real-model"),
        ([10], None, "--only [10]"),
        ([9], tmp_path / "nowhere", "no config.json"),
    ):
        with pytest.raises(UserError) as caught:
            runner._questions(only, False, model)
        assert said in str(caught.value)


def test_the_questions_of_a_system_prompt(tmp_path):
    """Other topics are measured than are trained on; the values are a run's."""
    train, held_out = system_prompt.questions(tmp_path / "q")
    asked = [
        {json.loads(x)["prompt"] for x in path.read_text().splitlines()}
        for path in (train, held_out)
    ]
    assert len(asked[0]) == 90 and len(asked[1]) == 30 and not asked[0] & asked[1]
    values = system_prompt.values(tmp_path, train, held_out)
    values["run"]["dir"] = str(tmp_path / "run")
    assert make_config(values).data.teacher_sees == "system"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        make_checkpoint(name, root / name, seed)
    return root / "student", root / "teacher"


def test_the_means_of_laws_over_the_keys(models):
    """Against the formulas, question by question; a student is nearest to itself."""
    student, teacher = models
    found = mean_laws(student, teacher, teacher, keys=3, count=20)
    q, p = Laws(teacher), Laws(student)
    task = get_task("hidden3")
    questions = list(dict.fromkeys(task.example(i, 0, "train").prompt for i in range(20)))
    distances = []
    for question in questions:
        told = [TOLD.format(pi=key, prompt=question) for key in range(3)]
        laws = q.next(told).exp()
        mean = laws.prod(0) ** (1 / 3)
        mean /= mean.sum()
        mine = p.next([question])[0].exp()
        distances.append((mine * (mine / mean).log()).sum().item())
    assert found["to_geometric"] == pytest.approx(sum(distances) / len(distances), rel=1e-9)
    assert found["to_arithmetic"] > 0 and found["before_to_geometric"] > 0 and found["apart"] > 0
    assert 0 < found["entropy"] < math.log(18)


def test_noise_and_bias_of_the_estimators(models):
    student, teacher = models
    records = [{"prompt_ids": [1, 2, 10, 3], "response_ids": [4, 15]} for _ in range(2)]
    found = estimator_noise(student, teacher, records)
    assert set(found) == set(ESTIMATORS) and found["k2"]["places"] == 4
    for name in ("k2", "pg", "k3pp", "vopd, value", "vopd, top 5", "vopd, optimal"):
        assert found[name]["bias"] < 1e-9, name
    assert found["k3"]["bias"] > 1e-3  # the gradient of forward KL
    noise = {name: figures["noise"] for name, figures in found.items()}
    assert noise["k2"] == pytest.approx(noise["pg"])
    assert noise["vopd, optimal"] <= min(noise["pg"], noise["vopd, value"], noise["vopd, top 5"])


def test_the_report_of_what_is_there(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        for name, mass in (("unnorm, k=2", 0.4), ("sg, k=2", 0.95), ("full", 1.0)):
            record = {"before": 0.3, "accuracy": accuracy, "kl": 1 - mass, "entropy": 0.5,
                      "mass_first": 0.9, "mass": mass}  # fmt: skip
            curve = {"mass_student": [0.9, mass], "entropy": [1, 1], "reward": [0, 1]}
            Job(tmp_path, seed, name).store(record, curve=curve)
        prefixes = {"all": [0.9, 0.7, 0.5], "right": [1, 1, 1], "wrong": [0.8, 0.4, 0.0]}
        if seed == 2:
            del prefixes["right"]  # no response of it
        Job(tmp_path, seed, "prefixes").store({**prefixes, "wrong_share": [0.5]})
        noise = {name: {"noise": 2.0, "bias": 0.0} for name in ESTIMATORS}
        noise["vopd, top 5"]["noise"] = 1.0
        Job(tmp_path, seed, "noise").store(noise)
        system = {"model": "small", "before": {"kl": 0.8}, "after": {"kl": 0.3}}
        Job(tmp_path, seed, "system").store(system)
    text = report.write(tmp_path, [0, 1, 2]).read_text()
    assert "| sg, k=2 | 0.600 +- 0.248 | 0.300 +- 0.248 | 0.050 +- 0.000 |" in text
    assert (
        "(it falls by more than 0.15, and below that of the stopped gradient) | reproduced" in text
    )
    assert "0, 1, 2 tokens, all: 0.900, 0.700, 0.500; the student's first token right" in text
    assert "first token wrong: 0.800, 0.400, 0.000 (50% of the responses)" in text
    assert "| vopd, top 5 | 1.000 +- 0.000 |" in text and "| reproduced | noise pg: 2.00" in text
    assert "| reproduced | KL 0.800 -> 0.300 |" in text and "| 2 | after | 0.300 |" in text
    assert "small. The student is asked" in text
    with pytest.raises(UserError, match="is of small"):
        runner._check_model(tmp_path, tmp_path / "other")
    page = (tmp_path / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "<table>" in page
