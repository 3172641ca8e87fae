"""Looks after one healthy server: finds that it died, hangs or was restarted, and starts it again.

A look is GET /health, which the front end answers, and GET /server_info, which passes through the
scheduler; both answer while a server is paused. A scheduler that does not answer is excused while
weights are pushed, and while it computes: one batch can take long on a CPU.
"""

import asyncio
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import TYPE_CHECKING, Any

from megaopd.rollout.http import ServerError
from megaopd.rollout.member import Server, StartFailed, State, identity_of, say

if TYPE_CHECKING:
    from megaopd.rollout.server import Fleet

LOOK_TIMEOUT_S = 2.0  # of a look; longer with a longer server.health_interval_s
GUARD_S = 0.5  # a server's guard has noticed by then that it ended
BUSY_S = 300.0  # SGLang itself ends a server whose batch takes so long
BACKOFF_S, BACKOFF_MAX_S = 1.0, 60.0  # before a restart; doubled every time


class Watch:
    """One server of a fleet, which is healthy when this begins.

    Args:
        on_change: is told of every change of the server's state.
    """

    def __init__(self, fleet: "Fleet", server: Server, on_change: Callable[[Server], None]) -> None:
        self.fleet, self.server, self.config = fleet, server, fleet.config
        self._on_change = on_change
        self._timeout = max(LOOK_TIMEOUT_S, fleet.config.health_interval_s)
        self._restarts = 0
        self._busy_since: float | None = None
        self._tag: tuple[int, int, str] | None = None  # incarnation, version, name of its weights

    async def run(self) -> None:
        """Until cancelled, or the fleet is stopped, or the server is lost for good.

        Raises:
            UserError: it was the last one.
        """
        interval, server = self.config.health_interval_s, self.server
        misses, due = 0, monotonic() + interval
        while not self.fleet.stopping and not server.gone:
            called = await self._pause(due - monotonic())
            if self.fleet.stopping:
                return
            begun = monotonic()
            problem = await self._look()
            if self.fleet.stopping:
                return
            if not called:  # a look out of turn counts only if it finds that the server has ended
                due = begun + interval
                misses = misses + 1 if problem else 0
            if server.alive() and misses < self.config.health_misses:
                server.why = problem
                continue
            self._change("lost", problem)
            await (self._find_again() if server.attached else self._restart())
            misses, due = 0, monotonic() + interval

    async def _pause(self, seconds: float) -> bool:
        """Wait for the next look; whether it was called for."""
        wake = self.server.wake
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await wake.wait()
        except TimeoutError:
            return False
        wake.clear()
        return True

    def _change(self, state: State, why: str = "") -> None:
        server = self.server
        if state == "lost":
            say(f"{server.name} at {server.url} is lost: {why}")
            self._busy_since = self._tag = None
        server.state, server.version, server.why = state, -1, why
        self._on_change(server)

    async def _look(self) -> str:
        """What is wrong with the server; "" where it is well."""
        server = self.server
        if server.process is not None:
            server.process.working()  # from now on
        front, info = await asyncio.gather(
            _ask(server.client.get("/health", timeout=self._timeout)),
            _ask(server.client.server_info(timeout=self._timeout)),
        )
        if isinstance(front, ServerError) and not server.attached:
            await asyncio.sleep(GUARD_S)
        if not server.alive():
            return f"it ended ({server.ending()})"
        if isinstance(front, ServerError):
            return front.message
        if isinstance(info, ServerError):
            return "" if self._excused() else f"its scheduler does not answer: {info.message}"
        self._busy_since = None
        return await self._check_identity(info) if server.attached else ""

    def _excused(self) -> bool:
        """Whether its scheduler has better things to do than to answer."""
        process = self.server.process
        if self.server.state == "syncing":
            return True
        if process is None or not process.working():
            return False
        self._busy_since = self._busy_since or monotonic()
        return monotonic() - self._busy_since < BUSY_S

    async def _check_identity(self, info: dict[str, Any]) -> str:
        """An attached server that was restarted, or got weights from others, is "unsynced"."""
        server = self.server
        if identity_of(info) != server.identity:
            say(f"{server.name} at {server.url} was restarted")
            try:
                await self.fleet.accept(server, info)
            except StartFailed as err:
                return str(err)
            self._change("unsynced", "it was restarted")
            return ""
        held = (server.incarnation, server.version)
        model = await _ask(server.client.get("/model_info", timeout=self._timeout))
        if isinstance(model, ServerError) or server.state != "serving":
            return ""
        seen = (*held, str(model.get("weight_version")))
        if held == (server.incarnation, server.version):
            before, self._tag = self._tag or seen, seen
            if before[:2] == held and before != seen:
                say(f"{server.name} at {server.url}: someone else gave it weights {seen[2]!r}")
                server.incarnation += 1
                self._change("unsynced", "someone else changed its weights")
        return ""

    async def _restart(self) -> None:
        """End what is left of it and start it again, as often as is allowed."""
        server = self.server
        if server.process is not None:
            server.process.kill()
            await asyncio.to_thread(server.process.wait, 10.0)
        while not self.fleet.stopping:
            if self._restarts == self.config.restarts:
                return self._give_up()
            pause = min(BACKOFF_S * 2**self._restarts, BACKOFF_MAX_S)
            self._restarts += 1
            count = f"{self._restarts} of {self.config.restarts}"
            say(f"{server.name}: restart {count} in {pause:g} s; its log: {server.log}")
            await asyncio.sleep(pause)
            self._change("starting", server.why)
            try:
                await self.fleet.bring_up(server)
            except StartFailed as err:
                self._change("lost", str(err))
                continue
            self._on_change(server)
            say(f"{server.name}: healthy again at {server.url}")
            return

    def _give_up(self) -> None:
        server = self.server
        server.gone = True
        last = f"was lost, after {self._restarts} restarts: {server.why}"
        error = self.fleet.start_error(server, last)
        say(f"given up: {error}")
        self._on_change(server)
        if all(other.gone for other in self.fleet.servers):
            raise error

    async def _find_again(self) -> None:
        """Wait until an attached server is healthy again. Whatever it holds then, is not known."""
        while not self.fleet.stopping:
            await self._pause(self.config.health_interval_s)
            if self.fleet.stopping:
                return
            answers = [
                await _ask(self.server.client.get("/health", timeout=self._timeout)),
                await _ask(self.server.client.server_info(timeout=self._timeout)),
            ]
            if any(isinstance(answer, ServerError) for answer in answers):
                continue
            try:
                await self.fleet.accept(self.server, answers[1])
            except StartFailed:
                continue
            say(f"{self.server.name}: healthy again at {self.server.url}")
            self._on_change(self.server)
            return


async def _ask(request: Coroutine[Any, Any, Any]) -> Any:
    """The answer, or the ServerError."""
    try:
        return await request
    except ServerError as err:
        return err
