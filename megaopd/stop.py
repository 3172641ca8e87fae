"""A clean stop: finish the step, save a checkpoint, and say so by the exit code.

Schedulers ask with a signal some time before they take the machines away. One rank that was asked
is enough: all ranks agree on it once a step. A second signal has its usual effect.
"""

import os
import signal
from types import FrameType

from megaopd import platform

_asked = False


def listen() -> None:
    """Take SIGUSR1 for the wish to stop, and SIGTERM where no agent looks after this rank.

    An agent ends the ranks that are left by SIGTERM when one has failed; those must not go on.
    """
    signals = [signal.SIGUSR1]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        signals.append(signal.SIGTERM)
    for number in signals:
        signal.signal(number, _ask)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    signal.signal(number, signal.SIG_DFL)


def asked() -> bool:
    """Whether this rank was asked to stop."""
    return _asked


def agreed(*, told: bool = False) -> bool:
    """Whether any rank was asked to stop, or told so by one of another world; a collective."""
    import torch
    import torch.distributed as dist

    asked = torch.tensor([int(_asked or told)], device=platform.device())
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    return bool(asked.item())
