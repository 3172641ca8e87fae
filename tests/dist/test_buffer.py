"""Batches under way: order, staleness, the cursor of a resumed run, dynamic sampling, lost weights.

The embedded engine stands in for servers: with `shared` set, rank 0 speaks for both ranks.
"""

import pytest
import torch

STEPS, PROMPTS, EACH = 6, 4, 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from megaopd.quickstart import make_checkpoint

    where = tmp_path_factory.mktemp("buffer") / "student"
    make_checkpoint("student", where, seed=3)
    return str(where)


def make(
    model_dir, *, resyncs=None, forgetful=0, reward=lambda sample: None, steps=STEPS, **rollout
):
    """A buffer over an engine that rank 0 speaks to, its prompt stream and its engine."""
    from transformers import AutoModelForCausalLM

    from megaopd.data.config import DataConfig
    from megaopd.data.prompts import PromptStream
    from megaopd.data.tokenizer import load_tokenizer
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.rollout.base import NeedsWeights
    from megaopd.rollout.buffer import RolloutBuffer
    from megaopd.rollout.config import RolloutConfig
    from megaopd.rollout.hf import EmbeddedEngine, EmbeddedSession

    class Forgetful(EmbeddedSession):
        left = forgetful

        def wait(self, timeout=None):
            if self.left:
                self.left -= 1
                raise NeedsWeights
            return super().wait(timeout)

    class Engine(EmbeddedEngine):
        shared = True

        def session(self):
            return Forgetful(self)

    tokenizer = load_tokenizer(model_dir)
    engine = Engine(
        model_dir,
        eos_ids=[tokenizer.eos_token_id],
        pad_id=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        batch_size=5,
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    weights = [(n, p) for n, p in model.state_dict().items() if n != "lm_head.weight"]
    engine.update_weights(weights, 0)
    stream = PromptStream(DataConfig(source="task:addition3"), tokenizer)
    buffer = RolloutBuffer(
        engine,
        stream,
        # The engine is none of RolloutConfig's: what it refuses for the embedded one works here.
        RolloutConfig(
            engine="sglang",
            prompts_per_step=PROMPTS,
            samples_per_prompt=EACH,
            max_new_tokens=4,
            **rollout,
        ),
        make_grid(ParallelConfig()),
        run_seed=1,
        total_steps=steps,
        reward=reward,
        resync=lambda: resyncs.append(engine.weight_version),
    )
    return buffer, stream, engine, weights


def names(samples):
    return [(s.prompt.id, s.index) for s in samples]


def run_steps(model_dir, staleness):
    """Per step: names, versions; and whether a buffer at each cursor draws the same prompts."""
    buffer, _, engine, weights = make(model_dir, staleness=staleness)
    made, resumed = [], []
    for step in range(STEPS):
        engine.update_weights(weights, step)
        cursor = buffer.cursor
        samples = buffer.sample(step)
        made.append((names(samples), [s.weight_version for s in samples], buffer.metrics()))
        other, stream, again, _ = make(model_dir, staleness=staleness)
        stream.load_state_dict(cursor)
        again.update_weights(weights, step)
        resumed.append(names(other.sample(step)) == names(samples))
    pending = buffer._session.pending if buffer._session else 0
    return made, resumed, pending


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_batches_come_whole_and_in_order(ranks, model_dir, staleness):
    results = ranks.run(run_steps, 2, model_dir, staleness)
    (made, resumed, pending), (other, _, _) = results
    assert [n for n, _, _ in made] == [n for n, _, _ in other]  # the same on every rank
    flat = [name for found, _, _ in made for name in found]
    wanted = [(f"addition3/train/0/{p}", i) for p in range(STEPS * PROMPTS) for i in range(EACH)]
    assert flat == wanted and all(resumed)
    for step, (_, versions, metrics) in enumerate(made):
        assert all(max(step - staleness, 0) <= v <= step for v in versions)
        mean = sum(versions) / len(versions)
        assert metrics["rollout/staleness"] == pytest.approx(step - mean)
    assert pending == 0  # nothing was drawn that no step trains on


def lose_weights(model_dir):
    resyncs = []
    buffer, *_ = make(model_dir, resyncs=resyncs, forgetful=2)
    return names(buffer.sample(0)), resyncs


def test_weights_that_are_lost_are_pushed_again(ranks, model_dir):
    (first, resyncs), (second, others) = ranks.run(lose_weights, 2, model_dir)
    assert resyncs == others == [0, 0]  # a collective: every rank joins
    assert first == second and len(first) == PROMPTS * EACH


def by_prompt(sample):
    """Rewards differ within a group for every other prompt."""
    number = int(sample.prompt.id.rsplit("/", 1)[1])
    return float(sample.index == 0) if number % 2 else 1.0


def informative(model_dir, oversample):
    options = {"oversample": oversample, "reward": by_prompt, "steps": 2}
    buffer, stream, engine, weights = make(model_dir, **options)
    first = buffer.sample(0)
    metrics = buffer.metrics()
    engine.update_weights(weights, 1)
    return names(first), names(buffer.sample(1)), metrics, stream.state_dict()["index"]


@pytest.mark.parametrize("oversample", [2.0, 1.5])
def test_groups_whose_rewards_are_equal_are_left_out(ranks, model_dir, oversample):
    (first, second, metrics, drawn), (other, *_) = ranks.run(informative, 2, model_dir, oversample)
    assert first == other and len(first) == len(second) == PROMPTS * EACH
    assert drawn == 2 * round(PROMPTS * oversample)
    numbers = [int(name.rsplit("/", 1)[1]) for name, _ in first[::EACH]]
    count = round(PROMPTS * oversample)
    odd = [n for n in range(count) if n % 2]
    assert set(odd[:PROMPTS]) <= set(numbers)  # and others only where there are too few
    assert numbers == sorted(numbers) and len(set(numbers)) == PROMPTS
    assert 0 < metrics["rollout/informative_groups"] <= 1


def test_dynamic_sampling_needs_groups():
    from megaopd.errors import UserError
    from megaopd.rollout.config import RolloutConfig

    with pytest.raises(UserError, match="oversample"):
        RolloutConfig(oversample=1.5)
    with pytest.raises(UserError, match="staleness"):
        RolloutConfig(staleness=1)
