"""Episodes that reach a limit, hang, fail, or are aborted, on the embedded engine."""

import threading
import time
from queue import SimpleQueue
from typing import Any

import pytest

from megaopd.data.tasks.environments import Step
from megaopd.data.types import Prompt
from megaopd.errors import UserError
from megaopd.rollout.agent import AgentEngine
from megaopd.rollout.base import NeedsWeights, Request, SamplingParams
from megaopd.rollout.config import AgentConfig
from megaopd.rollout.episode import episode_metrics
from megaopd.rollout.hf import EmbeddedEngine
from megaopd.rollout.steps import StepPool
from tests.dist.models import VOCAB
from tests.unit.agent_toys import (
    PARAMS,
    POSITIONS,
    TOKENIZER,
    Toy,
    ToyTask,
    agent,
    asked,
    check_record,
    make_engine,
    make_model,
    use_toy,
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyTask:
    return use_toy(monkeypatch)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="module")
def engine(model: Any, tmp_path_factory: pytest.TempPathFactory) -> EmbeddedEngine:
    return make_engine(model, tmp_path_factory.mktemp("agent") / "model")


def test_limit_of_turns(engine, toy):
    toy.at_step = lambda made, turn: Step("no", 0.125 * turn, False)
    for sample in agent(engine, max_turns=3).generate(asked(3), PARAMS):
        check_record(sample)
        assert (sample.meta["end"], sample.finish_reason) == ("turns", "length")
        assert sample.meta["turn_rewards"] == [0.125, 0.25, 0.375] and sample.reward == 0.75
    for sample in agent(engine, max_turns=3, reward="last").generate(asked(3), PARAMS):
        assert sample.reward == 0.375


def test_rewards_are_clipped(engine, toy):
    toy.at_step = lambda made, turn: Step("", 5.0 if made.seed == 100 else -5.0, True)
    assert [s.reward for s in agent(engine).generate(asked(2), PARAMS)] == [1.0, 0.0]


def test_limit_of_tokens(engine, toy):
    """No episode outgrows the limit; what no longer fits is not begun."""
    toy.at_step = lambda made, turn: Step("an observation", 0.0, False)
    made = agent(engine, max_turns=100, max_tokens=80).generate(asked(6), PARAMS)
    for sample in made:
        check_record(sample)
        assert (sample.meta["end"], sample.finish_reason) == ("tokens", "length")
        assert len(sample.tokens) <= 80 and sample.loss_mask[-1] == 1
    assert any(len(s.tokens) > 60 for s in made)
    params = SamplingParams(100)
    whole = agent(engine, max_turns=100).generate(asked(3), params)
    assert all(POSITIONS - 40 < len(s.tokens) <= POSITIONS for s in whole)


def test_an_environment_that_hangs(engine, toy):
    """It costs its episode a time-out, and the others nothing; its turn is kept."""
    release = threading.Event()

    def at_step(made: Toy, turn: int) -> Step:
        if made.seed == 101 and turn == 2:
            release.wait()
        return Step("next", 0.25, turn == 3)

    toy.at_step = at_step
    wrapped = agent(engine, threads=2, step_timeout_s=0.5)
    begun = time.monotonic()
    samples = wrapped.generate(asked(6), PARAMS)
    assert time.monotonic() - begun < 20
    assert [s.meta["end"] for s in samples] == ["done", "step_time", *["done"] * 4]
    late = samples[1]
    check_record(late)
    assert late.finish_reason == "abort" and len(late.meta["turns"]) == 2
    assert late.meta["turn_rewards"] == [0.25, 0.0] and late.reward == 0.25
    assert wrapped.ends == {"done": 5, "step_time": 1}
    release.set()


def test_every_environment_hangs_at_reset(engine, toy):
    release = threading.Event()
    toy.at_reset = lambda seed: release.wait() and None
    samples = agent(engine, threads=2, step_timeout_s=0.2).generate(asked(5), PARAMS)
    assert all(s.meta["end"] == "step_time" and s.response_ids == () for s in samples)
    assert all(s.weight_version == 3 and s.reward == 0.0 for s in samples)
    release.set()


def test_an_environment_that_raises(engine, toy):
    def at_step(made: Toy, turn: int) -> Any:
        if made.seed == 100 and turn == 2:
            raise RuntimeError("the level is broken")
        if made.seed == 101:
            return "no step"
        return Step("go on", float("nan") if made.seed == 102 else 0.5, turn == 2)

    toy.at_step = at_step
    toy.at_reset = lambda seed: 1 // (103 - seed) and None
    wrapped = agent(engine)
    samples = wrapped.generate(asked(5), PARAMS)
    assert [s.meta["end"] for s in samples] == ["error"] * 4 + ["done"]
    assert all(s.finish_reason == "abort" and s.reward is None for s in samples[:4])
    assert samples[0].meta["error"] == "RuntimeError: the level is broken"
    assert samples[0].meta["turn_rewards"] == [0.5, 0.0]
    assert "no step" in samples[1].meta["error"] and "nan" in samples[2].meta["error"]
    assert samples[3].meta["error"].startswith("ZeroDivisionError") and not samples[3].spans
    assert wrapped.ends == {"error": 4, "done": 1}
    metrics = episode_metrics([*samples, *engine.generate(asked(2, task=""), PARAMS)])
    assert metrics["agent/end_error"] == 0.8 and metrics["agent/end_done"] == 0.2
    assert metrics["agent/turns"] == (2 + 1 + 1 + 0 + 2) / 5
    assert episode_metrics([]) == {}


