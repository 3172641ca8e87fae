"""The parent of one server process: whatever happens to the trainer, the server ends with it.

    python guard.py TRAINER_PID CORES COMMAND...

Run as a file, without the package, so that it is small: it starts the command in a session of its
own, prints the number of that process group, and waits. When the command ends, or the trainer is
gone (kill -9 included), what is left of the group is killed, stopped processes too, and so are the
temporary files. Killed itself, it takes the command with it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

LOOK_EVERY_S = 0.5
# linux/prctl.h: the signal that a process gets when its parent dies; whose children orphans become.
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def cores_of(text: str) -> set[int]:
    """The core numbers of "1", "2-3" or "0,4-7"."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def main(argv: Sequence[str]) -> int:
    """Run the command until it or the trainer ends; its exit code (128 + n after signal n)."""
    trainer, cores, command = int(argv[0]), argv[1], argv[2:]
    if cores:
        os.sched_setaffinity(0, cores_of(cores))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # else init reaps what is left, if it does
    # Compiled kernels are to outlive one server.
    inductor = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    environment = {"TORCHINDUCTOR_CACHE_DIR": inductor} | os.environ
    with tempfile.TemporaryDirectory(prefix="megaopd-", ignore_cleanup_errors=True) as scratch:
        child = subprocess.Popen(
            command,
            env=environment | {"TMPDIR": scratch},
            stdout=2,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        try:
            print(child.pid, flush=True)
            sys.stdout.close()
            _wait(child, trainer)
        finally:
            _end_group(child)
    code = child.returncode
    return code if code >= 0 else 128 - code


def _wait(child: "subprocess.Popen[bytes]", trainer: int) -> None:
    """Until the child has ended (seen at once), or the trainer has."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while child.poll() is None and os.getppid() == trainer:
        signal.sigtimedwait({signal.SIGCHLD}, LOOK_EVERY_S)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_group(child: "subprocess.Popen[bytes]", timeout_s: float = 10.0) -> None:
    """Kill and reap until nothing of the group is left."""
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(child.pid, signal.SIGKILL)
            if child.poll() is not None:
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
            time.sleep(0.02)
    child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
