"""Alarms on a run's metrics, and what `megaopd report` says of them."""

import json
import random

import pytest

from megaopd.report.alarms import ALARMS, LAST, Watch
from megaopd.report.diagnosis import diagnosis, symptoms
from megaopd.report.html import write_report


def rows(steps=60, **metrics):
    """Lines of a run: each metric goes in a straight line from its first to its last value."""
    lines = []
    for i in range(steps):
        share = i / (steps - 1)
        line = {k: a + (b - a) * share for k, (a, b) in metrics.items()}
        lines.append({"step": i + 1, **line})
    return lines


def names(*args, **metrics):
    return [one.name for one in symptoms(rows(*args, **metrics))]


BAD = {
    "mass_student": {"mass_student": (0.98, 0.4)},
    "ess": {"rollout_ess": (0.9, 0.3)},
    "rollout_k3": {"rollout_k3": (1e-4, 0.2)},
    "entropy_collapse": {"entropy": (0.3, 0.0), "teacher_entropy": (0.4, 0.4)},
    "entropy_rise": {"entropy": (0.5, 1.6), "teacher_entropy": (0.5, 0.6)},
    "repetition": {"repetition": (0.05, 0.6)},
    "response_length": {"response_length": (20, 60), "reward": (0.5, 0.42)},
    "distance": {"kl": (0.4, 0.9)},
    "reward": {"reward": (0.6, 0.2), "kl": (0.5, 0.1)},
    "groups": {"groups/mixed": (0.1, 0.0), "reward": (0.02, 0.0)},
}  # fmt: skip


def test_every_alarm_has_an_example():
    assert {*BAD, "not_finite"} == set(ALARMS)


@pytest.mark.parametrize("name", BAD)
def test_a_failure_raises_its_alarm_and_no_other_once(name):
    assert names(**BAD[name]) == [name]
    assert names(**{k: (a, a) for k, (a, _) in BAD[name].items()}) == []


@pytest.mark.parametrize(
    "metrics",
    [
        {"mass_student": (0.9, 0.8), "reward": (0.2, 0.9), "kl": (0.5, 0.05)},
        # As decided as its teacher, and right.
        {"entropy": (0.6, 0.01), "teacher_entropy": (0.01, 0.01)},
        {"entropy": (0.6, 0.01), "reward": (0.2, 1.0), "groups/mixed": (0.5, 0.0)},
        {"entropy": (2.7, 0.01), "nll": (1.2, 0.01)},  # supervised
        # It follows a teacher that is less decided.
        {"entropy": (0.3, 0.8), "teacher_entropy": (0.9, 0.8)},
        {"response_length": (20, 60), "reward": (0.5, 0.7)},
        {"log_ratio": (0.001, 0.03)},
        {"log_ratio": (0.6, 0.8), "distill": (0.1, 0.05)},  # jsd
    ],
)
def test_what_a_healthy_run_may_do(metrics):
    assert names(**metrics) == []


def test_a_number_that_is_none_is_its_own_alarm_at_once():
    watch = Watch()
    assert watch.see({"loss": 1.0, "mass_student": 0.9}) == {}
    assert list(watch.see({"loss": float("nan"), "mass_student": float("nan")})) == ["not_finite"]
    for _ in range(3 * LAST):
        assert watch.see({"loss": float("nan"), "mass_student": float("nan")}) == {}


def test_each_alarm_is_raised_once_also_when_all_that_come_at_once_have_been():
    """Then nothing is looked for before step 13; it used to be everything, over and over."""
    bad = {"loss": float("nan"), "rollout_k3": 1.0, "rollout_ess": 0.1}
    lines = [{"step": i + 1, "reward": 0.6 if i < 3 else 0.0, **bad} for i in range(20)]
    found = [(one.name, one.step) for one in symptoms(lines)]
    assert found == [("ess", 1), ("rollout_k3", 1), ("not_finite", 1), ("reward", 13)]


