"""The dispatcher and its sessions against servers that misbehave as no real one can be made to."""

import asyncio
import dataclasses
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from megaopd.data.types import Prompt, Sample, Span
from megaopd.errors import UserError
from megaopd.rollout import dispatch, http
from megaopd.rollout.base import NeedsWeights, Request, SamplingParams
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.dispatch import Dispatcher
from megaopd.rollout.http import ServerClient, ServerError, error_message
from megaopd.rollout.jobs import Attempt, Job
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


@pytest.fixture
def make_rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    monkeypatch.setattr(http, "BACKOFF_S", 0.02)
    monkeypatch.setattr(dispatch, "ABORT_AGAIN_S", 0.05)
    monkeypatch.setattr(dispatch, "ABORT_GRACE_S", 0.5)
    rigs: list[Rig] = []

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
        rigs.append(Rig(loop, servers, dispatcher, complaints, []))
        for server in servers:
            rigs[-1].set(server, "serving", 3)
        return rigs[-1]

    yield make
    for rig in rigs:
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


class TestClient:
    """rollout/http.py."""

    def ask(self, rig: Rig, behave: Behaviour, **options: Any) -> Any:
        rig.servers[0].script = [behave]
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1, "stop_token_ids": []}}
        return rig.loop.run(rig.servers[0].client.post("/generate", body, **options))

    def test_answers(self, make_rig: Callable[..., Rig]):
        rig = make_rig()
        assert self.ask(rig, whole)["output_ids"] == [6]
        assert self.ask(rig, page) == "<html>a proxy's page</html>"

    @pytest.mark.parametrize(
        ("behave", "status", "said", "refused"),
        [
            (error_400, 400, "too many tokens", True),
            (error_500, 500, "out of memory", False),
            (garbage, 200, "an answer that is not JSON: ", False),
            (reset, 0, "", False),
            (half, 0, "", False),
            (deaf, 0, "no answer within 0.2 s", False),
        ],
    )
    def test_errors(
        self, make_rig: Callable[..., Rig], behave: Any, status: int, said: str, refused: bool
    ):
        rig = make_rig()
        with pytest.raises(ServerError) as caught:
            self.ask(rig, behave, timeout=0.2)
        error = caught.value
        assert (error.status, error.refused) == (status, refused)
        assert error.message.startswith(said) and error.unreachable == (status == 0)
        assert f"{rig.servers[0].url}/generate: {said}" in str(error)

    @pytest.mark.parametrize(("errno", "asked"), [(None, 2), (104, 1)])
    def test_a_request_that_was_not_written_is_sent_again(
        self, make_rig: Callable[..., Rig], monkeypatch: Any, errno: int | None, asked: int
    ):
        """Whatever has an errno may have arrived: who asked decides about that."""
        rig, real, calls = make_rig(), ServerClient._exchange, []

        async def first_fails(client: ServerClient, *what: Any) -> Any:
            calls.append(what)
            if len(calls) == 1:
                raise aiohttp.ClientOSError(errno, "Can not write request body")
            return await real(client, *what)

        monkeypatch.setattr(ServerClient, "_exchange", first_fails)
        if asked == 1:
            with pytest.raises(ServerError, match="Can not write"):
                self.ask(rig, whole)
        else:
            assert self.ask(rig, whole)["output_ids"] == [6]
        assert len(calls) == asked

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b'{"error": {"message": "m", "code": 400}}', "m"),
            (b'{"error": "m"}', "m"),
            (b'{"detail": [{"loc": 1}]}', "[{'loc': 1}]"),
            (b"plain", "plain"),
            (b"[1]", "[1]"),
        ],
    )
    def test_what_an_error_says(self, content: bytes, said: str):
        assert error_message(content) == said


@pytest.mark.parametrize("fault", [error_500, reset, half, garbage, page, short, positive])
def test_a_fault_is_tried_again(make_rig: Callable[..., Rig], fault: Behaviour):
    rig = make_rig()
    rig.servers[0].script = [fault, fault]
    sample = one(rig)
    check_whole(sample)
    assert sample.finish_reason == "length" and rig.count("retries") == 2
    rids = [body["rid"] for body in rig.servers[0].bodies]
    assert len(set(rids)) == 3 and len({len(rid) for rid in rids}) == 1


def test_retries_are_bounded(make_rig: Callable[..., Rig]):
    rig = make_rig(retries=2)
    rig.servers[0].script = [error_500] * 3
    session = rig.session()
    session.submit(request(), PARAMS)
    with pytest.raises(UserError, match=r"'p5' failed 3 times.*server 0.*out of memory"):
        session.wait(10)
    assert session.pending == 0 and len(rig.servers[0].bodies) == 3
    assert len(rig.complaints) == 3
    check_whole(one(rig))


