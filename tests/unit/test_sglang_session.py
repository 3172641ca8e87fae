"""Syncs, aborts, scheduling and sessions, against servers that do as they are told."""

import asyncio
import gc
import time
from collections.abc import Callable

import pytest

from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.rollout import http
from megaopd.rollout.base import NeedsWeights, SamplingParams
from megaopd.rollout.jobs import Attempt, Job
from tests.unit.fake_servers import (
    PARAMS,
    Rig,
    check_whole,
    cut,
    deaf,
    error_500,
    one,
    request,
    until_aborted,
    wait_for,
)


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
