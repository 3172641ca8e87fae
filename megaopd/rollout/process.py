"""One SGLang server as processes: a guard, and the group that it looks after. And their log."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from megaopd.rollout import guard
from megaopd.rollout.command import Command

# A worker that has used less than this part of the time on a core does not work on a batch.
WORKING_SHARE = 0.2
_TAIL_BYTES = 65536
_HEADER = "=== "


class ServerProcess:
    """Starts the command at once.

    Attributes:
        group: the process group of the server; its front end has the same number as process id.

    Args:
        log: appended to, after a header; readable by its owner only, for SGLang writes its whole
            configuration there, its key included.
        title: of the header.
        cores: that the server may use, as taskset writes them; empty: all.

    Raises:
        OSError: it cannot be started; the log says why.
    """

    def __init__(self, command: Command, log: Path, *, title: str, cores: str = "") -> None:
        self.log = log
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(file, f"{_HEADER}{title}, {when}: {' '.join(command.argv)}\n".encode())
            self._guard = subprocess.Popen(
                # Without site-packages, in which it would spend most of its start.
                [sys.executable, "-S", guard.__file__, str(os.getpid()), cores, *command.argv],
                env=command.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        finally:
            os.close(file)
        assert self._guard.stdout is not None
        with self._guard.stdout as answer:
            first = answer.readline()
        if not first:
            self._guard.wait()
            raise OSError(f"{command.argv[0]} cannot be started")
        self.group = int(first)
        self._cpu_seen = (time.monotonic(), 0.0)

    @property
    def exit_code(self) -> int | None:
        """Of the server; None while it runs. Above 128: a signal ended it; below 0: its guard."""
        return self._guard.poll()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the whole group: the guard sees the server end and tidies up."""
        code = self.exit_code
        if code is None or code < 0:  # a guard that ended by itself has left nothing
            with suppress(ProcessLookupError):
                os.killpg(self.group, number)

    def terminate(self) -> None:
        """Ask the front end to end the others and itself."""
        if self.exit_code is None:
            with suppress(ProcessLookupError):
                os.kill(self.group, signal.SIGTERM)

    def wait(self, timeout_s: float) -> bool:
        """Block until the group and its guard have gone; whether they have."""
        try:
            self._guard.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def workers(self) -> list[int]:
        """Process ids of the group without the front end: schedulers and the like."""
        found = []
        for pid in psutil.pids():
            try:
                if pid != self.group and os.getpgid(pid) == self.group:
                    found.append(pid)
            except ProcessLookupError:
                continue
        return found

    def working(self) -> bool:
        """Whether a worker has been computing since the last call (or the start)."""
        now, used = time.monotonic(), 0.0
        for pid in self.workers():
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.NoSuchProcess:
                continue
            used += times.user + times.system
        (before, used_before), self._cpu_seen = self._cpu_seen, (now, used)
        return used - used_before > WORKING_SHARE * (now - before)


def log_tail(log: Path, lines: int) -> list[str]:
    """The last lines of the newest incarnation, each cut to 200 characters."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    newest = text[max(0, text.rfind("\n" + _HEADER)) :]
    found = [line.rstrip()[:200] for line in newest.splitlines() if line.strip()]
    return [line for line in found if not line.startswith(_HEADER)][-lines:]


def log_error(log: Path, lines: int = 6) -> list[str]:
    """The last lines, up to one near the end that names an error."""
    tail = log_tail(log, 4 * lines)
    named = [i for i, line in enumerate(tail) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    end = named[-1] + 1 if named else len(tail)
    return tail[max(0, end - lines) : end]


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
