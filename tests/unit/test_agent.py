"""Episodes on the embedded engine with a tiny model: their records, order and batches."""

from collections import Counter
from typing import Any

import pytest

from megaopd.data import tasks
from megaopd.data.tasks.environments import Step
from megaopd.data.types import Prompt
from megaopd.rollout.base import Request, SamplingParams
from megaopd.rollout.episode import turn_seed
from megaopd.rollout.hf import EmbeddedEngine
from tests.dist.models import tiny
from tests.serving.reference import check_samples
from tests.unit.agent_toys import (
    EOS,
    PARAMS,
    POSITIONS,
    TOKENIZER,
    ToyTask,
    agent,
    asked,
    check_record,
    encode,
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


def test_the_record_of_an_episode(engine, model, toy):
    """Three turns and what stood between them, with the log-probs of the whole context."""
    samples = agent(engine).generate(asked(6), PARAMS)
    assert [s.prompt for s in samples] == [r.prompt for r in asked(6)]
    assert [s.index for s in samples] == [0, 1, 2, 0, 1, 2]
    for i, sample in enumerate(samples):
        check_record(sample)
        assert (sample.meta["end"], sample.finish_reason) == ("done", "stop")
        assert sample.meta["turn_rewards"] == [0.25] * 3 and sample.reward == 0.75
        (a, b), (c, d), (e, f) = sample.meta["turns"]
        assert (a, f) == (0, len(sample.response_ids))
        assert sample.response_ids[b:c] == encode(f"\n[{100 + i}: turn 1]\n")
        assert sample.response_ids[d:e] == encode(f"\n[{100 + i}: turn 2]\n")
        assert {s.version for s in sample.spans} == {3} and sample.weight_version == 3
        heard = [text for name, text in toy.heard if name == f"p{i}"]
        said = [sample.response_ids[start:end] for start, end in sample.meta["turns"]]
        assert heard == [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in said]
    check_samples({3: model}, samples, PARAMS, 1e-4)


def test_turns_end_at_the_end_token_or_at_their_limit(engine, toy):
    samples = agent(engine).generate(asked(30), SamplingParams(12, temperature=2.0))
    last = Counter()
    for sample in samples:
        for start, end in sample.meta["turns"]:
            ids = sample.response_ids[start:end]
            assert EOS not in ids[:-1] and 1 <= len(ids) <= 12
            last[ids[-1] == EOS, len(ids) == 12] += 1
    assert last[True, False] and last[False, True]


def test_an_episode_is_a_function_of_its_seed(engine, toy):
    """Alone or among others, the same tokens; the first turn as a plain request samples it."""
    together = agent(engine).generate(asked(8), PARAMS)
    again = agent(engine).generate(asked(8), PARAMS)
    assert together == again
    alone = agent(engine, threads=1).generate(asked(8)[5:6], PARAMS)[0]
    assert alone.response_ids == together[5].response_ids
    plain = engine.generate(asked(8), PARAMS)
    for sample, first in zip(together, plain, strict=True):
        assert sample.response_ids[: len(first.response_ids)] == first.response_ids
    assert len({turn_seed(7, turn) for turn in range(50)} | {turn_seed(8, 1)}) == 51


def test_top_ids_of_the_students_tokens(engine, toy):
    params = SamplingParams(6, top_ids=3)
    for sample in agent(engine).generate(asked(3), params):
        widths = [len(ids) for ids in sample.top_ids]
        assert widths == [3 * sampled for sampled in sample.loss_mask]


def test_episodes_and_plain_requests_share_a_session(engine, toy):
    """All at once, some as others run; every ticket comes out once."""
    session = agent(engine).session()
    mixed = [*asked(20), *asked(10, task=""), *asked(5, task="addition2")]
    tickets = {session.submit(request, PARAMS): request for request in mixed[:25]}
    done = session.wait()
    tickets |= {session.submit(request, PARAMS): request for request in mixed[25:]}
    while session.pending:
        done += session.wait()
    assert sorted(t for t, _ in done) == sorted(tickets) and len(tickets) == 35
    for ticket, sample in done:
        request = tickets[ticket]
        assert (sample.prompt, sample.index) == (request.prompt, request.index)
        assert ("turn_rewards" in sample.meta) == (request.prompt.task == "toy")
    assert session.wait() == []


def test_the_turns_of_many_episodes_share_batches(engine, toy, monkeypatch):
    sizes = []
    batch = EmbeddedEngine.generate_batch

    def counted(self, requests, params):
        sizes.append(len(requests))
        return batch(self, requests, params)

    monkeypatch.setattr(EmbeddedEngine, "generate_batch", counted)
    agent(engine).generate(asked(40), PARAMS)
    assert sizes == [40, 40, 40]


def test_without_environments_nothing_changes(engine):
    plain = asked(5, task="")
    assert agent(engine).generate(plain, PARAMS) == engine.generate(plain, PARAMS)
    assert agent(engine).generate([], PARAMS) == []


def test_spans_follow_the_weights_across_turns(engine, model, toy):
    """An update between two turns: each turn right by the weights that sampled it."""
    other = tiny("qwen3", tied=False, seed=99, max_position_embeddings=POSITIONS)
    toy.at_step = lambda made, turn: Step("", 0.0, turn == 2)
    session = agent(engine).session()
    for request in asked(4):
        session.submit(request, PARAMS)
    session._take_steps()
    for ticket, sample in session._inner.wait():
        session._take_turn(ticket, sample)
    engine.update_weights(other.state_dict().items(), 4)
    samples = [sample for _, sample in session.wait()]
    engine.update_weights(model.state_dict().items(), 3)
    assert len(samples) == 4
    for sample in samples:
        check_record(sample)
        assert [s.version for s in sample.spans] == [3, 4]
        assert (sample.weight_version, sample.newest_version) == (3, 4)
    check_samples({3: model, 4: other}, samples, PARAMS, 1e-4)


@pytest.mark.parametrize("task", ["sokoban5", "calculator2"])
def test_the_environments_that_come_along(engine, model, task):
    """A model that writes noise plays them to a limit; plain prompts of the data pipeline."""
    example = tasks.get_task(task).example(0, 0, "train")
    ids = encode(example.prompt[-100:])
    prompt = Prompt("p", ids, example.prompt, example.answer, task, example.meta)
    requests = [Request(prompt, seed) for seed in range(4)]
    samples = agent(engine, max_turns=2).generate(requests, SamplingParams(8))
    for sample in samples:
        check_record(sample)
        assert sample.reward == 0.0 and sample.meta["end"] in ("turns", "tokens", "done")
    assert len({s.response_ids for s in samples}) == 4
    check_samples({3: model}, samples, PARAMS, 1e-4)
