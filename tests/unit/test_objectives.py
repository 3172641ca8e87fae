"""Objectives as configuration: what is built, needed, and logged."""

import math
import typing
from pathlib import Path

import pytest
import torch

from megaopd.losses import Objective, OutputLayer, fused_linear_objectives, terms
from megaopd.losses.divergences import KINDS
from megaopd.losses.engine import LIST_STATS
from megaopd.losses.importance import BASELINES, TIS_MODES
from megaopd.losses.sampled import ESTIMATORS, F_KINDS
from megaopd.objectives import names
from megaopd.objectives.presets import PRESETS
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.objectives.surprises import warnings
from megaopd.objectives.terms import make_terms
from megaopd.objectives.validate import PAYLOADS, needs
from megaopd.schema import load_config

GOOD = ["student.path=s", "teacher.path=t", "data.source=task:addition3"]
FULL = [k for k in names.DIVERGENCES if k not in names.DEFAULT_K]


def load(*overrides, path=None):
    return load_config(path, [*GOOD, *(f"objective.{o}" for o in overrides)])


def every_objective():
    """One objective for every loss, support, variant, baseline and extra term."""
    for kind in names.DIVERGENCES:
        for support in names.SUPPORTS:
            for variant in names.variants(kind, support):
                yield {
                    "loss": kind,
                    "support": support,
                    "k": 0 if support == "full" else 7,  # of 11: both lists share 3 at least
                    "variant": "" if variant == "none" else variant,
                    "i_know_biased": True,
                }
    for estimator in names.ESTIMATORS:
        yield {"loss": estimator, **({"f_kind": "js"} if estimator == "f_pg" else {})}
    for baseline in names.BASELINES:
        yield {"loss": "vopd", "baseline": baseline}
    for loss in ("rkl", "jsd", "k2", "pg"):
        yield {"loss": loss, "stats_k": 4, "entropy_coef": 0.1, "sft_coef": 0.2}
    yield {"loss": "fkl", "temperature": 2.0, "entropy_coef": 0.1, "sft_coef": 0.2}
    yield {"loss": "fkl", "target": "tempered", "target_weight": 0.5}
    yield {"loss": "rkl", "target": "one_hot", "target_weight": 0.8}
    yield {"loss": "pld", "temperature": 2.0, "entropy_coef": 0.1}
    yield {"loss": "sinkd", "temperature": 2.0}
    yield {"loss": "fkl", "temperature": 2.0, "sinkd_coef": 0.1}
    yield {"loss": "sinkd", "beta": 0.5, "chunk_size": 3, "stats_k": 4, "sft_coef": 0.2}
    yield {"loss": "sinkd", "target": "tempered", "target_weight": 0.5}
    yield {"loss": "sft"}
    yield {"loss": "sft", "entropy_coef": 0.1}
    yield {"loss": "pg", "clip_low": 0.2, "clip_high": 0.28}
    yield {"loss": "k2", "cap": 5.0}


def test_names_are_those_of_the_losses():
    assert names.DIVERGENCES == terms.DIVERGENCES
    assert names.SUPPORTS == terms.SUPPORTS
    assert set(names.VARIANTS) == set(terms.VARIANTS)
    assert names.TARGETS == terms.TARGETS
    assert names.DEFAULT_K == terms.DEFAULT_K
    assert set(names.TIS_MODES) == set(TIS_MODES)
    assert set(names.BASELINES) == set(BASELINES) - {"none"}
    assert set(names.F_KINDS) == set(F_KINDS)
    assert names.LIST_STATS == LIST_STATS
    assert {k: v.parameter for k, v in KINDS.items() if v.parameter} == names.PARAMETER
    without_rewards = {n for n, e in ESTIMATORS.items() if "advantage" not in e.needs}
    refused = {n for n in without_rewards if n in names.REFUSED}
    # rapo is a loss of its own, with the exact gradient in place of the estimator's.
    assert set(names.ESTIMATORS) == without_rewards - refused - {"rapo"}
    assert set(ESTIMATORS) <= set(names.LOSSES) | set(names.REFUSED)
    assert set(names.CLIPPED) == {n for n in names.ESTIMATORS if "clip_low" in ESTIMATORS[n].inputs}
    assert set(names.CAPPED) == {n for n in names.ESTIMATORS if "cap" in ESTIMATORS[n].inputs}
    pairs = [(k, s) for k in names.DIVERGENCES for s in names.SUPPORTS]
    mine = {(k, s): names.variants(k, s) for k, s in pairs if names.variants(k, s)}
    assert mine == terms.VALID


def test_the_fields_offer_those_names():
    hints = typing.get_type_hints(ObjectiveConfig)
    offered = {name: set(typing.get_args(hint)) - {""} for name, hint in hints.items()}
    assert offered["support"] == set(names.SUPPORTS)
    assert offered["variant"] == {*names.VARIANTS, "soft", "hard"}
    assert offered["target"] == set(names.TARGETS)
    assert offered["f_kind"] == set(names.F_KINDS)
    assert offered["baseline"] == set(names.BASELINES)
    assert offered["tis"] == set(names.TIS_MODES)


