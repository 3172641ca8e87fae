"""The client and the dispatcher against servers that misbehave as no real one can be made to."""

from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from megaopd.errors import UserError
from megaopd.rollout.base import NeedsWeights, SamplingParams
from megaopd.rollout.http import ServerClient, ServerError, error_message
from tests.unit.fake_servers import (
    EOS,
    PARAMS,
    Behaviour,
    Rig,
    check_whole,
    cut,
    deaf,
    error_400,
    error_500,
    garbage,
    half,
    one,
    page,
    positive,
    request,
    reset,
    short,
    tagged,
    until_aborted,
    whole,
)


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
