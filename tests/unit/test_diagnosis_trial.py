"""tools/diagnosis_trial.py: its cases, and what it makes of a run that ends itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megaopd.recipes import method
from megaopd.report.alarms import ALARMS
from megaopd.study.stages import Stages
from tools import diagnosis_trial as trial

CHECK = (
    "Rank 0, node vm, device cpu, iteration -1: Unexpected result nan (message='found NaN in local "
    "grad norm for bucket #0 in backward pass before data-parallel communication collective')"
)
# Untrained models, so that no stage is trained, and an update that overflows.
OVERFLOW = """
import sys
from pathlib import Path
from tools import diagnosis_trial as trial

case = trial.Case("overflow", "", {
    "run": {"steps": 4}, "student": {"path": "{student_init}"}, "eval": {"prompts": 4},
    "teacher": {"path": "{teacher_init}"}, "rollout": {"prompts_per_step": 8},
    "optim": {"lr": 1e30, "warmup_steps": 0},
}, ("not_finite",))
record = trial._run(case, 1, Path(sys.argv[1]))
print(record["verdict"], record["raised"], record["says"])
"""


def test_cases():
    healthy = {case.name for case in trial.HEALTHY}
    assert len(healthy) == 8 and {"grpo", "kdrl"} <= healthy  # those with rewards, too
    assert {name for case in trial.FAILURES for name in case.expected} <= set(ALARMS)
    eager, large = (
        next(case for case in trial.FAILURES if case.name == name)
        for name in ("rewards too eagerly", "steps too large")
    )
    for case, factor, name in ((eager, 10, "grpo"), (large, 100, "full_rkl")):
        values = method(name).values("tiny")
        assert case.all_values()["optim"]["lr"] == factor * values["optim"]["lr"]


def case_that_ends(monkeypatch: pytest.MonkeyPatch, error: Exception) -> trial.Case:
    """Its run writes five steps, the third with a doubtful k3, and raises."""

    def train(self: Stages, name: str, values: object, folder: Path) -> None:
        folder.mkdir(parents=True)
        rows = [{"step": i + 1, "rollout_k3": 1.0 if i == 2 else 0.0} for i in range(5)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        raise error

    monkeypatch.setattr(Stages, "_train", train)
    values = {"student": {"path": "a"}, "teacher": {"path": "b"}}
    return trial.Case("ends itself", "", values, ("not_finite",))


@pytest.mark.parametrize(
    "error", [RuntimeError(CHECK), ValueError("sample of 7: log-prob nan at token 0; expected")]
)
def test_a_run_that_ends_with_what_is_no_number_has_raised_it(tmp_path, monkeypatch, error):
    record = trial._run(case_that_ends(monkeypatch, error), 1, tmp_path)
    assert record["verdict"] == "hit"
    assert record["raised"] == {"rollout_k3": 3, "not_finite": 6}  # what came before counts
    assert record["says"][0] == f"The run ended in step 6: {error}"
    assert record["says"][1].startswith("K3 between")
    assert "| rollout_k3 (3), not_finite (6) |  | hit |" in trial._row(record, {"ends itself": ""})


def test_another_error_is_one_of_the_tool(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="out of memory"):
        trial._run(case_that_ends(monkeypatch, RuntimeError("out of memory")), 1, tmp_path)


def test_an_update_that_overflows_really_ends_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OVERFLOW, str(tmp_path)],
        cwd=trial.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    assert said.startswith("hit {'not_finite': 2}") and "found NaN in local grad norm" in said
