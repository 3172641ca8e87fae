"""Figures of an evaluation."""

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaopd import evaluation
from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError
from megaopd.losses import Objective, OutputLayer, fused_linear_objectives
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.objectives.terms import make_terms
from megaopd.parts import Parts
from megaopd.report.statistics import (
    by_prompt,
    figure,
    pass_at_k,
    repetition,
    reward_columns,
    wilson,
)
from megaopd.schema import EvalConfig


@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_every_draw(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations(range(n), k))
    hit = sum(any(i < c for i in draw) for draw in draws)
    assert pass_at_k(n, c, k) == pytest.approx(hit / len(draws))


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = [0.9] * 300 + [0.1] * 700
    found = figure(values)
    half = 1.96 * 0.8 * (0.3 * 0.7 / 1000) ** 0.5
    assert (found.value, found.prompts) == (pytest.approx(0.34), 1000)
    assert found.low == pytest.approx(0.34 - half, abs=4e-3)
    assert found.high == pytest.approx(0.34 + half, abs=4e-3)
    assert figure(values) == found, "the resampling is seeded"


@pytest.mark.parametrize(
    ("solved", "count", "low", "high"),
    # scipy.stats.binomtest(solved, count).proportion_ci(method="wilson")
    [
        (0, 128, 0.0, 0.029137),
        (128, 128, 0.970863, 1.0),
        (3, 10, 0.107791, 0.603222),
        (1, 1, 0.206549, 1.0),
    ],
)
def test_zeros_and_ones_have_wilsons_interval(solved, count, low, high):
    assert wilson(solved, count) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
    found = figure([1.0] * solved + [0.0] * (count - solved))
    assert (found.value, found.prompts) == (solved / count, count)
    assert (found.low, found.high) == wilson(solved, count)


def test_repetition_is_of_trigrams():
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2]) == 0.0
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert repetition([7] * 12) == pytest.approx(9 / 10)


def test_by_prompt():
    assert by_prompt([1.0, 0.0, 1.0, 1.0], 2) == [0.5, 1.0]


@pytest.mark.parametrize("values", [{"pass_k": (2,)}, {"pass_k": (0,)}, {"samples": -1}])
def test_what_cannot_be_estimated_is_refused(values):
    with pytest.raises(UserError, match=r"eval\.(pass_k|samples)"):
        EvalConfig(**values)


def test_a_missing_reward_is_a_response_that_solved_nothing():
    assert reward_columns([1.0, 0.5]) == {"accuracy": [1.0, 0.5]}
    assert reward_columns([None, None]) == {}, "no verifier"
    assert reward_columns([1.0, None]) == {"accuracy": [1.0, 0.0], "unscored": [0.0, 1.0]}


class Student:
    """Says what it was asked to measure, in place of measuring."""

    def __init__(self, objective):
        self.objective, self.asked = objective, []

    def score(self, micro_batches, teacher=None, *, reference=None, objective=None):
        asked = objective or self.objective
        self.asked.append(asked)
        return {asked.value_name: 1.0 + asked.is_reverse_kl, "loss": 0.0}


def rig(objective=None, rewards=(), teacher=None, answer="5", **settings):
    """What `evaluate` needs of Parts, where the sampled responses have these rewards, in order."""
    config, left = EvalConfig(**settings), list(rewards)

    def answers(prompts, n=1):
        made = [Sample(prompt, (2, 3), None, "stop", 0) for prompt in prompts for _ in range(n)]
        return [SimpleNamespace(**vars(s) | {"reward": left.pop(0)}) for s in made]

    count = len(left) // (1 + config.samples)
    parts = SimpleNamespace(
        config=SimpleNamespace(eval=config),
        tokenizer=None,
        eos_ids=(0,),
        held_out=[Prompt(f"p{i}", (1,), "", answer, "addition1") for i in range(count)],
        student=Student(objective or ObjectiveConfig()),
        teacher=teacher,
        remote=None,
        reference=None,
        is_main=False,
        skills=SimpleNamespace(fill=list),
        sampler=SimpleNamespace(
            buffer=SimpleNamespace(params=SimpleNamespace(own=dict)),
            generate=lambda prompts, key, n, params: answers(prompts, n),
            take_turn=lambda: None,
        ),
        sync_weights=lambda version: None,
        greedy_answers=lambda prompts, key: answers(prompts),
        verify=list,
        micro_batches=list,
        pi_gap=lambda samples, found: {},
    )
    parts.score_samples = lambda samples: Parts.score_samples(parts, samples)
    return parts


