"""The study: verdicts by their rules, what is run, laws against sums by hand, and its report."""

import json
import math

import pytest

from megaopd.data.tasks import get_task
from megaopd.data.tasks.keyed import TOLD
from megaopd.quickstart import make_checkpoint
from megaopd.recipes import filled, merged, places, shared, stage_values
from megaopd.schema import make_config
from megaopd.study import many_faces, report, runner
from megaopd.study.laws import ESTIMATORS, Laws, estimator_noise, mean_laws

SHARED = shared("tiny")


def test_every_case_is_a_run():
    """Its stages exist, with what they start from, and its values make a configuration."""
    names = [case.name for case in many_faces.CASES]
    assert len(set(names)) == len(names) and many_faces.CENTRE_NAME in names
    block = [case for case in many_faces.CASES if case.question == 3]
    assert len(block) == 2 * 3 * 3 * 2
    for case in many_faces.CASES:
        values = merged(SHARED, case.values)
        wanted = list(places(values))
        for name in wanted:
            assert stage_values(name)["stage"]["kind"] in ("train", "init", "sample")
        values = filled(values, dict.fromkeys(wanted, "/somewhere"))
        values["run"] = {**values["run"], "dir": "/somewhere/else"}
        config = make_config(values)
        sees = ("sees" in case.name and "nothing" not in case.name) or "key" in case.name
        assert bool(config.data.teacher_sees) == (sees or "rule" in case.name), case.name


def test_findings_are_about_cases_that_are_run():
    names = {case.name for case in many_faces.CASES}
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
    names = [case.name for case in many_faces.CASES if case.question == 4]
    assert runner._missing(tmp_path, 0, [4]) == names
    assert runner._missing(tmp_path, 0, [6])[-1] == "noise"
    done = runner._figures_file(tmp_path, 0, names[0])
    done.parent.mkdir()
    done.write_text("{}")
    assert runner._missing(tmp_path, 0, [4]) == names[1:]
    jobs = [(tmp_path, 0, "shared rule"), (tmp_path, 1, "full"), (tmp_path, 0, "noise")]
    wanted = {"keyed_student", "student_responses", "student", "teacher"}
    assert runner._stages_of(jobs, 0) == wanted
    assert runner._stages_of(jobs, 1) == {"student", "teacher"}


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
    figures = tmp_path / "figures"
    figures.mkdir()
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        for name, mass in (("unnorm, k=2", 0.4), ("sg, k=2", 0.95)):
            record = {"case": name, "seed": seed, "before": 0.3, "accuracy": accuracy,
                      "kl": 1 - mass, "entropy": 0.5, "mass_first": 0.9, "mass": mass}  # fmt: skip
            path = runner._figures_file(tmp_path, seed, name)
            path.write_text(json.dumps(record))
            curve = {"mass_student": [0.9, mass], "entropy": [1, 1], "reward": [0, 1]}
            path.with_suffix(".curve.json").write_text(json.dumps(curve))
        (figures / f"prefixes-{seed}.json").write_text("[0.9, 0.7, 0.5]")
        noise = {name: {"noise": 2.0, "bias": 0.0} for name in ESTIMATORS}
        noise["vopd, top 5"]["noise"] = 1.0
        (figures / f"noise-{seed}.json").write_text(json.dumps(noise))
    text = report.write(tmp_path, [0, 1, 2]).read_text()
    assert "| sg, k=2 | 0.600 +- 0.248 | 0.300 +- 0.248 | 0.050 +- 0.000 |" in text
    assert (
        "(it falls by more than 0.15, and below that of the stopped gradient) | reproduced" in text
    )
    assert "0 tokens: 0.900, 1 tokens: 0.700, 2 tokens: 0.500" in text
    assert "| vopd, top 5 | 1.000 +- 0.000 |" in text and "| reproduced | noise pg: 2.00" in text
    page = (tmp_path / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<table>" in page