def test_a_refusal_is_not_tried_again(make_rig: Callable[..., Rig]):
    rig = make_rig()
    rig.servers[0].script = [error_400]
    session = rig.session()
    session.submit(request(), PARAMS)
    with pytest.raises(UserError, match="server 0 refused a request: too many tokens"):
        session.wait(10)
    assert len(rig.servers[0].bodies) == 1 and rig.complaints == []


def test_a_failed_request_goes_to_another_server(make_rig: Callable[..., Rig]):
    rig = make_rig(2)
    for server in rig.servers:
        server.script = [error_500]
    check_whole(one(rig))
    assert [len(server.bodies) for server in rig.servers] in ([2, 1], [1, 2])


@pytest.mark.parametrize("legs", [[2], [1, 3], [0, 4]])
def test_partial_answers_are_joined(make_rig: Callable[..., Rig], legs: list[int]):
    rig = make_rig()
    rig.servers[0].script = [cut(count) for count in legs]
    check_whole(one(rig))
    done = sum(legs)
    last = rig.servers[0].bodies[-1]
    assert last["input_ids"] == [1, 2, 5, *range(6, 6 + done)]
    assert last["sampling_params"]["max_new_tokens"] == 6 - done
    assert rig.count("resumed") == len(legs) and rig.count("tokens") == 6


def test_an_end_token_of_the_model_alone_does_not_end(make_rig: Callable[..., Rig]):
    rig = make_rig()
    rig.servers[0].script = [cut(2, "stop")]  # 7 ends nothing here
    check_whole(one(rig))
    assert one(rig, SamplingParams(6, stop_ids=(9,))).response_ids == (6, 7, 8, 9)
    assert rig.servers[0].bodies[-1]["sampling_params"]["stop_token_ids"] == [9, EOS]


def test_a_server_that_never_begins_is_an_error(make_rig: Callable[..., Rig]):
    rig = make_rig(retries=1)
    rig.servers[0].script = [cut(0), cut(0)]
    session = rig.session()
    session.submit(request(), PARAMS)
    with pytest.raises(UserError, match="before its first token"):
        session.wait(10)


def test_too_slow_a_response_is_cut_and_goes_on_elsewhere(make_rig: Callable[..., Rig]):
    rig = make_rig(2, request_timeout_s=0.3)
    for server in rig.servers:
        server.script = [until_aborted(2)]
    first = one(rig, SamplingParams(6))
    check_whole(first)
    assert rig.count("retries") == 2 and rig.count("resumed") == 2
    assert [len(server.bodies) for server in rig.servers] in ([2, 1], [1, 2])


def test_a_server_deaf_to_aborts_is_given_up(make_rig: Callable[..., Rig]):
    rig = make_rig(2, request_timeout_s=0.2)
    for server in rig.servers:
        server.script = [deaf]
    check_whole(one(rig))
    assert all("nor to an abort" in why for why in rig.complaints) and len(rig.complaints) == 2


def test_a_server_in_doubt_costs_no_try(make_rig: Callable[..., Rig]):
    """Its connections break, and the fleet has not yet decided what to think of it."""
    rig = make_rig(retries=1)
    rig.servers[0].script = [reset] * 5
    rig.servers[0].why = "no answer"
    check_whole(one(rig))
    assert rig.count("retries") == 5


def test_a_lost_server_costs_no_try(make_rig: Callable[..., Rig]):
    """A hanging server keeps the connection: the fleet's word brings the requests elsewhere."""
    rig = make_rig(2, retries=0)
    for server in rig.servers:
        server.script = [deaf] * 5
    session = rig.session()
    session.submit(request(), PARAMS)
    assert session.wait(0.2) == []
    hung = next(server for server in rig.servers if server.bodies)
    other = rig.servers[1 - rig.servers.index(hung)]
    other.script = []
    rig.set(hung, "lost")
    ((_, sample),) = session.wait(10)
    check_whole(sample)
    assert rig.count("retries") == 0 and rig.complaints == []


def test_unknown_weights_are_never_handed_out(make_rig: Callable[..., Rig]):
    """A restart that nobody noticed: the server is taken out, the sample is drawn again."""
    rig = make_rig()
    server = rig.servers[0]
    server.script = [tagged("default")]
    session = rig.session()
    session.submit(request(), PARAMS)
    with pytest.raises(NeedsWeights):
        session.wait(10)
    assert server.state == "unsynced" and session.pending == 1
    with pytest.raises(NeedsWeights):
        session.wait(10)
    rig.set(server, "serving", 3)
    ((_, sample),) = session.wait(10)
    check_whole(sample)
    assert rig.count("resampled") == 1


