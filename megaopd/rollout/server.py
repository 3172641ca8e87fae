"""The SGLang servers of a run: started, watched, started again and stopped; or attached to.

Everything here runs on one event loop. rollout/watch.py looks after servers that are healthy.
"""

import asyncio
import atexit
import importlib.util
import os
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from megaopd.errors import UserError
from megaopd.launch import port_is_free
from megaopd.report.progress import progress
from megaopd.rollout.command import (
    PYTHON_VARIABLE,
    Device,
    Served,
    gpus_per_server,
    read_key,
    served,
    server_command,
)
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.http import ServerClient, ServerError
from megaopd.rollout.member import Server, StartFailed, say
from megaopd.rollout.process import ServerProcess, free_port, log_error
from megaopd.rollout.watch import LOOK_TIMEOUT_S, Watch

POLL_S = 0.5  # between two looks at a server that starts
PORT_TRIES = 3
# For a server to end by itself: on a GPU it gives its memory back, which takes it 5 to 10 s.
GRACE_S = {"cpu": 0.0, "cuda": 15.0}


class Fleet:
    """All servers of a run.

    Args:
        model_dir: the Hugging Face checkpoint that our servers load.
        dtype: of the weights in a server, where `config.dtype` is empty.
        log_dir: gets server_0.log and so on; every start is appended.
        gpus: of this node for our servers, divided among them in order; empty: from 0 on.

    Raises:
        UserError: no key where one is configured, too few GPUs, or no model.
    """

    def __init__(
        self,
        config: ServerConfig,
        model_dir: Path,
        *,
        device: Device,
        dtype: str,
        log_dir: Path,
        gpus: Sequence[int] = (),
    ) -> None:
        self.config, self.model_dir, self.dtype = config, model_dir, dtype
        self.device: Device = device
        self.stopping = False
        self._key = read_key(config, os.environ)
        self._model: Served | None = None
        self._owner = os.getpid()
        if config.addresses:
            self.servers = [
                Server(f"server {i}", self._client(url), attached=True)
                for i, url in enumerate(config.addresses)
            ]
        else:
            self.servers = self._own_servers(log_dir, gpus)

    def _own_servers(self, log_dir: Path, gpus: Sequence[int]) -> list[Server]:
        config, each = self.config, gpus_per_server(self.config)
        self._model = served(self.model_dir)
        if self.device == "cpu":
            gpus = ()
        elif not gpus:
            gpus = range(each * config.count)
        elif len(gpus) < each * config.count:
            raise UserError(
                f"server.count = {config.count} servers of {each} GPUs each on {len(gpus)} GPUs",
                fix="lower server.count, server.tensor or server.data",
            )
        log_dir.mkdir(parents=True, exist_ok=True)
        return [
            Server(
                f"server {i}",
                self._client(self._own_url(config.port + i if config.port else 0)),
                log=log_dir / f"server_{i}.log",
                gpus=tuple(gpus[i * each : (i + 1) * each]),
            )
            for i in range(config.count)
        ]

    def _client(self, url: str) -> ServerClient:
        return ServerClient(url, api_key=self._key)

    def _own_url(self, port: int) -> str:
        """Where this process reaches a server of ours on `port` (0: a free one)."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port or free_port(host)}"

    async def start(self) -> None:
        """Start (or find) all servers at once and wait until they are healthy.

        Raises:
            UserError: one of them is not healthy in time; none of ours is left running.
        """
        attached = self.servers[0].attached
        if not (attached or os.environ.get(PYTHON_VARIABLE) or importlib.util.find_spec("sglang")):
            raise UserError(
                "SGLang is not installed",
                expected="SGLang beside this package, for servers that are started here",
                fix="want=sglang bash launch/env.sh",
            )
        atexit.register(self._end_processes, 0.0)
        healthy = False
        try:
            stage = "find SGLang servers" if attached else "start SGLang servers"
            with progress(stage, len(self.servers)) as advance:
                await together(self._first_start(server, advance) for server in self.servers)
            healthy = True
        finally:
            if not healthy:
                self._end_processes(0.0)
                await self._close()

    async def _first_start(self, server: Server, advance: Callable[[int], None]) -> None:
        begun = monotonic()
        try:
            await self.bring_up(server, lambda: advance(0))
        except StartFailed as err:
            raise self.start_error(server, str(err)) from None
        advance(1)
        release = f"SGLang {server.capabilities.version}".strip()
        say(f"{server.name}: {release} at {server.url}, healthy after {monotonic() - begun:.0f} s")

    def start_error(self, server: Server, failure: str) -> UserError:
        """What to tell the user of a server that is not to be had."""
        if server.log is None:
            return UserError(
                f"{server.name} at {server.url} {failure}",
                fix="look at that server, at server.addresses and at server.api_key_env",
            )
        lines = log_error(server.log) if server.starts else []
        return UserError(
            f"{server.name} {failure}" + "".join(f"\n    {line}" for line in lines),
            fix=f"its log says more: {server.log}",
        )

    async def bring_up(self, server: Server, tick: Callable[[], None] = lambda: None) -> None:
        """Start one server (or find it) and wait until it is healthy; then it is "unsynced".

        Args:
            tick: called now and then meanwhile.

        Raises:
            StartFailed: it is not healthy in time.
        """
        for attempt in range(PORT_TRIES):
            try:
                if not server.attached:
                    await self._launch(server)
                await self.accept(server, await self._until_healthy(server, tick))
                return
            except StartFailed:
                if server.process is not None:
                    server.process.kill()
                clash = "address already in use" in server.log_tail().lower()
                if not clash or self.config.port or attempt == PORT_TRIES - 1:
                    raise

    async def _launch(self, server: Server) -> None:
        if self.stopping:
            raise StartFailed("is not started any more")
        port = urlsplit(server.url).port or 0
        if not port_is_free(self.config.host, port):
            if self.config.port:
                raise StartFailed(f"cannot listen on port {port}: it is in use")
            await server.client.close()
            server.client = self._client(self._own_url(0))
            port = urlsplit(server.url).port or 0
        server.seed = random.SystemRandom().randrange(2**31)
        server.starts += 1
        command = server_command(
            self.config,
            self.model_dir,
            device=self.device,
            dtype=self.dtype,
            port=port,
            environ=os.environ,
            gpus=server.gpus,
            seed=server.seed,
            model=self._model,
        )
        assert server.log is not None
        title = f"{server.name}, start {server.starts}"
        try:
            # Not in a thread: if this task were cancelled, nobody would know the new processes.
            server.process = ServerProcess(
                command, server.log, title=title, cores=self.config.cores
            )
        except OSError as err:
            raise StartFailed(f"cannot be started: {err}") from err

    async def _until_healthy(self, server: Server, tick: Callable[[], None]) -> dict[str, Any]:
        """What its /server_info says, once it does."""
        deadline, problem = monotonic() + self.config.start_timeout_s, "no answer"
        timeout = max(LOOK_TIMEOUT_S, self.config.health_interval_s)
        while monotonic() < deadline:
            if not server.alive():
                raise StartFailed(f"ended while it started ({server.ending()})")
            try:
                await server.client.get("/health", timeout=timeout)
                return await server.client.server_info(timeout=timeout)
            except ServerError as err:
                if err.status in (401, 403):
                    raise StartFailed(f"refuses our key: {err}") from err
                problem = str(err)
            tick()
            await asyncio.sleep(POLL_S)
        raise StartFailed(f"was not healthy within {self.config.start_timeout_s:g} s: {problem}")

    async def accept(self, server: Server, info: dict[str, Any]) -> None:
        """Take a healthy server, whose weights are not known, for what `info` says.

        Raises:
            StartFailed: it is not the one that was started, or breaks off.
        """
        if not server.attached and info.get("random_seed") != server.seed:
            raise StartFailed(f"is not what answers on its port: {server.url} is another server")
        try:
            server.met(info, await server.client.capabilities(info))
        except ServerError as err:
            raise StartFailed(f"does not say what it can do: {err}") from err

    async def supervise(self, on_change: Callable[[Server], None]) -> None:
        """Look after the servers until cancelled (or `stop`); tell of every change of state.

        Raises:
            UserError: every server is lost for good.
        """
        await together(Watch(self, server, on_change).run() for server in self.servers)

    def lost(self, server: Server, why: str) -> None:
        """A request to it broke: look at it now. To be called on the loop."""
        server.why = why
        server.wake.set()

    async def stop(self) -> None:
        """End every process that was started here. Attached servers go on."""
        self.stopping = True
        await asyncio.to_thread(self._end_processes, GRACE_S[self.device])
        await self._close()

    async def _close(self) -> None:
        atexit.unregister(self._end_processes)
        for server in self.servers:
            server.state, server.version = "lost", -1
            server.wake.set()
            await server.client.close()

    def _end_processes(self, grace_s: float) -> None:
        if os.getpid() != self._owner:  # a fork of the trainer that ends
            return
        running = [server.process for server in self.servers if server.process is not None]
        if grace_s:
            for process in running:
                process.terminate()
            deadline = monotonic() + grace_s
            for process in running:
                process.wait(max(0.0, deadline - monotonic()))
        for process in running:
            process.kill()
        for process in running:
            process.wait(10.0)


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all at once; the first failure cancels the others and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
