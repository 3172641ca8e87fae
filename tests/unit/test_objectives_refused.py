"""Objectives that are refused or warned of, and why."""

import pytest

from megaopd.errors import UserError
from megaopd.objectives import names
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.objectives.validate import PAYLOADS, check_run
from megaopd.schema import load_config
from tests.unit.test_objectives import FULL, GOOD


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        # METHODS 20: 2, 4, 8, 9, 15
        (["loss=k1"], "expected gradient 0"),
        (["loss=k3_reward"], "neither KL"),
        (["loss=rkl", "support=student_topk", "k=20", "variant=unnorm"], "out of the support"),
        (["loss=sft", "tis=token"], "without rollout log-probs"),
        (["loss=k2", "temperature=2.0"], "law that sampled them"),
        (
            ["support=student_topk", "k=4", "variant=sampled_tail", "temperature=2.0"],
            "law that sampled them",
        ),
        (["loss=trrd"], "objective.rl=trrd"),
        (["loss=rlad"], "objective.rl=trrd"),
        (["loss=grpo"], "objective.rl=ppo"),
        (["rl=ppo"], "samples_per_prompt = 1"),
        (["loss=none"], "something to minimise"),
        (["loss=sft", "rl=ppo"], "which nobody samples"),
        (["weigh=pass_rate"], "samples_per_prompt = 1"),
        (["coef_end=0.5"], "objective.coef_steps"),
        (["second_loss=k9", "second_from=5"], "one of"),
        (["mix=0.2"], "objective.rl = trrd"),
        (["replay=dph_js"], "mix.source"),
        (["loss=fkl", "returns=sum"], "reverse KL"),
        (["second_loss=fkl", "second_from=3", "returns=sum"], "objective.loss = fkl"),
        (["returns=sum", "temperature=2.0"], "temperature=1.0"),
        (["target=tempered", "target_weight=0.5", "returns=sum"], "target=teacher"),
        (["target_steps=5"], "a target other than"),
        (["loss=none", "rl=dpg"], "samples_per_prompt = 1"),
        (["rl=dpg"], "the teacher is the initial policy"),
        (["loss=none", "rl=dpg", "reward_scale=0"], "above 0"),
        (["loss=none", "rl=dpg", "advantage=reward"], "ppo and trrd"),
        (["loss=none", "rl=ppo", "reward_scale=1"], "objective.rl = dpg"),
        # what cannot be configured
        (["loss=sinkhorn"], "objective.loss=sinkd"),
        (["loss=sinkd", "support=student_topk", "k=9"], "belongs to a divergence"),
        (["loss=sinkd", "alpha=0.5"], "skew_fkl"),
        (["loss=sinkd", "sinkd_coef=0.5"], "other than sinkd"),
        (["loss=rapo_paper"], "not the gradient"),
        (["loss=dph_js"], "initial policy"),
        (["target=geometric", "target_weight=1.25"], "base model"),
        (["target=linear", "target_weight=0.5"], "base model"),
        (["target=linear"], "0 < target_weight < 1"),
        (["preset=gopd"], "base model"),
        (["preset=many_face"], "'many_faces'"),
        # what does not go together
        (["loss=rklx"], "did you mean 'rkl'?"),
        (["k=20"], "objective.support=student_topk"),
        (["support=student_topk"], "objective.k=20"),
        (["loss=fkl", "support=student_topk", "k=9", "variant=sg"], "defined for rkl"),
        (["variant=tail"], "set objective.support"),
        (["support=teacher_topk", "k=9", "variant=intersect"], "support=intersection"),
        (["loss=pld", "support=student_topk", "k=9"], "'teacher_topk'"),
        (["loss=bdkd", "support=student_topk", "k=9"], "'full'"),
        (["loss=k2", "support=student_topk", "k=9"], "belongs to a divergence"),
        (["alpha=0.5"], "skew_fkl"),
        (["loss=jsd", "beta=1.0"], "rkl"),
        (["loss=skew_rkl", "alpha=1.5"], "0 < alpha < 1"),
        (["loss=bdkd", "variant=hard", "beta=1.0"], "bdkd soft"),
        (["target_weight=0.5"], "a target other than"),
        (["target=one_hot"], "0 < target_weight < 1"),
        (["loss=pld", "target=one_hot", "target_weight=0.5"], "sampled tokens"),
        (["loss=pld", "sft_coef=0.5"], "no labels"),
        (["loss=f_pg"], "objective.f_kind=js"),
        (["loss=pg", "baseline=value"], "vopd"),
        (["loss=vopd", "baseline=value", "baseline_k=5"], "topk and unnorm"),
        (["loss=k2", "clip_low=0.2"], "pg and vopd"),
        (["cap=3.0"], "k2"),
        (["support=student_topk", "k=9", "stats_k=9"], "own list"),
        (["entropy_coef=-1.0"], "0 or more"),
        (["chunk_size=-1"], "0 or more"),
        (["tis=always"], "objective.tis"),
    ],
)
def test_what_is_refused_says_why(overrides, said):
    teacher = ["teacher.path="] if overrides[0] == "loss=sft" else []
    with pytest.raises(UserError) as caught:
        load_config(None, [*GOOD, *teacher, *(f"objective.{o}" for o in overrides)])
    assert said in str(caught.value), str(caught.value)
    assert caught.value.expected


