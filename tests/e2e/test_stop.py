"""A run that is asked to stop saves and says so; a refused one is not started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaopd.errors import EXIT_STOPPED
from tests.e2e.runs import columns, end_all, make_models, megaopd, opd_arguments

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ["bash", str(ROOT / "launch" / "torchrun_multinode.sh")]
NAMES = ("step", "loss", "grad_norm", "kl", "reward")
STEPS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """The undisturbed run of two ranks."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = megaopd(*arguments(models, run_dir))
    assert done.returncode == 0, done.stderr
    return columns(run_dir, *NAMES)


def arguments(models, run_dir, *overrides):
    # No checkpoint but the one of the stop.
    return opd_arguments(*models, run_dir, f"run.steps={STEPS}", "parallel.tensor=2", *overrides)


def settings(name):
    """For the launch script: two ranks on this node, a free port."""
    env = {**os.environ, "GPUS": "2", "PORT": "0", "RDZV_ID": name, "RESTARTS": "3"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return env


def stopped_at_step(command, run_dir, step, number, **options):
    """Start `command`, send it `number` once `step` is in the metrics; its exit code and stderr."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    try:
        metrics, end = run_dir / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= step):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        return process.returncode, stderr
    finally:
        end_all(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_saves_and_the_run_goes_on(models, whole, tmp_path, number):
    run_dir = tmp_path / "run"
    if number == signal.SIGTERM:  # the ranks of this machine, and those of the launch script
        command, options = [sys.executable, "-m", "megaopd"], {}
    else:
        command, options = SCRIPT, {"env": settings(tmp_path.name)}
    command = [*command, *arguments(models, run_dir)]
    code, stderr = stopped_at_step(command, run_dir, 3, number, **options)
    assert code == EXIT_STOPPED, stderr
    done = len(columns(run_dir, "step"))
    assert 3 <= done < STEPS
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [f"step_{done:08d}"]
    assert f"asked to stop by {number.name}" in stderr and f"after step {done} of" in stderr
    assert "Traceback" not in stderr
    again = megaopd(*arguments(models, run_dir))
    assert again.returncode == 0, again.stderr
    assert columns(run_dir, *NAMES) == whole


def test_one_rank_stops_itself(models, tmp_path):
    """Without an agent the run takes the signal itself."""
    run_dir = tmp_path / "run"
    run = opd_arguments(*models, run_dir, "run.steps=400")
    command = [sys.executable, "-m", "megaopd", *run]
    code, stderr = stopped_at_step(command, run_dir, 2, signal.SIGTERM)
    assert code == EXIT_STOPPED and "stopped: after step" in stderr, stderr


def test_a_refused_run_is_not_restarted(models, tmp_path):
    """RESTARTS=3, and one attempt: the message once, exit code 2."""
    run = arguments(models, tmp_path / "run", "parallel.tensor=4")
    begun = time.monotonic()
    done = subprocess.run(
        [*SCRIPT, *run], env=settings(tmp_path.name), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("2 key/value heads with tensor parallel 4") == 1, done.stderr
    assert time.monotonic() - begun < 60
