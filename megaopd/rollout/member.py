"""One server of a fleet, as everyone who uses it sees it."""

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megaopd.rollout.http import Capabilities, ServerClient
from megaopd.rollout.process import ServerProcess, log_tail

State = Literal["starting", "unsynced", "serving", "syncing", "lost"]

# Of what /server_info says: a key, and where it may be hidden.
SECRETS = ("api_key", "admin_api_key", "internal_states", "launch_command")
UNKNOWN = Capabilities("", False, False, False, False, False)


class StartFailed(Exception):
    """A server did not become healthy; the message goes on from the server's name."""


@dataclass(eq=False)
class Server:
    """One server: processes of ours, or an address.

    Whoever syncs sets `state` and `version`; everything else is the fleet's.
    """

    name: str
    client: ServerClient
    attached: bool = False
    log: Path | None = None  # None where attached
    gpus: tuple[int, ...] = ()
    state: State = "starting"
    version: int = -1  # of its verified weights; -1: unknown
    incarnation: int = 0  # of its weights: a change means that those it held are gone
    capabilities: Capabilities = UNKNOWN  # known once it was healthy
    info: dict[str, Any] = field(default_factory=dict)  # its /server_info, without secrets
    why: str = ""  # it is doubted, or lost
    gone: bool = False  # lost for good
    starts: int = 0  # of its processes
    process: ServerProcess | None = None
    seed: int = 0  # of the newest start
    identity: str = ""  # tells this start from every other
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # look at it now

    @property
    def url(self) -> str:
        return self.client.url

    def alive(self) -> bool:
        """Whether its processes run; an attached server's are not ours to see."""
        return self.attached or (self.process is not None and self.process.exit_code is None)

    def ending(self) -> str:
        """How its processes ended."""
        code = self.process.exit_code if self.process is not None else None
        return f"exit code {code}" if code is None or code <= 128 else f"signal {code - 128}"

    def log_tail(self, lines: int = 30) -> str:
        """The end of its log since the newest start; empty for an attached server."""
        return "\n".join(log_tail(self.log, lines)) if self.log else ""

    def met(self, info: Mapping[str, Any], capabilities: Capabilities) -> None:
        """It is healthy, and nobody knows its weights."""
        self.info = {key: value for key, value in info.items() if key not in SECRETS}
        self.capabilities, self.identity = capabilities, identity_of(info)
        self.incarnation += 1
        self.state, self.version, self.why = "unsynced", -1, ""


def identity_of(info: Mapping[str, Any]) -> str:
    """What differs between two starts of a server: its seed, and how long its start took."""
    return json.dumps([info.get("random_seed"), info.get("startup_time")])


def say(text: str) -> None:
    """One line to whoever watches the run."""
    print(f"megaopd: {text}", file=sys.stderr, flush=True)
