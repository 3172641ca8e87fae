"""Episodes on a real SGLang server: interleaved, across a sync, aborted."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from megaopd.data.tasks import get_task
from megaopd.data.tokenizer import char_tokenizer
from megaopd.data.types import Prompt
from megaopd.rollout.agent import AgentConfig, AgentEngine
from megaopd.rollout.base import Request, SamplingParams
from tests.dist.models import VOCAB
from tests.serving.reference import POSITIONS, check_samples, model, weights_of
from tests.serving.sessions import collect

pytest.importorskip("sglang", reason="SGLang is not installed")

from megaopd.rollout.sglang import SGLangEngine
from tests.serving.test_sglang import start

# 100 symbols and the padding: one for each id of the model, whose end token is the padding here.
SYMBOLS = "".join(map(chr, range(32, 127))) + "\n" + "\u00e4\u00f6\u00fc\u00df"
TOKENIZER = char_tokenizer(SYMBOLS, eos="\u00df")
PARAMS = SamplingParams(16, temperature=0.8)


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    return {3: model(), 4: model(seed=99)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, models: Any) -> Iterator[SGLangEngine]:
    where = tmp_path_factory.mktemp("engine")
    models[3].save_pretrained(where / "model")
    with start(where / "model", where / "run", sync="tensor") as engine:
        engine.update_weights(weights_of(models[3]), 3)
        yield engine


def agent(engine: SGLangEngine, **config: Any) -> AgentEngine:
    return AgentEngine(
        engine,
        TOKENIZER,
        AgentConfig(**config),
        template="raw",
        vocab=VOCAB,
        max_positions=POSITIONS,
    )


def levels(count: int) -> list[Request]:
    """Sokoban, by the board alone: what stands before it is too long for a tiny model."""
    made = []
    for index in range(count):
        example = get_task("sokoban5").example(index, 0, "train")
        text = example.prompt[-60:]
        ids = tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])
        prompt = Prompt(f"level {index}", ids, text, example.answer, "sokoban5", example.meta)
        made.append(Request(prompt, index, index=index))
    return made


def check(samples: list[Any], models: Any) -> None:
    """Turns, masks and spans agree; log-probs are right by the weights of each span."""
    for sample in samples:
        sampled = {t for start, end in sample.meta["turns"] for t in range(start, end)}
        assert sample.loss_mask == tuple(int(t in sampled) for t in range(len(sample.response_ids)))
        assert len(sample.tokens) <= POSITIONS
    check_samples(models, samples, PARAMS, 1e-4)


def test_many_episodes_at_once(engine, models):
    """Each of four turns, with the board between them, in the order of their requests."""
    wrapped = agent(engine, max_turns=4)
    samples = wrapped.generate(levels(48), PARAMS)
    assert [s.index for s in samples] == list(range(48))
    assert all(len(s.meta["turns"]) == 4 or s.meta["end"] == "done" for s in samples)
    assert sum(wrapped.ends.values()) == 48
    check(samples, models)
    boards = TOKENIZER.decode(list(samples[0].response_ids)).count("+ + + + +")
    assert boards >= 6  # top and bottom of the three boards that it was shown


def test_across_a_sync(engine, models):
    """Episodes begun under the old weights end under the new ones, and their spans say so."""
    for delay in (0.3, 1.0, 3.0):
        session = agent(engine, max_turns=12).session()
        tickets = [session.submit(request, PARAMS) for request in levels(16)]
        done, until = [], time.monotonic() + delay
        while time.monotonic() < until:
            done += session.wait(0.1)
        engine.update_weights(weights_of(models[4]), 4)
        done += collect(session)
        engine.update_weights(weights_of(models[3]), 3)
        assert sorted(t for t, _ in done) == sorted(tickets)
        samples = [sample for _, sample in done]
        check(samples, models)
        if any({span.version for span in s.spans} == {3, 4} for s in samples):
            return
    raise AssertionError("no episode was under way while the weights changed")


def test_abort(engine, models):
    """Half of them, while all are under way: what they have comes out, the others go on."""
    session = agent(engine, max_turns=1000).session()
    tickets = [session.submit(request, PARAMS) for request in levels(12)]
    done = dict(session.wait(0.4))
    session.abort(tickets[:6])
    while not done.keys() >= {*tickets[:6]}:
        done |= dict(session.wait())
    ends = [done[t].meta["end"] for t in tickets[:6]]
    assert set(ends) <= {"abort", "tokens", "done"} and "abort" in ends
    assert session.pending == len(tickets) - len(done)
    check(list(done.values()), models)
    session.close()
    assert session.pending == 0


def test_limit_of_time(engine, models):
    """An episode of 60 turns does not end in a fraction of a second; what it has is kept."""
    wrapped = agent(engine, max_turns=60, episode_timeout_s=0.3)
    params = SamplingParams(1)
    samples = wrapped.generate(levels(4), params)
    assert {s.meta["end"] for s in samples} <= {"episode_time", "tokens"}
    assert wrapped.ends["episode_time"]
    check_samples(models, samples, params, 1e-4)