def test_an_evaluation_counts_what_has_no_reward():
    greedy, sampled = [1.0, 1.0, None, None], [1.0, None, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    found = evaluation.evaluate(rig(rewards=greedy + sampled, samples=2, pass_k=(1, 2)))
    assert found["accuracy"].value == found["unscored"].value == 0.5
    assert found["sampled_accuracy"].value == found["pass@1"].value == 0.5
    assert found["pass@2"].value == 0.75 and found["sampled_unscored"].value == 1 / 8
    assert Parts.evaluate(rig(rewards=greedy, samples=0), 0) == {"accuracy": 0.5, "unscored": 0.5}


@pytest.mark.parametrize("answer", ["5", None])
def test_an_evaluation_of_what_has_no_rewards_has_no_accuracy(answer):
    found = evaluation.evaluate(rig(rewards=[None] * 4, answer=answer))
    assert found.keys() == {"response_length", "truncated", "repetition", "kl"}
    assert Parts.evaluate(rig(rewards=[None], samples=0, answer=answer), 0) == {}


def test_prompts_that_cannot_be_scored_are_no_wrong_answers():
    parts = rig(rewards=[1.0, None, 1.0, 0.0, None, None], samples=2, pass_k=(2,))
    parts.held_out[1] = Prompt("open", (1,), "", None, "")
    found = evaluation.evaluate(parts)
    assert found["accuracy"].value == 1.0 and found["accuracy"].prompts == 1
    assert found["sampled_accuracy"].value == 0.5 and found["pass@2"].value == 1.0
    assert not [name for name in found if "unscored" in name]


OTHERS = [
    {"loss": "fkl"}, {"loss": "jsd"}, {"loss": "rkl", "temperature": 2.0}, {"loss": "vopd"},
    {"loss": "sinkd", "temperature": 2.0}, {"loss": "rkl", "support": "student_topk", "k": 4},
    {"loss": "rkl", "target": "tempered", "target_weight": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("values", OTHERS)
def test_the_kl_of_an_evaluation_is_the_reverse_one(values):
    parts = rig(ObjectiveConfig(**values), teacher=object())
    assert parts.score_samples([]) == {"kl": 2.0, "distill": 1.0}
    assert parts.student.objective == ObjectiveConfig(**values), "training goes on with its own"
    assert [o.is_reverse_kl for o in parts.student.asked] == [False, True]


def test_the_reverse_kl_is_measured_once_and_only_with_the_whole_law():
    parts = rig(ObjectiveConfig(stats_k=4, sft_coef=0.1), teacher=object())
    assert parts.score_samples([]) == {"kl": 2.0} and len(parts.student.asked) == 1
    on_servers = rig(ObjectiveConfig(support="teacher_topk", k=4))
    assert on_servers.score_samples([]) == {"distill": 1.0}


def test_the_reverse_kl_is_exact():
    import torch

    torch.manual_seed(0)
    hidden, weight, q_hidden, q_weight = (torch.randn(n, 6) for n in (9, 32, 9, 32))
    (term,) = make_terms(ObjectiveConfig(loss="sinkd", chunk_size=4).reverse_kl).values()
    found = fused_linear_objectives(
        hidden,
        weight,
        OutputLayer(q_hidden, q_weight),
        {"distill": Objective(term.term, torch.full((9,), 1 / 9))},
    )
    log_p, log_q = (hidden @ weight.T).log_softmax(-1), (q_hidden @ q_weight.T).log_softmax(-1)
    want = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(found.loss, want)
