"""Runs that learn from rewards, and from responses that others wrote, from the command line."""

import json
from statistics import fmean

import pytest

from tests.e2e.runs import columns, make_models, megaopd, opd_arguments

TASK = ["data.source=task:addition1", "rollout.max_new_tokens=4", "report.every=50"]


def run(*arguments):
    done = megaopd(*arguments, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """One that solves some of its prompts, so that samples of a group differ in reward."""
    root = tmp_path_factory.mktemp("student")
    made, _ = make_models(root)
    run(
        "train", f"student.path={made}", f"run.dir={root / 'sft'}", *TASK, "objective.loss=sft",
        "rollout.prompts_per_step=128", "trainer.micro_batch_size=128", "optim.lr=8e-3",
        "run.steps=50",
    )  # fmt: skip
    return root / "sft" / "checkpoints" / "step_00000050"


def test_grpo_raises_the_reward(student, tmp_path):
    """Without a teacher."""
    run_dir = tmp_path / "grpo"
    run(
        "train", f"student.path={student}", f"run.dir={run_dir}", *TASK, "objective.preset=grpo",
        "rollout.prompts_per_step=32", "rollout.samples_per_prompt=8", "optim.lr=2e-3",
        "trainer.micro_batch_size=256", "run.steps=50",
    )  # fmt: skip
    rewards = [float(reward) for (reward,) in columns(run_dir, "reward")]
    first, last = fmean(rewards[:8]), fmean(rewards[-8:])
    assert last > first + 0.08, (first, last)


def test_replayed_samples_beside_rewards(student, tmp_path):
    """megaopd sample writes what DPH-RL replays; an interrupted run goes on as the whole one."""
    responses = tmp_path / "responses.jsonl"
    sample = [
        "sample", f"student.path={student}", *TASK, "--out", responses,
        "rollout.samples_per_prompt=4", "rollout.prompts_per_step=16",
    ]  # fmt: skip
    run(*sample, "--prompts", 24)
    run(*sample, "--prompts", 48)
    records = [json.loads(line) for line in responses.read_text().splitlines()]
    assert len(records) == 4 * 48 and len({r["prompt_id"] for r in records}) == 48
    rates = {r["prompt_id"]: r["pass_rate"] for r in records}
    assert {r["reward"] for r in records} == {0.0, 1.0} and 0 < fmean(rates.values()) < 1

    def arguments(name, steps):
        return [
            *opd_arguments(student, student, tmp_path / name, *TASK), "objective.preset=dph_js",
            "objective.replay_coef=1.0", "rollout.samples_per_prompt=4",
            "mix.kind=replay", f"mix.source={responses}", "mix.per_step=6",
            "mix.least_reward=1.0", "mix.least_pass_rate=0.5", f"run.steps={steps}",
            "objective.loss=k2", "objective.only=wrong", "objective.coef=0.1",
            "objective.coef_end=0.02", "objective.coef_steps=3",
        ]  # fmt: skip

    run(*arguments("whole", 4))
    run(*arguments("parts", 2))
    run(*arguments("parts", 4))
    names = ("step", "loss", "grad_norm", "replay", "distill", "coef", "reward")
    whole = columns(tmp_path / "whole", *names)
    assert columns(tmp_path / "parts", *names) == whole
    # At the first step the student is the policy that was sampled: a divergence of 0.
    assert abs(float(whole[0][3])) < 1e-6 < float(whole[-1][3])
    assert float(whole[0][5]) == 0.1 and float(whole[-1][5]) == pytest.approx(0.02)


def test_answers_beside_and_in_place_of_samples(student, tmp_path):
    """SFT on the data's answers as a family of its own, and GKD's mixture."""
    run_dir = tmp_path / "mixed"
    run(
        *opd_arguments(student, student, run_dir, *TASK), "objective.loss=jsd", "run.steps=3",
        "objective.sft_coef=0.5", "mix.source=answers", "mix.student_share=0.5",
    )  # fmt: skip
    for nll, distill, loss in columns(run_dir, "nll", "distill", "loss"):
        assert float(nll) > 0.05
        assert float(loss) == pytest.approx(float(distill) + 0.5 * float(nll), rel=1e-5)


def test_rewards_that_nobody_gives(student, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "3+4="}\n')
    done = megaopd(
        "train", f"student.path={student}", f"run.dir={tmp_path / 'run'}", "objective.preset=grpo",
        f"data.source={prompts}", "rollout.samples_per_prompt=2", "rollout.prompts_per_step=1",
        "rollout.max_new_tokens=4", "run.steps=1",
    )  # fmt: skip
    assert done.returncode == 2 and "has no reward" in done.stderr, done.stderr