def test_a_restart_between_request_and_answer(make_rig: Callable[..., Rig]):
    """The tag is right, but those weights were gone: version 3 was not verified since."""
    rig = make_rig()
    server = rig.servers[0]
    server.delay = 0.3
    session = rig.session()
    session.submit(request(), PARAMS)
    assert session.wait(0.1) == []
    rig.set(server, "serving", 4, incarnation=1, tag="run-4")
    ((_, sample),) = session.wait(10)
    assert sample.weight_version == 4 and len(server.bodies) == 2


class TestSync:
    def test_nothing_is_sent_meanwhile(self, make_rig: Callable[..., Rig]):
        rig = make_rig()
        rig.loop.call(rig.dispatcher.hold)
        session = rig.session()
        session.submit(request(), PARAMS)
        assert session.wait(0.2) == [] and rig.servers[0].bodies == []
        rig.loop.call(rig.dispatcher.release)
        check_whole(session.wait(10)[0][1])

    @pytest.mark.parametrize("good", [True, False])
    def test_answers_are_judged_when_it_is_over(self, make_rig: Callable[..., Rig], good: bool):
        """What came in while weights were pushed may be of weights that the push broke."""
        rig = make_rig()
        server = rig.servers[0]
        server.delay = 0.2
        session = rig.session()
        session.submit(request(), PARAMS)
        assert session.wait(0.1) == []
        rig.loop.call(rig.dispatcher.hold)
        rig.set(server, "syncing", 3)
        server.tag = "run-4"
        assert session.wait(0.5) == [] and len(server.bodies) == 1
        rig.set(server, "serving" if good else "unsynced", 4)
        rig.loop.call(rig.dispatcher.release)
        if not good:
            with pytest.raises(NeedsWeights):
                session.wait(10)
            rig.set(server, "serving", 4)
        ((_, sample),) = session.wait(10)
        assert sample.weight_version == 4
        assert len(server.bodies) == (1 if good else 2)
        assert rig.count("resampled") == (0 if good else 1)

    def test_requests_cut_by_a_sync_cost_no_try(self, make_rig: Callable[..., Rig]):
        """Those that wait in a server's own queue come out without a token at every one."""
        rig = make_rig(retries=0)
        server, session = rig.servers[0], rig.session()
        server.script = [until_aborted(0)] * 3
        session.submit(request(), PARAMS)
        for sync in range(1, 4):
            wait_for(lambda sync=sync: len(server.bodies) == sync)
            rig.loop.call(rig.dispatcher.hold)
            rig.loop.call(server.heard_abort(server.bodies[-1]["rid"]).set)
            assert session.wait(0.1) == []
            rig.loop.call(rig.dispatcher.release)
        check_whole(session.wait(10)[0][1])


class TestAbort:
    def test_before_it_was_sent(self, make_rig: Callable[..., Rig]):
        rig = make_rig()
        rig.set(rig.servers[0], "starting")
        session = rig.session()
        first, second = (session.submit(request(), PARAMS) for _ in range(2))
        session.abort([first])
        ((ticket, sample),) = session.wait(10)
        assert ticket == first and sample.finish_reason == "abort"
        assert sample.response_ids == () and sample.weight_version == 3
        rig.set(rig.servers[0], "serving", 3)
        assert [t for t, _ in session.wait(10)] == [second]
        assert len(rig.servers[0].bodies) == 1

    def test_while_it_runs(self, make_rig: Callable[..., Rig]):
        rig = make_rig()
        rig.servers[0].script = [until_aborted(4)]
        session = rig.session()
        session.submit(request(), PARAMS)
        assert session.wait(0.1) == []
        session.abort()
        ((_, sample),) = session.wait(10)
        check_whole(sample, 4)
        assert sample.finish_reason == "abort" and rig.count("aborted") == 1

    def test_an_answer_that_was_faster(self, make_rig: Callable[..., Rig]):
        rig = make_rig()
        rig.servers[0].delay = 0.2
        session = rig.session()
        session.submit(request(), PARAMS)
        assert session.wait(0.1) == []
        session.abort()
        ((_, sample),) = session.wait(10)
        check_whole(sample)
        assert sample.finish_reason == "length"

    def test_of_a_server_that_does_not_answer(self, make_rig: Callable[..., Rig]):
        """What earlier legs brought is kept."""
        rig = make_rig()
        rig.servers[0].script = [cut(2), deaf]
        session = rig.session()
        session.submit(request(), PARAMS)
        assert session.wait(0.2) == []
        session.abort()
        ((_, sample),) = session.wait(10)
        check_whole(sample, 2)
        assert sample.finish_reason == "abort"

    def test_while_it_rests_after_a_failure(
        self, make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
    ):
        rig = make_rig()
        monkeypatch.setattr(http, "BACKOFF_S", 1.0)
        rig.servers[0].script = [error_500]
        session = rig.session()
        session.submit(request(), PARAMS)
        assert session.wait(0.2) == []
        session.abort()
        ((_, sample),) = session.wait(0.3)
        assert sample.finish_reason == "abort"
        assert session.wait(1.5) == [] and len(rig.servers[0].bodies) == 1


