"""Start the ranks of a job on this machine with torchrun's own agent, and report its one error.

Under torchrun (several nodes) the ranks exist already and this module is not used.
"""

import os
import socket
import sys
from collections.abc import Sequence

from megaopd.errors import UserError

# Set where the agent runs: each life of a job gets a new store, held by its rank 0.
FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def under_torchrun() -> bool:
    """Whether this process is a rank already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_ranks(arguments: Sequence[str], ranks: int, *, port: int = 0, restarts: int = 0) -> int:
    """Run `python -m megaopd ARGUMENTS` in `ranks` processes; the exit code of the job.

    Args:
        port: rendezvous port on loopback; 0 picks a free one.
        restarts: how often all ranks are started again after one has failed.

    Returns:
        0, 2 where a rank refused its input (it has printed why), 75 where the run stopped as it
        was asked, 1 otherwise.
    """
    if ranks == 1 and not port and not restarts:
        return _run_single(arguments)
    from torch.distributed.launcher.api import LaunchConfig

    from megaopd.elastic import supervise

    _check_port(port)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHELASTIC_LOG_LEVEL", "ERROR")
    import logging

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"megaopd-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        max_restarts=restarts,
        monitor_interval=0.1,
    )
    return supervise(config, sys.executable, ["-m", "megaopd", *arguments])


def _run_single(arguments: Sequence[str]) -> int:
    """One rank needs no agent: it is this process."""
    from megaopd.cli import main

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    return main(list(arguments))


def _check_port(port: int) -> None:
    if port and not port_is_free("127.0.0.1", port):
        raise UserError(
            f"port {port} on 127.0.0.1 is in use",
            expected="a free port for the rendezvous",
            fix="choose another --port, or leave it out",
        )


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def check_restarts() -> None:
    """Refuse a torchrun whose restarts would fail, while it is in its first life.

    By default torchrun keeps one store for all lives of a job, and a process group that is made
    anew in it meets the addresses of the dead ranks.
    """
    wanted = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if wanted != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            f"torchrun --max-restarts={wanted} with one store for all lives of the job",
            expected="a store of its own for each life",
            fix="python -m megaopd.elastic in torchrun's place, with --rdzv-backend=c10d",
        )


def restart_count() -> int:
    """How often the launcher has started this job's ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def claim_error() -> bool:
    """True for the first rank of the job that fails: it alone prints the error."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    store = dist.distributed_c10d._get_default_store()
    try:
        return store.add("megaopd/errors", 1) == 1
    except dist.DistError:  # rank 0 held it and has gone, for a reason that it said
        return False
