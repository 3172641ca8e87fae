"""metrics.jsonl: exact floats, each step once across kills; wandb may fail, the run may not."""

import json
import sys
import types

import pytest
import torch

from megaopd.report.config import ReportConfig
from megaopd.report.metrics import (
    MetricLogger,
    NullLogger,
    format_number,
    read_events,
    read_metrics,
)
from megaopd.report.progress import progress

QUIET = ReportConfig(console=False, wandb="off")


def log(run_dir, steps, value=0.1, **kwargs) -> None:
    logger = MetricLogger(run_dir, QUIET, **kwargs)
    for step in steps:
        logger.log_metrics(step, {"loss": value / (step + 1), "tokens": 7})
    logger.close()


def lines_without_time(run_dir) -> list[str]:
    text = (run_dir / "metrics.jsonl").read_text()
    return [line.rpartition(', "time"')[0] for line in text.splitlines()]


def test_equal_floats_give_equal_bytes_and_read_back_exactly(tmp_path):
    values = [0.1 + 0.2, 1e-300, 1 / 3, 123456789.123456789, -0.0, float("inf")]
    for name in ("a", "b"):
        logger = MetricLogger(tmp_path / name, QUIET)
        for step, value in enumerate(values):
            logger.log_metrics(step, {"z": value, "a": torch.tensor(value, dtype=torch.float64)})
        logger.close()
    assert lines_without_time(tmp_path / "a") == lines_without_time(tmp_path / "b")
    rows = read_metrics(tmp_path / "a")
    assert [row["z"] for row in rows] == values == [row["a"] for row in rows]
    assert list(rows[0]) == ["step", "z", "a", "time"]
    assert rows[0]["time"] > 1e9


def test_lines_are_on_disk_at_once(tmp_path):
    logger = MetricLogger(tmp_path, QUIET)
    logger.log_metrics(0, {"loss": 1.0})
    assert read_metrics(tmp_path)[0]["loss"] == 1.0
    logger.close()


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    log(tmp_path / "straight", range(8))
    log(tmp_path / "killed", range(6))
    path = tmp_path / "killed" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "loss": 0.0')  # killed while writing
    assert [row["step"] for row in read_metrics(tmp_path / "killed")] == list(range(6))
    log(tmp_path / "killed", range(4, 8), resume_step=3)
    assert [row["step"] for row in read_metrics(tmp_path / "killed")] == list(range(8))
    assert lines_without_time(tmp_path / "killed") == lines_without_time(tmp_path / "straight")
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_a_step_is_logged_once_and_in_order(tmp_path):
    logger = MetricLogger(tmp_path, QUIET)
    logger.log_metrics(3, {})
    for step in (3, 2):
        with pytest.raises(ValueError, match=f"step {step} logged after step 3"):
            logger.log_metrics(step, {})
    logger.close()
    logger = MetricLogger(tmp_path, QUIET, resume_step=3)
    with pytest.raises(ValueError, match="after step 3"):
        logger.log_metrics(3, {})
    logger.close()


def test_a_new_run_sets_the_old_files_aside(tmp_path):
    for value in (1.0, 2.0, 3.0):
        log(tmp_path, range(2), value)
    assert read_metrics(tmp_path)[0]["loss"] == 3.0
    aside = [json.loads((tmp_path / f"metrics.jsonl.{n}").open().readline()) for n in (1, 2)]
    assert [row["loss"] for row in aside] == [1.0, 2.0]


def test_events_survive_a_resume(tmp_path):
    logger = MetricLogger(tmp_path, QUIET)
    logger.log_event("eval", {"step": 5, "accuracy": 0.5})
    logger.close()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "torn')
    logger = MetricLogger(tmp_path, QUIET, resume_step=3)
    logger.log_event("resume", {"step": 3})
    logger.close()
    assert [(e["kind"], e["step"]) for e in read_events(tmp_path)] == [("eval", 5), ("resume", 3)]


def test_console_lines_are_aligned_and_chosen(tmp_path, capsys):
    config = ReportConfig(wandb="off", every=2)
    logger = MetricLogger(tmp_path, config, columns=["loss", "kl"], total_steps=100)
    for step in range(60):
        logger.log_metrics(step, {"loss": 0.123456, "hidden": 1, **({"kl": 1e-7} if step else {})})
    logger.close()
    lines = capsys.readouterr().out.splitlines()
    headers = [line for line in lines if line.split() == ["step", "loss", "kl"]]
    assert len(headers) == 2  # again after 25 lines
    assert len(lines) == 30 + 2
    assert lines[2].split() == ["2/100", "0.1235", "1.00e-07"]
    assert len({len(line) for line in lines}) == 1
    assert len(read_metrics(tmp_path)) == 60


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.0, "0.000"),
        (1.0, "1.000"),
        (1234.56, "1235"),
        (0.00012, "1.20e-04"),
        (2.5e9, "2.50e+09"),
        (float("nan"), "nan"),
        (10**9, "1.00e+09"),
        ("abc", "abc"),
    ],
)
def test_format_number(value, text):
    assert format_number(value) == text
    assert len(text) <= 9


class FakeRun:
    id = "run7"

    def __init__(self, fail: bool) -> None:
        self.fail, self.logged, self.finished = fail, [], False

    def log(self, values, step) -> None:
        if self.fail:
            raise OSError("no route")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def with_wandb(monkeypatch, init) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))


def test_wandb_gets_metrics_and_the_run_id_is_kept(tmp_path, monkeypatch):
    run, calls = FakeRun(False), []
    with_wandb(monkeypatch, lambda **kwargs: calls.append(kwargs) or run)
    for resume_step in (None, 0):
        logger = MetricLogger(
            tmp_path, ReportConfig(console=False, wandb="offline"), resume_step=resume_step
        )
        logger.log_metrics(1, {"loss": 0.5})
        logger.close()
    assert run.logged == [(1, {"loss": 0.5})] * 2
    assert run.finished
    assert [(c["mode"], c["id"]) for c in calls] == [("offline", None), ("offline", "run7")]


def test_wandb_failures_are_said_once(tmp_path, monkeypatch, capsys):
    def refuse(**kwargs):
        raise RuntimeError("no key")

    with_wandb(monkeypatch, refuse)
    log_config = ReportConfig(console=False, wandb="online")
    MetricLogger(tmp_path / "a", log_config).log_metrics(0, {})
    assert capsys.readouterr().err.splitlines() == ["wandb is off: no key"]
    with_wandb(monkeypatch, lambda **kwargs: FakeRun(True))
    logger = MetricLogger(tmp_path / "b", log_config)
    for step in range(3):
        logger.log_metrics(step, {})
    logger.close()
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(read_metrics(tmp_path / "b")) == 3
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    MetricLogger(tmp_path / "c", log_config).log_metrics(0, {})
    assert "wandb is off" in capsys.readouterr().err


def test_auto_is_off_without_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with_wandb(monkeypatch, lambda **kwargs: pytest.fail("wandb was started"))
    MetricLogger(tmp_path, ReportConfig(console=False)).log_metrics(0, {})


def test_null_logger_and_progress(capsys, monkeypatch):
    logger = NullLogger()
    logger.log_metrics(0, {})
    logger.log_event("x", {})
    logger.close()
    with progress("evaluate", 4) as advance:
        advance(3)
        advance(1)
    assert capsys.readouterr().err == "evaluate: 4/4 in 0 s\n"
    monkeypatch.setenv("RANK", "1")
    with progress("evaluate", 4) as advance:
        advance(4)
    assert capsys.readouterr().err == ""
