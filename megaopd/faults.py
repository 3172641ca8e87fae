"""Planned deaths: a named point of a named step where a process dies, or stands still for ever.

Set MEGAOPD_KILL_AT=point:step (for instance optimizer:7) to rehearse a crash (kill -9), and
MEGAOPD_HANG_AT likewise to rehearse a hang; point:step:rank for one rank alone. Only in a job's
first life: ranks that torchrun has started again pass. Unset, a point costs two comparisons.
Points: rollout, forward, optimizer, checkpoint-write, checkpoint-renamed.
"""

import os
import signal
import time

from megaopd.errors import UserError

POINTS = ("rollout", "forward", "optimizer", "checkpoint-write", "checkpoint-renamed")

_step = -1


def _plan(variable: str) -> str:
    """The point and step at which this rank is to fail; "" where none was planned."""
    value = os.environ.get(variable, "")
    name, *numbers = value.split(":")
    if not value or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return ""
    if name not in POINTS or len(numbers) not in (1, 2) or not all(n.isdigit() for n in numbers):
        raise UserError(
            f"{variable}={value}",
            expected="POINT:STEP or POINT:STEP:RANK with POINT one of " + ", ".join(POINTS),
        )
    mine = len(numbers) == 1 or numbers[1] == os.environ.get("RANK", "0")
    return f"{name}:{numbers[0]}" if mine else ""


_death, _hang = _plan("MEGAOPD_KILL_AT"), _plan("MEGAOPD_HANG_AT")


def set_step(step: int) -> None:
    """Tell the points below which step is running."""
    global _step
    _step = step


def point(name: str) -> None:
    """Die or hang here, without cleaning up, if that was planned for this point and step."""
    if _death and _death == f"{name}:{_step}":
        os.kill(os.getpid(), signal.SIGKILL)
    while _hang and _hang == f"{name}:{_step}":
        time.sleep(3600)