def test_limit_of_an_episodes_time(engine, toy):
    """Time outside `wait` does not count; what is there when the time is over is kept."""
    toy.at_step = lambda made, turn: time.sleep(0.1) or Step("", 0.01, False)
    session = agent(engine, max_turns=10_000, episode_timeout_s=1.0, reward="last").session()
    for request in asked(3):
        session.submit(request, SamplingParams(2))
    time.sleep(1.5)
    samples = []
    while session.pending:
        samples += [sample for _, sample in session.wait()]
    for sample in samples:
        check_record(sample)
        assert (sample.meta["end"], sample.finish_reason) == ("episode_time", "abort")
        assert len(sample.meta["turns"]) >= 3


def test_abort(engine, toy):
    """What waits for the engine and what waits for its environment; turns so far are kept."""
    release = threading.Event()

    def at_step(made: Toy, turn: int) -> Step:
        if made.seed == 101:
            release.wait()
        return Step("on", 0.5, turn == 2)

    toy.at_step = at_step
    session = agent(engine).session()
    requests = [*asked(3), *asked(1, task="")]
    tickets = [session.submit(request, PARAMS) for request in requests]
    session._take_steps()
    for ticket, sample in session._inner.wait():
        session._take_turn(ticket, sample)
    session._take_steps()  # 0 and 2 wait for their second turn, 1 hangs, 3 is finished
    session.abort([tickets[0], tickets[1], tickets[3], 99])
    done = {}
    while session.pending:
        done |= dict(session.wait())
    ends = [done[t].meta.get("end") for t in tickets]
    assert ends == ["abort", "abort", "done", None]
    for ticket in tickets[:2]:
        check_record(done[ticket])
        assert done[ticket].reward is None and len(done[ticket].meta["turns"]) == 1
    release.set()
    again = agent(engine).session()
    for request in requests:
        again.submit(request, PARAMS)
    again.abort()
    while again.pending:
        assert all(s.finish_reason == "abort" for _, s in again.wait())
    again.submit(requests[0], PARAMS)
    again.close()
    assert again.pending == 0 and again.wait() == []


def test_bad_requests_are_refused_at_once(engine, toy):
    session = agent(engine).session()
    long = Prompt("long", (1,) * POSITIONS, "", "", "toy")
    for prompt, said in (
        (Prompt("bad", (VOCAB,), "", "", "toy"), f"token id {VOCAB}"),
        (long, f"at most {POSITIONS} positions"),
        (Prompt("seed", (1,), "", "", "toy", {"seed": "x"}), "seed = 'x'"),
    ):
        with pytest.raises(UserError, match=said):
            session.submit(Request(prompt, 0), PARAMS)
        assert session.pending == 0
    toy.at_step = lambda made, turn: Step("\u20ac", 0.0, False)
    with pytest.raises(UserError, match="an observation has no tokens"):
        agent(engine).generate(asked(1), PARAMS)


def test_a_chat_template_is_wanted_by_episodes_alone(engine, toy):
    chat = AgentEngine(
        engine, TOKENIZER, AgentConfig(), template="chat", vocab=VOCAB, max_positions=POSITIONS
    )
    assert len(chat.generate(asked(2, task=""), PARAMS)) == 2
    with pytest.raises(UserError, match="no chat template"):
        chat.generate(asked(2), PARAMS)


@pytest.mark.parametrize(
    "change",
    [{"max_turns": 0}, {"step_timeout_s": 0.0}, {"threads": 0}, {"max_tokens": -1}],
)
def test_settings(change):
    with pytest.raises(UserError, match=next(iter(change))):
        AgentConfig(**change)


def test_no_weights_yet(engine, model, toy):
    """wait may be left with NeedsWeights, and taken up again."""
    version, engine.weight_version = engine.weight_version, -1
    try:
        session = agent(engine).session()
        for request in asked(3):
            session.submit(request, PARAMS)
        with pytest.raises(NeedsWeights):
            session.wait()
    finally:
        engine.weight_version = version
    assert session.pending == 3
    done = session.wait()
    assert sorted(t for t, _ in done) == [0, 1, 2]


def test_a_pool_replaces_the_threads_that_hang():
    pool, done, release = StepPool(2), SimpleQueue(), threading.Event()
    stuck = [pool.submit(release.wait, done) for _ in range(2)]
    queued = pool.submit(lambda: "never", done)
    last = pool.submit(lambda: "ran", done)
    while not all(call.began for call in stuck):
        time.sleep(0.01)
    pool.give_up(queued)
    for call in stuck:
        pool.give_up(call)
    assert done.get(timeout=5) is last and last.result == "ran"
    release.set()
    quick = [pool.submit(lambda: 1, done) for _ in range(200)]
    assert {done.get(timeout=5) for _ in quick} == set(quick)
    assert done.empty() and pool._threads <= 2
    pool.close()