@pytest.mark.parametrize("values", every_objective(), ids=lambda v: "-".join(map(str, v.values())))
def test_every_objective_runs_and_gives_the_statistics_it_names(values):
    objective = ObjectiveConfig(**values)
    rows, hidden, vocab = 5, 6, 11
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h, w = random(rows, hidden).requires_grad_(), random(vocab, hidden).requires_grad_()
    teacher = OutputLayer(random(rows, 4), random(vocab, 4)) if objective.needs_teacher else None
    labels = torch.randint(vocab, (rows,), generator=generator)
    made = make_terms(objective)
    weights = {
        name: Objective(one.term, one.coef * torch.full_like(h.detach()[:, 0], 1 / rows))
        for name, one in made.items()
    }
    result = fused_linear_objectives(
        h,
        w,
        teacher,
        weights,
        labels=labels if objective.passes_labels else None,
        return_stats=True,
        stats_k=objective.stats_k or None,
    )
    result.loss.backward()
    assert h.grad.isfinite().all() and h.grad.abs().sum() > 0
    expected = {"student_entropy", *objective.list_statistics}
    expected |= {"student_log_prob"} if objective.passes_labels else set()
    if objective.needs_teacher:
        expected |= {"teacher_entropy"}
        expected |= {"teacher_log_prob"} if objective.passes_labels else set()
    assert set(result.stats) == expected
    total = sum(one.coef * result.terms[name].mean() for name, one in made.items())
    assert math.isclose(float(result.loss.detach()), float(total), rel_tol=1e-9)