class TestScheduling:
    def test_a_server_takes_so_many_at_once(self, make_rig: Callable[..., Rig]):
        """What it runs at once, and half as many that wait there."""
        rig = make_rig(concurrency=4)
        rig.servers[0].script = [until_aborted(6)] * 10
        session = rig.session()
        for index in range(10):
            session.submit(request(index=index), PARAMS)
        assert session.wait(0.3) == [] and len(rig.servers[0].bodies) == 6
        session.close()

    def test_a_prompt_keeps_to_its_server(self, make_rig: Callable[..., Rig]):
        rig = make_rig(3)
        session = rig.session()
        for start in range(30):
            for _ in range(3):
                session.submit(request(start), PARAMS)
                session.wait(10)
        where = [{body["input_ids"][2] for body in server.bodies} for server in rig.servers]
        assert all(where) and sum(map(len, where)) == 30

    def test_a_busy_server_gives_to_others(self, make_rig: Callable[..., Rig]):
        rig = make_rig(2)
        for server in rig.servers:
            server.script = [until_aborted(6)] * 40
        session = rig.session()
        for _ in range(40):
            session.submit(request(), PARAMS)
        assert session.wait(0.5) == []
        assert min(len(server.bodies) for server in rig.servers) >= 16
        session.close()

    def test_groups_are_spread_over_servers(self, make_rig: Callable[..., Rig]):
        rig = make_rig(2)
        session = rig.session()
        for start in range(16):
            for _ in range(4):
                session.submit(request(start), PARAMS)
        for _ in iter(lambda: session.pending, 0):
            session.wait(10)
        assert min(len(server.bodies) for server in rig.servers) >= 16


class TestSession:
    def test_waiting(self, make_rig: Callable[..., Rig]):
        rig = make_rig()
        session = rig.session()
        assert session.wait() == [] and session.pending == 0
        rig.servers[0].delay = 0.3
        session.submit(request(), PARAMS)
        begun = time.monotonic()
        assert session.wait(0.05) == [] and time.monotonic() - begun < 0.25
        assert session.pending == 1 and len(session.wait()) == 1 and session.pending == 0

    def test_sessions_do_not_mix(self, make_rig: Callable[..., Rig]):
        rig = make_rig()
        one, two = rig.session(), rig.session()
        ours = {one.submit(request(10), PARAMS) for _ in range(5)}
        theirs = {two.submit(request(20), PARAMS) for _ in range(5)}
        got: dict[int, Sample] = {}
        while two.pending:
            got.update(two.wait(10))
        assert set(got) == theirs and {s.prompt.id for s in got.values()} == {"p20"}
        got.clear()
        while one.pending:
            got.update(one.wait(10))
        assert set(got) == ours and {s.prompt.id for s in got.values()} == {"p10"}

    def test_what_is_wrong_is_not_sent(self, make_rig: Callable[..., Rig]):
        rig = make_rig()
        session = rig.session()
        for start, params in ((101, PARAMS), (5, SamplingParams(62))):
            with pytest.raises(UserError):
                session.submit(request(start), params)
        assert session.pending == 0 and rig.servers[0].bodies == []

    def test_close_forgets(self, make_rig: Callable[..., Rig]):
        rig = make_rig()
        rig.servers[0].script = [until_aborted(3)]
        session = rig.session()
        session.submit(request(), PARAMS)
        assert session.wait(0.1) == []
        session.close()
        assert session.pending == 0 and session.wait() == []
        check_whole(one(rig))

    def test_nothing_is_kept_of_what_was_handed_out(self, make_rig: Callable[..., Rig]):
        rig = make_rig()
        session, seen = rig.session(), 0
        for index in range(2000):
            session.submit(request(index % 50, index), PARAMS)
        while session.pending:
            seen += len(session.wait(10))
        assert seen == 2000
        rig.loop.run(asyncio.sleep(0.1))
        gc.collect()
        kept = [x for x in gc.get_objects() if isinstance(x, (Job, Attempt, Sample))]
        assert kept == []
