"""A server's processes, with small commands in the place of SGLang: nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from megaopd.launch import port_is_free
from megaopd.rollout.command import Command
from megaopd.rollout.guard import cores_of
from megaopd.rollout.process import ServerProcess, free_port, log_error, log_tail

# Says where it runs, has a child that has a child, and waits.
WAITS = """
import os, subprocess, sys, time
print("cores", sorted(os.sched_getaffinity(0)), "tmp", os.environ["TMPDIR"], flush=True)
inner = "import subprocess; subprocess.Popen(['sleep', '100']).wait()"
subprocess.Popen([sys.executable, "-c", inner])
time.sleep(100)
"""


def start(tmp_path, code, **options):
    command = Command((sys.executable, "-c", textwrap.dedent(code)), dict(os.environ))
    return ServerProcess(command, tmp_path / "log", title="server 0, start 1", **options)


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_group_that_ends_leaves_nothing(tmp_path, number):
    core = sorted(os.sched_getaffinity(0))[0]
    process = start(tmp_path, WAITS, cores=str(core))
    until(lambda: len(process.workers()) == 2)
    scratch = log_tail(process.log, 1)[0].split("tmp ")[1]
    assert f"cores [{core}]" in process.log.read_text() and os.path.isdir(scratch)
    assert process.exit_code is None and not process.wait(0.0)
    process.kill(number)
    assert process.wait(5.0) and process.exit_code == 128 + number
    assert not process.workers() and not os.path.exists(scratch)


def test_an_exit_code(tmp_path):
    process = start(tmp_path, "raise SystemExit(3)")
    assert process.wait(20.0) and process.exit_code == 3
    process.kill()  # it is gone: nothing happens


def test_a_command_that_is_not_there(tmp_path):
    environ = {"TMPDIR": str(tmp_path)}
    with pytest.raises(OSError, match="nowhere cannot be started"):
        ServerProcess(Command(("/nowhere",), environ), tmp_path / "log", title="x")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_working(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    busy = start(tmp_path, code.format("while True: pass"))
    idle = start(tmp_path, code.format("import time; time.sleep(100)"))
    try:
        until(lambda: busy.workers() and idle.workers())
        time.sleep(0.5)
        busy.working(), idle.working()
        time.sleep(1.0)
        assert busy.working() and not idle.working()
        busy.kill(signal.SIGSTOP)
        busy.working()
        time.sleep(0.5)
        assert not busy.working()
    finally:
        busy.kill()
        idle.kill()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_group_ends_with_its_trainer(tmp_path, stopped):
    """kill -9 of the trainer, also while the group is stopped."""
    trainer = f"""
        import os, sys, time
        from pathlib import Path
        from megaopd.rollout.command import Command
        from megaopd.rollout.process import ServerProcess
        command = Command((sys.executable, "-c", {WAITS!r}), dict(os.environ))
        process = ServerProcess(command, Path({str(tmp_path / "log")!r}), title="server 0")
        while len(process.workers()) < 2:
            time.sleep(0.02)
        print(process.group, *process.workers(), flush=True)
        time.sleep(100)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(trainer)], stdout=subprocess.PIPE, text=True
    )
    group, *workers = map(int, parent.stdout.readline().split())
    if stopped:
        os.killpg(group, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    until(lambda: not any(psutil.pid_exists(pid) for pid in (group, *workers)))


def test_a_log_is_kept_and_its_newest_part_read(tmp_path):
    log = tmp_path / "log"
    for text in ("first", "ValueError: second"):
        start(tmp_path, f"print({text!r}); print('bye')").wait(20.0)
    assert log.read_text().count("=== server 0, start 1") == 2
    assert log_tail(log, 5) == ["ValueError: second", "bye"]
    assert log_error(log) == ["ValueError: second"]
    assert log.stat().st_mode & 0o077 == 0
    assert log_tail(tmp_path / "none", 5) == []


def test_ports():
    port = free_port("127.0.0.1")
    assert port_is_free("127.0.0.1", port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert not port_is_free("127.0.0.1", port)


def test_core_lists():
    assert cores_of("1") == {1} and cores_of("0,4-6") == {0, 4, 5, 6}
