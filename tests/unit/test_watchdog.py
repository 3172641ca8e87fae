"""Who is named, and what one stuck process says before it ends."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from megaopd.watchdog import make_report, stragglers


def record(entered=5, beats=0, *, waits=True, age=90.0, **more):
    made = {"entered": entered, "step": 3, "phase": "update", "beats": beats, "age": age}
    return {**made, "waits": waits, "where": "x.py:1 f", "tick": 9, **more}


@pytest.mark.parametrize(
    ("records", "silent", "named"),
    [
        ([record(), record(waits=False), record()], set(), [1]),
        ([record(), record(), record()], {2}, [2]),
        # On a GPU the wait may be anywhere: then who has come least far.
        ([record(beats=2, waits=False), record(beats=1, waits=False)], set(), [1]),
        ([record(6), record(6), record(5, 9)], set(), [2]),
        ([record(), record()], set(), []),
        # A teacher's ranks enter no phases: they are not behind for that.
        ([record(), record(), record(0, phase="teach")], set(), []),
        ([record(), record(0, phase="teach", waits=False)], set(), [1]),
        ([record(waits=False)], set(), [0]),
    ],
)
def test_the_straggler(records, silent, named):
    assert stragglers(dict(enumerate(records)), silent) == named


def test_ranks_at_one_place_are_one_line(tmp_path):
    records = {rank: record() for rank in range(300)} | {7: record(4, waits=False)}
    report = make_report(tmp_path, records, {42})
    assert "rank 42 holds the others up" in report
    assert "rank 0-6, 8-41, 43-299: step 3, update, waits in a collective" in report
    assert len(report.splitlines()) == 5


STUCK = """
    import sys, time
    from pathlib import Path
    from megaopd import watchdog

    def stand_still():
        time.sleep(60)

    with watchdog.Watchdog(Path(sys.argv[1]), 0, 1, stall_s=float(sys.argv[2])):
        watchdog.enter("update", 4)
        for _ in range(20):
            watchdog.beat()
            time.sleep(0.1)
        if sys.argv[3] == "hang":
            stand_still()
    print("end")
"""


def run_stuck(tmp_path, stall, what):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STUCK), str(tmp_path), str(stall), what],
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_a_process_that_stands_still_ends_with_its_stack(tmp_path):
    done = run_stuck(tmp_path, 1, "hang")
    assert done.returncode == 1 and "end" not in done.stdout
    assert "rank 0: step 4, update, beat 20, at" in done.stderr
    assert "in stand_still" in done.stderr
    assert "in stand_still" in (tmp_path / "heartbeats" / "rank_0.stack").read_text()


@pytest.mark.parametrize("stall", [0, 1])
def test_one_that_moves_is_left_alone(tmp_path, stall):
    done = run_stuck(tmp_path, stall, "go")
    assert done.returncode == 0 and "end" in done.stdout and not done.stderr
    assert (tmp_path / "heartbeats").is_dir() == bool(stall)


def test_one_that_was_stopped_and_goes_on_is_left_alone(tmp_path):
    """Ctrl-Z and fg: the time in between is no stall."""
    command = [sys.executable, "-c", textwrap.dedent(STUCK), str(tmp_path), "3", "go"]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as job:
        while not (tmp_path / "heartbeats" / "rank_0.json").is_file():
            time.sleep(0.05)
        job.send_signal(signal.SIGSTOP)
        time.sleep(6)
        job.send_signal(signal.SIGCONT)
        out, err = job.communicate(timeout=50)
    assert job.returncode == 0 and "end" in out and not err
