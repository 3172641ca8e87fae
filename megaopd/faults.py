"""Planned deaths: kill -9 of this process at a named point of a named step.

Set MEGAOPD_KILL_AT=point:step (for instance optimizer:7) to rehearse a crash. Unset, a point costs
one comparison. Points: rollout, forward, optimizer, checkpoint-write, checkpoint-renamed.
"""

import os
import signal

from megaopd.errors import UserError

POINTS = ("rollout", "forward", "optimizer", "checkpoint-write", "checkpoint-renamed")

_step = -1
_planned = os.environ.get("MEGAOPD_KILL_AT", "")
if _planned and (_planned.partition(":")[0] not in POINTS or not _planned.split(":")[-1].isdigit()):
    raise UserError(
        f"MEGAOPD_KILL_AT={_planned}", expected="POINT:STEP with POINT one of " + ", ".join(POINTS)
    )


def set_step(step: int) -> None:
    """Tell the points below which step is running."""
    global _step
    _step = step


def point(name: str) -> None:
    """Die here, without cleaning up, if that was planned for this point and step."""
    if _planned and _planned == f"{name}:{_step}":
        os.kill(os.getpid(), signal.SIGKILL)
