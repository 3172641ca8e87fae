"""Servers that misbehave as no real one can be made to, and a dispatcher on them."""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from megaopd.data.types import Prompt, Sample, Span
from megaopd.rollout import dispatch, http
from megaopd.rollout.base import NeedsWeights, Request, SamplingParams
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.dispatch import Dispatcher
from megaopd.rollout.http import ServerClient
from megaopd.rollout.loop import LoopThread
from megaopd.rollout.records import Limits
from megaopd.rollout.session import SGLangSession

EOS = 100
LIMITS = Limits(vocab=101, max_positions=64, mask_tokens=4096, seeded=False)
PARAMS = SamplingParams(6)
Behaviour = Callable[["FakeServer", dict[str, Any], web.Request], Awaitable[web.StreamResponse]]


class FakeServer:
    """Speaks SGLang's /generate: the tokens count up from the last one of the prompt.

    `script` is used up, one behaviour a request; then requests are answered as they should be.
    """

    def __init__(self, name: str, loop: LoopThread) -> None:
        # The fields of rollout.server.Server that the dispatcher looks at.
        self.name, self.state, self.version, self.incarnation = name, "serving", 3, 0
        self.tag, self.why = "run-3", ""
        self.script: list[Behaviour] = []
        self.bodies: list[dict[str, Any]] = []
        self.aborted: dict[str, asyncio.Event] = {}
        self.delay = 0.0
        loop.run(self._start())

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self.client = ServerClient(self.url)

    async def stop(self) -> None:
        await self.client.close()
        await self._runner.cleanup()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        await asyncio.sleep(self.delay)
        behave = self.script.pop(0) if self.script else whole
        return await behave(self, body, request)

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        self.aborted.setdefault(rid, asyncio.Event()).set()
        return web.Response()

    def heard_abort(self, rid: str) -> asyncio.Event:
        return self.aborted.setdefault(rid, asyncio.Event())


def tokens_of(body: dict[str, Any], count: int | None = None) -> list[int]:
    law, tokens = body["sampling_params"], []
    for i in range(law["max_new_tokens"] if count is None else count):
        tokens.append((body["input_ids"][-1] + 1 + i) % 101)
        if tokens[-1] in law["stop_token_ids"]:
            break
    return tokens


def answer(
    server: FakeServer, body: dict[str, Any], tokens: list[int], finish: str | None = None
) -> dict[str, Any]:
    if finish is None:
        stops = body["sampling_params"]["stop_token_ids"]
        finish = "stop" if tokens and tokens[-1] in stops else "length"
    return {
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": finish},
            "output_token_logprobs": [[-t / 100, t, None] for t in tokens],
            "weight_versions": [{"version": server.tag, "start": 0, "end": len(tokens)}],
        },
    }


async def whole(server: FakeServer, body: dict[str, Any], _: web.Request) -> web.Response:
    return web.json_response(answer(server, body, tokens_of(body)))


async def error_500(*_: Any) -> web.Response:
    return web.json_response({"error": {"message": "out of memory"}}, status=500)


async def error_400(*_: Any) -> web.Response:
    return web.json_response({"error": {"message": "too many tokens"}}, status=400)


