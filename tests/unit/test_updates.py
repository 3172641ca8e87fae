"""Parts of a rollout, the ratio's figures, and what several optimizer steps are refused with."""

import pytest
import torch

from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.schema import load_config
from megaopd.trainer.batch import MicroBatch, mini_batches_of
from megaopd.trainer.ratios import ratio_rows
from megaopd.trainer.student import metrics_of_updates

GRPO = [
    "student.path=s", "data.source=task:addition3", "objective.preset=grpo",
    "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4",
]  # fmt: skip


def sample(prompt, index=0, kind="rollout"):
    return Sample(Prompt(prompt, (1,), "", None, ""), (2,), None, "stop", 0, index, kind=kind)


def test_parts_have_whole_prompts_and_a_share_of_each_kind():
    made = [sample(f"p{i}", j) for i in range(6) for j in range(3)]
    others = [sample(f"x{i}", kind="sft") for i in range(3)]
    parts = mini_batches_of([*made, *others], 3)
    for i, part in enumerate(parts):
        ids = [s.prompt.id for s in part]
        assert ids == [f"p{2 * i}"] * 3 + [f"p{2 * i + 1}"] * 3 + [f"x{i}"]
    assert mini_batches_of(made, 1) == [made]
    assert [len(part) for part in mini_batches_of(made[:6], 4)] == [3, 3]  # two prompts are left


def test_metrics_weigh_by_tokens():
    steps = [
        {"loss": 1.0, "grad_norm": 2.0, "kl": 0.5, "tokens": 10.0, "lr": 0.1},
        {"loss": 3.0, "grad_norm": 4.0, "kl": 1.0, "tokens": 30.0, "lr": 0.1},
    ]
    found = metrics_of_updates(steps)
    assert found == {
        "loss": 2.0, "grad_norm": 3.0, "kl": 0.875, "tokens": 40.0, "lr": 0.1, "updates": 2.0,
    }  # fmt: skip
    assert metrics_of_updates(steps[:1]) == steps[0]


def micro(old, advantage=None):
    n = len(old)
    return MicroBatch(
        None, None, None, None, torch.ones(n), torch.ones(n, dtype=torch.bool), None, True,
        old_log_probs_T=old, advantage_T=advantage,
    )  # fmt: skip


def test_clipped_tokens_are_those_without_a_slope():
    from megaopd.losses.sampled import sampled_terms

    torch.manual_seed(0)
    log_p, old, log_q = (-3 * torch.rand(200) for _ in range(3))
    advantage = torch.randn(200)
    rows = {"student_log_prob": log_p, "teacher_log_prob": log_q}
    for rl in ("ppo", "trrd"):
        o = ObjectiveConfig(loss="none", rl=rl)
        options = {"clip_low": o.rl_clip_low, "clip_high": o.rl_clip_high, "dual_clip": o.dual_clip}
        _, slope = sampled_terms(
            log_p, log_q if rl == "trrd" else None, estimator=rl, old_log_prob=old,
            advantage=advantage, **options,
        )  # fmt: skip
        found = ratio_rows(o, micro(old, advantage), rows)
        assert torch.equal(found["ratio_clipped"], (slope == 0).double())
    o = ObjectiveConfig(loss="pg", clip_low=0.2, clip_high=0.28)
    _, slope = sampled_terms(
        log_p, log_q, estimator="pg", old_log_prob=old, clip_low=0.2, clip_high=0.28
    )
    found = ratio_rows(o, micro(old), rows)
    assert torch.equal(found["ratio_clipped"], (slope == 0).double())
    assert (found["ratio_k3"] >= 0).all()
    assert ratio_rows(ObjectiveConfig(loss="k2"), micro(old), rows) == {}


def test_a_family_that_nobody_is_in_has_no_tokens():
    """Samples say which terms see them, and none says this one: not all of them."""
    one = micro(torch.zeros(2))
    assert torch.equal(one.family("sft"), torch.ones(2))
    named = MicroBatch(**{**vars(one), "families": {"rl": torch.full((2,), 0.5)}})
    assert torch.equal(named.family("rl"), torch.full((2,), 0.5))
    assert torch.equal(named.family("sft"), torch.zeros(2))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.mini_batches=3"], "set rollout.prompts_per_step=9"),
        (["trainer.mini_batches=0"], "at least 1"),
        (["trainer.epochs=0"], "at least 1"),
        (["trainer.term_norms_every=-1"], "0 or more"),
        (["trainer.term_norms_every=5", "student.fp8=delayed"], "set student.fp8=current"),
        (["objective.preset=", "objective.loss=sft", "trainer.epochs=2"], "raise run.steps"),
    ],
)
def test_refused(overrides, said):
    arguments = [a for a in GRPO if "sft" not in str(overrides) or "objective" not in a]
    with pytest.raises(UserError) as caught:
        load_config(None, [*arguments, *[o for o in overrides if o != "objective.preset="]])
    assert said in str(caught.value)


def test_what_is_warned_of():
    one = [a for a in GRPO if "objective" not in a]
    pg = [*one, "teacher.path=t", "objective.loss=pg"]
    clips = ["objective.clip_low=0.2", "objective.clip_high=0.28"]
    several = "trainer.epochs=2"
    assert any("without clip_low" in w for w in load_config(None, [*pg, several]).warnings)
    assert not load_config(None, [*pg, *clips, several]).warnings
    assert any("do nothing" in w for w in load_config(None, [*pg, *clips]).warnings)
