"""Servers of their own on one node, for a trainer that attaches to them:

    python -m megaopd.rollout.serve --model DIR [--dtype D] [--log-dir DIR] [server.key=value ...]

Starts `server.count` servers, prints their addresses and looks after them until SIGTERM or Ctrl-C.
`--print-commands` prints what would be run instead. launch/sglang_servers.sh wraps it for Slurm and
Kubernetes.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megaopd import platform
from megaopd.config import apply_overrides, build
from megaopd.errors import EXIT_USER, UserError
from megaopd.rollout.command import Device, gpus_per_server, served, server_command
from megaopd.rollout.config import ServerConfig, is_loopback
from megaopd.rollout.server import Fleet

FIRST_PORT = 30000  # where server.port is not set: others have to know it


def main(argv: Sequence[str] | None = None) -> int:
    """0 after SIGTERM or Ctrl-C, 2 where the servers cannot be had (one message)."""
    parser = argparse.ArgumentParser(prog="python -m megaopd.rollout.serve")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face checkpoint")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument("--log-dir", type=Path, default=Path("runs/servers"))
    parser.add_argument("--print-commands", action="store_true", help="and start nothing")
    parser.add_argument("overrides", nargs="*", metavar="server.key=value")
    arguments, rest = parser.parse_known_args(argv)
    if stray := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    try:
        config = server_config([*arguments.overrides, *rest])
        if arguments.print_commands:
            print_commands(config, arguments.model, arguments.dtype)
        else:
            asyncio.run(serve(config, arguments.model, arguments.dtype, arguments.log_dir))
    except UserError as err:
        print(f"megaopd: {err}", file=sys.stderr)
        return EXIT_USER
    return 0


def server_config(overrides: Sequence[str]) -> ServerConfig:
    """The `server` section, from overrides alone."""
    values = apply_overrides({}, overrides)
    if others := values.keys() - {"server"}:
        raise UserError(f"override of {sorted(others)[0]}", expected="server.key=value only")
    section = values.get("server", {})
    section.setdefault("port", FIRST_PORT)
    config = build(ServerConfig, section)
    if config.addresses:
        raise UserError("server.addresses is for the trainer", expected="servers to be started")
    return config


def addresses(config: ServerConfig) -> list[str]:
    """What a trainer is to put into server.addresses."""
    host = "127.0.0.1" if is_loopback(config.host) else config.host
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return [f"http://{host}:{config.port + i}" for i in range(config.count)]


def print_commands(config: ServerConfig, model: Path, dtype: str) -> None:
    """One line a server, without the environment that a server inherits unchanged."""
    for i in range(config.count):
        each = gpus_per_server(config)
        command = server_command(
            config,
            model,
            device=_device(),
            dtype=dtype,
            port=config.port + i,
            environ=os.environ,
            gpus=range(i * each, (i + 1) * each),
            model=served(model),
        )
        new = [f"{k}={shlex.quote(v)}" for k, v in command.env.items() if os.environ.get(k) != v]
        print(" ".join(new), shlex.join(command.argv))


async def serve(config: ServerConfig, model: Path, dtype: str, log_dir: Path) -> None:
    """Until SIGTERM or SIGINT.

    Raises:
        UserError: a server does not start, or none is left.
    """
    fleet = Fleet(config, model, device=_device(), dtype=dtype, log_dir=log_dir)
    work = asyncio.ensure_future(_serve(fleet))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        print("megaopd: stopping the servers", file=sys.stderr)
    finally:
        await fleet.stop()


async def _serve(fleet: Fleet) -> None:
    await fleet.start()
    print(f"server.addresses={json.dumps(addresses(fleet.config))}", flush=True)
    await fleet.supervise(lambda server: None)


def _device() -> Device:
    return "cuda" if platform.has_gpu() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