GROUPS = [*GOOD, "rollout.samples_per_prompt=4"]
REPLAY = ["mix.kind=replay", "mix.source=responses.jsonl", "mix.per_step=4"]
# What a method needs beside its preset.
AROUND = {
    **dict.fromkeys(("kdrl", "skill_sd", "rlad", "rapo", "paced"), GROUPS),
    **dict.fromkeys(("posterior_rkl", "posterior_fkl", "opsd_grpo"), GROUPS),
    "grpo": [one for one in GROUPS if not one.startswith("teacher")],
    "dph_f": [*GROUPS, *REPLAY],
    "dph_js": [*GROUPS, *REPLAY],
    "pskd": [*GOOD, "mix.student_share=0"],
    "gopd": [*GOOD, "reference.path=base"],
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_is_described(name):
    objective = ObjectiveConfig.of(name)
    assert objective.preset == name
    assert all(getattr(objective, k) == v for k, v in PRESETS[name].values.items())
    config = load_config(None, [*AROUND.get(name, GOOD), f"objective.preset={name}"])
    assert config.objective == objective and config.warnings == []
    wanted = {"distill"} if objective.distils else set[str]()
    wanted |= {"distill_low"} if name == "rapo" else set()
    wanted |= {"sinkd"} if objective.sinkd_coef else set()
    wanted |= {"returns"} if objective.returns else set()
    wanted |= {"rl"} if objective.rl else set()
    wanted |= {"replay"} if objective.replay else set()
    wanted |= {"entropy"} if objective.entropy_coef else set()
    assert set(make_terms(objective)) == wanted
    docs = Path(__file__).parents[2] / "docs/configuration.md"
    row = next(line for line in docs.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    assert PRESETS[name].about in row and PRESETS[name].paper in row
    for key, value in PRESETS[name].values.items():
        assert f"{key} = {value}" in row


def test_a_preset_fills_in_what_is_not_given(tmp_path):
    objective = load("preset=many_faces", "k=5", "loss_agg=token-mean").objective
    assert (objective.k, objective.variant, objective.loss_agg) == (5, "sg", "token-mean")
    assert ObjectiveConfig.of("many_faces", k=5).k == 5
    file = tmp_path / "run.toml"
    file.write_text('[objective]\npreset = "vopd"\nbaseline_k = 7\nchunk_size = 3\n')
    given = load(path=file).objective
    assert (given.loss, given.baseline_k, given.chunk_size) == ("vopd", 7, 3)
    # As an override it replaces the file's section: its parts need not fit another method.
    replaced = load("preset=gkd", path=file).objective
    assert replaced == ObjectiveConfig.of("gkd")


def test_the_saved_config_of_a_preset_is_the_same_objective(tmp_path):
    from megaopd import config as config_io

    config = load("preset=many_faces", "k=7")
    config_io.save(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


def test_truncated_rollouts_are_no_matter_to_divergences_and_corrected_by_weights():
    law = {"temperature": 0.6, "top_p": 0.9, "top_k": 10}
    assert warnings(ObjectiveConfig(), **law) == []
    assert warnings(ObjectiveConfig(loss="sft"), **law) == []
    corrected = ObjectiveConfig(loss="pg", tis="token")
    assert warnings(corrected, temperature=0.6, top_p=1.0, top_k=0) == []
    assert len(warnings(corrected, **law)) == 2  # what is never sampled stays missing


def test_what_an_objective_needs():
    plain = needs(ObjectiveConfig())
    assert plain.teacher and not plain.labels and not plain.old_log_prob_pass
    assert not plain.statistics_pass and not plain.rewards
    sft = needs(ObjectiveConfig(loss="sft"))
    assert sft.labels and not sft.teacher and sft.payloads == PAYLOADS
    assert needs(ObjectiveConfig(loss="pg")).labels
    assert needs(ObjectiveConfig(sft_coef=0.1)).labels
    assert needs(ObjectiveConfig(target="one_hot", target_weight=0.5)).labels
    assert needs(ObjectiveConfig(returns="sum")).old_log_prob_pass
    dpg = needs(ObjectiveConfig.of("posterior_fkl"))
    assert dpg.teacher and dpg.old_log_prob_pass and dpg.rewards and dpg.payloads == ("hidden",)
    token = needs(ObjectiveConfig(loss="pg", tis="token"))
    assert token.old_log_prob_pass and not token.statistics_pass
    assert needs(ObjectiveConfig(loss="pg", tis="reject")).statistics_pass


def test_kl_is_only_called_so_where_it_is_one():
    name = {"rkl": "kl", "fkl": "kl", "sft": "nll", "jsd": "distill", "k2": "distill"}
    assert all(ObjectiveConfig(loss=loss).value_name == said for loss, said in name.items())
    assert ObjectiveConfig(support="student_topk", k=9).value_name == "distill"
    assert ObjectiveConfig(target="tempered", target_weight=0.5).value_name == "distill"


def test_the_extra_terms_have_their_coefficients():
    made = make_terms(ObjectiveConfig(sft_coef=0.5, entropy_coef=0.25))
    assert {n: (t.coef, t.importance) for n, t in made.items()} == {
        "distill": (1.0, True),
        "sft": (0.5, True),
        "entropy": (-0.25, False),
    }


def test_the_teachers_share_of_the_target_rises():
    """PS-KD's alpha_e = alpha_T e / E, e from 1, with the optimizer step as its clock."""
    pskd = ObjectiveConfig.of("pskd", target_steps=4)
    shares = [pskd.at(step).target_weight for step in (0, 1, 3, 9)]
    assert shares == pytest.approx([0.2, 0.4, 0.8, 0.8])
    assert all(pskd.at(step).target == "one_hot" for step in (0, 9))
    assert ObjectiveConfig.of("pskd", target_steps=0).at(0).target_weight == 0.8


def micro_batch(mask, rollout, *, sequence_first_rows):
    from megaopd.losses import loss_weights
    from megaopd.trainer.batch import MicroBatch

    count, length = mask.shape

    def flat(x):
        x = x.t().reshape(-1)
        return x if sequence_first_rows is None else x[sequence_first_rows]

    weights = loss_weights(mask, loss_agg="seq-mean-token-mean", num_samples=count)
    return MicroBatch(
        tokens=torch.zeros(count, length, dtype=torch.int64),
        position_ids=None,
        rows=sequence_first_rows,
        labels_T=flat(torch.zeros(count, length, dtype=torch.int64)),
        weights_T=flat(weights),
        mask_T=flat(mask.bool()),
        rollout_log_probs_T=flat(rollout),
        has_rollout_log_probs=True,
        slot_T=flat(torch.arange(count * length).view(count, length)),
        table=(count, length),
    )


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("mode", ["token", "seq", "mask", "reject"])
def test_importance_weights_are_per_sample_and_count_what_survives(mode, all_rows):
    from megaopd.losses import loss_weights
    from megaopd.losses.importance import tis_weights
    from megaopd.parallel import Grid, ParallelConfig
    from megaopd.trainer.importance import weigh

    mask = torch.tensor([[0.0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    old = torch.tensor([[-1.0, -1, -1, -1], [-2, -2, -2, -2], [0, 0, 0, 0]])
    rollout = old - torch.tensor([[9.0, 0.1, 3.0, -0.2], [2.0, 2.5, 9, 9], [9, 9, 9, 9]])
    rows = None if all_rows else mask.t().reshape(-1).nonzero().squeeze(1)
    micro = micro_batch(mask, rollout, sequence_first_rows=rows)
    objective = ObjectiveConfig(loss="pg", tis=mode, loss_agg="seq-mean-token-mean")
    old_T = old.t().reshape(-1)
    place = Grid(ParallelConfig(), None, 0, 0, 0, 1, 0, 0, 0, 1)
    found = weigh(micro, old_T if rows is None else old_T[rows], objective, place)
    expected, metrics = tis_weights(old, rollout, mask, mode=mode)
    kept = mask * (expected > 0)
    surviving = loss_weights(kept, loss_agg="seq-mean-token-mean", num_samples=3)
    flat = (surviving * expected).t().reshape(-1)
    torch.testing.assert_close(found.importance_weights_T, flat if all_rows else flat[rows])
    weight, square, outside, counted = found.importance_sums.tolist()
    assert math.isclose(weight**2 / (5 * square), float(metrics["ess"]), rel_tol=1e-6)
    assert math.isclose(outside / counted, float(metrics["clip_fraction"]), rel_tol=1e-6)
    assert found.term_weights(importance=False) is micro.weights_T
