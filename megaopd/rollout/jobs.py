"""What the dispatcher keeps of a response to sample, of a request under way, and of a server."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.rollout.base import Request, SamplingParams
from megaopd.rollout.records import Draft

if TYPE_CHECKING:
    from megaopd.rollout.server import Server


@dataclass(eq=False, slots=True)
class Job:
    """One response to sample, until it is delivered."""

    request: Request
    params: SamplingParams
    ends: frozenset[int]  # ids that end a response
    ticket: int
    deliver: Callable[["Job", Sample | UserError], None]
    submitted: float = field(default_factory=monotonic)
    draft: Draft = field(default_factory=Draft)
    tries: int = 0  # that failed on a server which was there
    avoid: str = ""  # name of the server that it failed on last
    sent: bool = False
    aborted: bool = False
    over: bool = False
    attempt: "Attempt | None" = None

    @property
    def cost(self) -> int:
        """Tokens that it may come to hold on a server."""
        return len(self.request.prompt.token_ids) + self.params.max_new_tokens


@dataclass(eq=False, slots=True)
class Attempt:
    """One request under way on one server."""

    job: Job
    server: "Server"
    life: "Life"
    rid: str
    version: int  # of the server's weights when it was sent
    syncs: int  # that the dispatcher had seen then
    answer: asyncio.Task[Any]
    given_up: asyncio.Future[None]
    overdue: bool = False

    def give_up(self) -> None:
        """Stop waiting for the answer."""
        if not self.given_up.done():
            self.given_up.set_result(None)


@dataclass(eq=False, slots=True)
class Life:
    """A server's weights, from where they were last unknown; and what is under way meanwhile."""

    incarnation: int
    versions: dict[str, int] = field(default_factory=dict)  # tag -> verified version
    attempts: set[Attempt] = field(default_factory=set)
    tokens: int = 0  # outstanding

    def add(self, attempt: Attempt) -> None:
        self.attempts.add(attempt)
        self.tokens += attempt.job.cost

    def discard(self, attempt: Attempt) -> None:
        self.attempts.discard(attempt)
        self.tokens -= attempt.job.cost