def test_what_a_small_batch_does_by_chance():
    """Rewards of 0.35 and 0.15 at random; then the same means without the noise."""
    rng = random.Random(3)
    noisy = [{"reward": 0.35 if rng.random() < 0.5 else 0.05} for _ in range(400)]
    watch = Watch()
    assert not any(watch.see(line) for line in noisy)
    watch = Watch()
    said = [watch.see({"reward": 0.3 if i < 30 else 0.15}) for i in range(60)]
    assert [list(s) for s in said if s] == [["reward"]]


def test_one_bad_step_is_no_alarm():
    watch = Watch()
    assert not any(watch.see({"entropy": 3.0 if i == 14 else 1.0}) for i in range(60))


def test_a_run_that_is_taken_up_again_does_not_repeat_itself():
    lines = rows(**BAD["mass_student"])
    first, second = Watch(), Watch()
    said = [list(first.see(line)) for line in lines]
    for line in lines[:25]:
        second.see(line)
    assert [list(second.see(line)) for line in lines[25:]] == said[25:]


def test_the_report_says_it_in_words(tmp_path):
    lines = rows(mass_student=(0.98, 0.38), loss=(0.4, -0.2), bucket_kl=(0.3, 0.31))
    (text, told) = diagnosis(lines)
    for part in (
        "from 0.97 to 0.43 while the loss improved from 0.390 to -0.154",
        "the signature of a biased top-k gradient",
        "objective.variant=tail or sg",
        "(first seen at step 26)",
    ):
        assert part in text, text
    assert told.startswith("From the first steps to the last: distance to the teacher (bucket_kl)")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text()
    assert "Diagnosis" in page and "the signature of a biased top-k gradient" in page


def test_what_names_a_cause_is_told_before_what_follows_from_many():
    """A biased top-k run loses reward long before the alarm that names its cause."""
    lines = rows(60, mass_student=(0.98, 0.6), bucket_kl=(0.5, 2.0), reward=(0.6, 0.0))
    late = [{**line, "groups/mixed": 0.5 if line["step"] < 50 else 0.0} for line in lines]
    raised = [one.name for one in symptoms(late)]
    assert raised == ["distance", "reward", "mass_student", "groups"]
    *told, _ = diagnosis(late)
    order = ("the student's mass", "% of the prompts", "the distance", "the reward")
    assert all(part in line.lower() for part, line in zip(order, told, strict=True)), told
    assert all(f"(first seen at step {one.step})" in "".join(told) for one in symptoms(late))
    assert {name for name, one in ALARMS.items() if one.general} == {"distance", "reward"}


def test_alarms_of_one_step_have_one_order():
    """That of ALARMS, in every process: not that of a set of strings."""
    early = {"reward": 0.6, "kl": 0.5, "repetition": 0.0, "entropy": 0.5}
    late = {"reward": 0.0, "kl": 5.0, "repetition": 0.9, "entropy": 3.0}
    found = symptoms([early if i < 3 else late for i in range(13)])
    assert [one.name for one in found] == ["entropy_rise", "repetition", "distance", "reward"]


def test_a_short_run_tells_what_it_raised_at_once():
    lines = rows(5, loss=(1.0, 0.5), rollout_k3=(1e-4, 1e-4), reward=(0.9, 0.0))
    assert diagnosis(lines) == ["5 steps are too few for a diagnosis: it takes 13."]
    lines[4]["loss"] = float("nan")
    lines[2]["rollout_k3"] = lines[3]["rollout_k3"] = 1.0
    k3, loss, more = diagnosis(lines)
    assert k3.startswith("K3 between") and "(first seen at step 3)" in k3
    assert loss.startswith("Loss no longer finite: an overflow") and "seen at step 5)" in loss
    assert more == "5 steps are too few for other alarms: it takes 13."


def test_a_short_run_and_a_healthy_one():
    assert "too few" in diagnosis([])[0]
    assert "too few" in diagnosis(rows(4, loss=(1.0, 0.5)))[0]
    (line,) = diagnosis(rows(kl=(0.5, 0.1), reward=(0.2, 0.8)))
    assert line.startswith("No alarm.") and "reward 0.21 -> 0.754" in line
