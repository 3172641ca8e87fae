"""What every engine's sessions must do; part of the conformance suite."""

import time
from typing import Any, ClassVar

import pytest

from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.rollout.base import Request, SamplingParams, Session
from tests.dist.models import VOCAB
from tests.serving.reference import LONG, check_samples, many, prompt, requests, weights_of

SHORT = SamplingParams(4)


def collect(session: Session) -> list[tuple[int, Sample]]:
    """Everything that is pending."""
    done = []
    while session.pending:
        done += session.wait()
    return done


class SessionConformance:
    """The part about sessions, and what an engine says of itself."""

    tolerance: ClassVar[float] = 1e-4
    deterministic: ClassVar[bool] = True  # a seed alone decides a response
    can_abort_running: ClassVar[bool] = False  # requests run between calls of wait, and can be cut
    keeps_weights: ClassVar[bool] = True  # a failed update leaves an engine that goes on

    def test_every_request_comes_out_once(self, engine: Any, reference: Any) -> None:
        """1,000 requests through one session: tickets and samples belong together."""
        session, asked = engine.session(), many(1000)
        tickets = [session.submit(request, SHORT) for request in asked]
        assert len(set(tickets)) == 1000 and session.pending == 1000
        done = []
        while session.pending:
            before = session.pending
            done += (made := session.wait())
            assert made and session.pending == before - len(made)
        by_ticket = dict(done)
        assert len(done) == 1000 and set(by_ticket) == set(tickets)
        for ticket, request in zip(tickets, asked, strict=True):
            sample = by_ticket[ticket]
            assert (sample.index, sample.prompt) == (request.index, request.prompt)
            assert 1 <= len(sample.response_ids) <= 4
        check_samples({3: reference}, list(by_ticket.values())[::40], SHORT, self.tolerance)
        assert session.wait() == []

    def test_a_session_draws_what_generate_draws(self, engine: Any) -> None:
        if not self.deterministic:
            pytest.skip("this engine has no per-request determinism")
        session = engine.session()
        tickets = [session.submit(request, SHORT) for request in many(20)]
        done = dict(collect(session))
        assert [done[t] for t in tickets] == engine.generate(many(20), SHORT)

    def test_submitting_while_others_run(self, engine: Any) -> None:
        """Requests that come in one by one, with params of several kinds, as results go out."""
        session, left = engine.session(), many(60)
        kinds = [SHORT, SamplingParams(30, temperature=0.8), SamplingParams(2, top_k=3)]
        asked, done = {}, {}
        while left or session.pending:
            for request in left[:7]:
                params = kinds[request.index % 3]
                asked[session.submit(request, params)] = (request.index, params)
            left = left[7:]
            done |= dict(session.wait())
        assert done.keys() == asked.keys()
        for ticket, (index, params) in asked.items():
            assert done[ticket].index == index
            stopped = done[ticket].finish_reason == "stop"
            assert stopped or len(done[ticket].response_ids) == params.max_new_tokens

    def test_finished_ones_do_not_wait_for_others(self, engine: Any) -> None:
        session = engine.session()
        short = [session.submit(request, SHORT) for request in many(4)]
        long = [session.submit(request, LONG) for request in many(2)]
        first = session.wait()
        assert first and {ticket for ticket, _ in first} <= {*short}
        assert {ticket for ticket, _ in first + collect(session)} == {*short, *long}

    def test_wait_gives_up_after_its_timeout(self, engine: Any) -> None:
        session = engine.session()
        assert session.wait() == [] and session.wait(timeout=0.0) == []
        if not self.can_abort_running:
            pytest.skip("this engine works inside wait")
        session.submit(many(1)[0], LONG)
        begun = time.monotonic()
        assert session.wait(timeout=0.05) == [] and time.monotonic() - begun < 30.0
        assert session.pending == 1
        session.close()

    def test_sessions_do_not_mix(self, engine: Any) -> None:
        one, two = engine.session(), engine.session()
        first = {one.submit(r, SHORT): r.index for r in many(6)}
        second = {two.submit(Request(r.prompt, r.seed, r.index + 100), SHORT) for r in many(5)}
        done = collect(two)
        assert {t for t, _ in done} == second and {s.index for _, s in done} == {*range(100, 105)}
        assert {t: s.index for t, s in collect(one)} == first
        one.close()
        assert len(engine.generate(requests(), SHORT)) == 4  # a closed session stops no other

    def test_a_refused_request_leaves_the_session(self, engine: Any) -> None:
        session = engine.session()
        session.submit(many(1)[0], SHORT)
        with pytest.raises(UserError, match="token id"):
            session.submit(Request(prompt([VOCAB]), 0), SHORT)
        assert session.pending == 1 and len(collect(session)) == 1

    def test_abort_some(self, engine: Any) -> None:
        """The others finish, and every ticket comes out."""
        session = engine.session()
        tickets = [session.submit(request, LONG) for request in many(4)]
        keep = session.submit(many(5)[4], SamplingParams(6))
        session.abort(tickets[1:3])
        session.abort([keep + 1000])  # unknown or finished: nothing to stop
        done = dict(collect(session))
        assert done.keys() == {*tickets, keep}
        cut = [t for t in tickets if done[t].finish_reason == "abort"]
        assert set(cut) <= set(tickets[1:3])
        assert done[keep].finish_reason != "abort"

    def test_abort_keeps_what_was_sampled(self, engine: Any, reference: Any) -> None:
        """All of them: they come out at once, as prefixes whose log-probs and spans are right."""
        for delay in (0.4, 1.0, 3.0, 8.0):
            session = engine.session()
            tickets = [session.submit(request, LONG) for request in many(6)]
            if self.can_abort_running:
                time.sleep(delay)
            session.abort()
            done = collect(session)
            assert sorted(t for t, _ in done) == sorted(tickets)
            cut = [s for _, s in done if s.finish_reason == "abort"]
            assert all(len(s.response_ids) < LONG.max_new_tokens for s in cut)
            check_samples({3: reference}, [s for _, s in done], LONG, self.tolerance)
            if not self.can_abort_running:
                assert len(cut) == 6 and not any(s.response_ids or s.spans for s in cut)
                return
            if any(s.response_ids for s in cut):
                return
        raise AssertionError("no aborted request had any tokens, whenever it was aborted")

    def test_close_forgets(self, engine: Any) -> None:
        session = engine.session()
        for request in many(3):
            session.submit(request, LONG)
        session.close()
        assert session.pending == 0
        assert len(engine.generate(requests(), SHORT)) == 4

    def test_weights_that_change_between_waits(
        self, engine: Any, reference: Any, other: Any
    ) -> None:
        """Every token is of the weights that its span names, also within one response."""
        models = {3: reference, 4: other}
        for delay in (0.4, 1.0, 3.0, 8.0) if self.can_abort_running else (0.0,):
            session = engine.session()
            short = [session.submit(request, SHORT) for request in many(4)]
            long = [session.submit(request, LONG) for request in many(4)]
            done = dict(session.wait())
            first = list(done.values())
            time.sleep(delay)
            engine.update_weights(weights_of(other), 4)
            done |= dict(collect(session))
            engine.update_weights(weights_of(reference), 3)
            assert done.keys() == {*short, *long}
            check_samples(models, [done[t] for t in short], SHORT, self.tolerance)
            check_samples(models, [done[t] for t in long], LONG, self.tolerance)
            assert {span.version for sample in first for span in sample.spans} == {3}
            versions = [tuple(s.version for s in done[t].spans) for t in (*short, *long)]
            if not self.can_abort_running:
                assert versions == [(3,)] * 4 + [(4,)] * 4
                return
            if (3, 4) in versions:
                return
        raise AssertionError("no response was under way while the weights changed")
