"""torchrun's agent with two changes: a clean stop, and exit codes that survive.

    python -m megaopd.elastic [torchrun options] -m megaopd train ...

takes torchrun's options. SIGTERM and SIGUSR1 are handed to the ranks as the wish to stop
(megaopd/stop.py), a second one ends them. A rank that refused its input or stopped as it was asked
is not started again, whatever --max-restarts says, and its exit code is that of the agent.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from megaopd.errors import EXIT_INTERNAL, EXIT_STOPPED, EXIT_USER
from megaopd.launch import FRESH_STORE

# How a rank may end that starting it again does not change; the first that occurs decides.
FINAL = (EXIT_USER, EXIT_STOPPED)
# torch's own handlers; SIGTERM, which it has among them, is ours.
TORCH_SIGNALS = "SIGINT,SIGHUP,SIGQUIT"

_asked = False


def supervise(config: Any, entrypoint: str, arguments: Sequence[str]) -> int:
    """Start the ranks of this node and look after them until the job ends.

    Args:
        config: torch.distributed.launcher.api.LaunchConfig.

    Returns:
        0, 2 where a rank refused its input, 75 where the run stopped as it was asked, 1 otherwise.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError
    from torch.distributed.launcher import api

    config.signals_to_handle = TORCH_SIGNALS
    # torchrun would keep one store for all lives of the job. A process group that is made anew in
    # it may meet the addresses of dead ranks; and its own address is given out in the first round
    # only: a node that takes the place of a lost one would wait for it in vain.
    os.environ.setdefault(FRESH_STORE, "1")
    module: Any = api
    module.LocalElasticAgent = _agent_class()
    with _stop_handed_on():
        try:
            api.elastic_launch(config, entrypoint)(*arguments)
        except ChildFailedError as err:
            return _exit_code(err)
        except SignalException as err:
            _say(f"ended by {err.sigval.name}")
            return EXIT_STOPPED if _asked else 128 + err.sigval
        except RendezvousClosedError:
            _say("the job has ended on another node, whose output says why")
            return EXIT_STOPPED if _asked else EXIT_INTERNAL
    return 0


def _agent_class() -> type:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    base: Any = LocalElasticAgent

    class Agent(base):
        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            failures = result.failures.values()
            if any(failure.exitcode in FINAL for failure in failures) or (_asked and failures):
                self._remaining_restarts = 0
            return result

    return Agent


def _exit_code(failed: Any) -> int:
    """Of all ranks of this node that did not end well; says it of a rank that was killed."""
    codes = {failure.local_rank: failure.exitcode for failure in failed.failures.values()}
    for final in FINAL:
        if final in codes.values():
            return final
    for rank, code in codes.items():
        if code < 0:
            _say(f"rank {rank} was killed by signal {-code}")
    return EXIT_STOPPED if _asked else EXIT_INTERNAL


def _say(text: str) -> None:
    print(f"megaopd: {text}", file=sys.stderr, flush=True)


@contextmanager
def _stop_handed_on() -> Iterator[None]:
    """SIGTERM and SIGUSR1 of this process become SIGUSR1 of the ranks that it has started."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def hand_on(number: int, frame: FrameType | None) -> None:
        global _asked
        ranks = _children()
        if _asked or not ranks:
            _asked = True
            raise SignalException(f"signal {number}", signal.Signals(number))
        _asked = True
        _say(f"asked to stop by {signal.Signals(number).name}: after this step")
        for pid in ranks:
            os.kill(pid, signal.SIGUSR1)

    before = {n: signal.signal(n, hand_on) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process().children()]


def wait_for(host: str, port: int, seconds: float) -> bool:
    """Whether something listens there within that time; torch would give up after a minute, or at
    once where the name does not resolve yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return True
        except OSError:
            time.sleep(1)
    return False


def _is_here(host: str) -> bool:
    """Whether this node is the head, whose agent makes the store; as torch decides it."""
    from torch.distributed.elastic.rendezvous import utils

    return utils._matches_machine_hostname(host)


def main(argv: Sequence[str] | None = None) -> int:
    """torchrun's command line; the exit code of this node."""
    from torch.distributed import run

    parsed = run.parse_args(list(sys.argv[1:] if argv is None else argv))
    config, command, arguments = run.config_from_args(parsed)
    host, _, port = config.rdzv_endpoint.rpartition(":")
    seconds = float(config.rdzv_configs.get("join_timeout", 600))
    if host and not _is_here(host) and not wait_for(host, int(port), seconds):
        _say(f"no agent answers at {host}:{port} after {seconds:.0f} s: is the head node there?")
        return EXIT_INTERNAL
    return supervise(config, str(command), [str(word) for word in arguments])


if __name__ == "__main__":
    sys.exit(main())