def test_losses_that_are_refused_are_not_offered():
    assert not set(names.REFUSED) & set(names.LOSSES)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.loss=k3"], "gradient of forward KL"),
        (["objective.loss=sinkd"], "which token of a chunk"),
        (
            [
                "objective.support=student_topk",
                "objective.k=9",
                "objective.variant=unnorm",
                "objective.i_know_biased=true",
            ],
            "biased",
        ),
        (["objective.loss=pg", "rollout.top_p=0.9"], "top_p = 0.9"),
        (["objective.loss=k2", "rollout.top_k=50"], "top_k = 50"),
        (["objective.loss=vopd", "rollout.temperature=0.6"], "another law"),
        (["objective.loss=pg", "rollout.temperature=0"], "samples nothing"),
        (
            [
                "objective.support=student_topk",
                "objective.k=9",
                "objective.variant=sampled_tail",
                "rollout.top_p=0.9",
            ],
            "sampled_tail",
        ),
        (["objective.loss=pg", "objective.clip_low=0.2"], "do nothing"),
        (["objective.loss=f_pg", "objective.f_kind=chi2", "objective.cap=10"], "biased"),
        (["objective.sft_coef=0.1"], "expected gradient 0"),
        (["objective.target=one_hot", "objective.target_weight=0.8"], "expected gradient 0"),
    ],
)
def test_what_is_warned_of(overrides, said):
    found = load_config(None, [*GOOD, *overrides]).warnings
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize(
    ("values", "enough"),
    [
        *(({"loss": kind}, ("hidden",)) for kind in (*FULL, "sinkd")),
        ({"support": "student_topk", "k": 20}, ("hidden", "topk")),
        ({"loss": "pld"}, ("hidden", "topk")),
        ({"loss": "k2"}, ("hidden", "sampled")),
        ({"loss": "k2", "stats_k": 5}, ("hidden",)),
        ({"loss": "k2", "sinkd_coef": 0.1}, ("hidden",)),
        ({"loss": "vopd"}, ("hidden", "topk")),
        ({"loss": "vopd", "baseline": "value"}, ("hidden",)),
    ],
    ids=str,
)
def test_a_payload_that_holds_too_little_is_refused(values, enough):
    objective = ObjectiveConfig(**values)
    for payload in PAYLOADS:
        if payload in enough:
            check_run(objective, log_probs=True, payload=payload)
        else:
            with pytest.raises(UserError, match=f"{payload}' payload"):
                check_run(objective, log_probs=True, payload=payload)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.only=wrong"], "rewards"),
        (["objective.sft_coef=1", "mix.source=answers"], "mix.source = answers"),
        (["objective.loss=k2"], "the student's own samples"),
        (["objective.returns=sum"], "returns are those of its own law"),
        (["objective.tis=token"], "tis = off"),
    ],
)
def test_what_answers_alone_cannot_serve(overrides, said):
    with pytest.raises(UserError) as caught:
        load_config(None, [*GOOD, "mix.student_share=0", *overrides])
    assert said in str(caught.value), str(caught.value)


def test_labels_that_are_no_noise_are_not_warned_of():
    """The data's answers, and samples that a verifier has accepted."""
    right = ["objective.only=right", "rollout.samples_per_prompt=4"]
    for overrides in (["mix.student_share=0"], right):
        config = load_config(None, [*GOOD, "objective.preset=pskd", *overrides])
        assert config.warnings == []
    assert not load_config(None, [*GOOD, "mix.student_share=0"]).on_policy