async def reset(_: FakeServer, __: dict[str, Any], request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def half(_: FakeServer, __: dict[str, Any], request: web.Request) -> web.StreamResponse:
    """Break off inside the answer."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"output_ids": [1, 2')
    assert request.transport is not None
    request.transport.close()
    return response


async def garbage(*_: Any) -> web.Response:
    return web.Response(body=b'{"output_ids": [1, 2', content_type="application/json")


async def page(*_: Any) -> web.Response:
    return web.Response(text="<html>a proxy's page</html>", content_type="text/html")


async def short(server: FakeServer, body: dict[str, Any], _: web.Request) -> web.Response:
    made = answer(server, body, tokens_of(body))
    del made["meta_info"]["output_token_logprobs"][-1]
    return web.json_response(made)


async def positive(server: FakeServer, body: dict[str, Any], _: web.Request) -> web.Response:
    made = answer(server, body, tokens_of(body))
    made["meta_info"]["output_token_logprobs"][0][0] = 0.3
    return web.json_response(made)


def cut(count: int, finish: str = "abort") -> Behaviour:
    """Stop after `count` tokens."""

    async def behave(server: FakeServer, body: dict[str, Any], _: web.Request) -> web.Response:
        return web.json_response(answer(server, body, tokens_of(body, count), finish))

    return behave


def until_aborted(count: int) -> Behaviour:
    """Sample `count` tokens and wait; an abort brings them out."""

    async def behave(server: FakeServer, body: dict[str, Any], _: web.Request) -> web.Response:
        await server.heard_abort(body["rid"]).wait()
        return web.json_response(answer(server, body, tokens_of(body, count), "abort"))

    return behave


async def deaf(*_: Any) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


def tagged(tag: str) -> Behaviour:
    async def behave(server: FakeServer, body: dict[str, Any], _: web.Request) -> web.Response:
        made = answer(server, body, tokens_of(body))
        made["meta_info"]["weight_versions"][0]["version"] = tag
        return web.json_response(made)

    return behave


@dataclasses.dataclass
class Rig:
    """A dispatcher on fake servers, and what it complained of."""

    loop: LoopThread
    servers: list[FakeServer]
    dispatcher: Dispatcher
    complaints: list[str]
    sessions: list[SGLangSession]

    def session(self) -> SGLangSession:
        made = SGLangSession(self.loop, self.dispatcher, eos_ids=frozenset({EOS}), ready=self.ready)
        self.sessions.append(made)
        return made

    def ready(self) -> None:
        states = {server.state for server in self.servers}
        if "unsynced" in states and not states & {"serving", "syncing"}:
            raise NeedsWeights

    def set(self, server: FakeServer, state: str, version: int = -1, **fields: Any) -> None:
        """A change of a server's state, as the fleet tells it."""

        async def change() -> None:
            server.state, server.version = state, version
            vars(server).update(fields)
            self.dispatcher.changed(server)  # type: ignore[arg-type]

        self.loop.run(change())

    def count(self, name: str) -> float:
        return self.dispatcher.counts[name]


def rigs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    """Gives what makes a rig of so many servers; closes them all afterwards."""
    monkeypatch.setattr(http, "BACKOFF_S", 0.02)
    monkeypatch.setattr(dispatch, "ABORT_AGAIN_S", 0.05)
    monkeypatch.setattr(dispatch, "ABORT_GRACE_S", 0.5)
    made: list[Rig] = []

    def make(count: int = 1, **config: Any) -> Rig:
        loop, complaints = LoopThread("test"), []
        servers = [FakeServer(f"server {i}", loop) for i in range(count)]
        dispatcher = Dispatcher(
            ServerConfig(**config),
            servers,  # type: ignore[arg-type]
            LIMITS,
            tag=lambda version: f"run-{version}",
            lost=lambda server, why: complaints.append(f"{server.name}: {why}"),
        )
        dispatcher.version = 3
        made.append(Rig(loop, servers, dispatcher, complaints, []))
        for server in servers:
            made[-1].set(server, "serving", 3)
        return made[-1]

    yield make
    for rig in made:
        for server in rig.servers:
            rig.loop.run(server.stop())
        rig.loop.close()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def request(start: int = 5, index: int = 0) -> Request:
    return Request(Prompt(f"p{start}", (1, 2, start), "", None, ""), seed=7, index=index)


def one(rig: Rig, params: SamplingParams = PARAMS) -> Sample:
    session = rig.session()
    ticket = session.submit(request(), params)
    ((got, sample),) = session.wait(10)
    assert got == ticket and session.pending == 0
    return sample


def check_whole(sample: Sample, count: int = 6) -> None:
    assert sample.response_ids == tuple(range(6, 6 + count))
    assert sample.log_probs == tuple(-t / 100 for t in range(6, 6 + count))
    assert sample.spans == (Span(3, 0, count),) and sample.weight_version == 3
