"""Published methods as values of [objective]: what their papers set, as far as it is set here.

A value that is given wins over the preset's. Learning rates, sampling and models are not part of a
preset. Values that a paper does not state are marked (ours).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaopd.errors import UserError


@dataclass(frozen=True)
class Preset:
    """paper: arXiv id, or where it was published; about: one line."""

    paper: str
    about: str
    values: Mapping[str, Any]


_SEQ_MEAN = {"loss_agg": "seq-mean-token-mean"}

# fmt: off
PRESETS: dict[str, Preset] = {
    "many_faces": Preset(
        "2605.11182", "reverse KL on the student's top 20, stop-gradient on the log-ratio",
        {"loss": "rkl", "support": "student_topk", "k": 20, "variant": "sg", **_SEQ_MEAN}),
    "many_faces_norm": Preset(
        "2605.11182", "reverse KL renormalised on the intersection of both top 20",
        {"loss": "rkl", "support": "intersection", "k": 20, "variant": "intersect", **_SEQ_MEAN}),
    "full_rkl": Preset(
        "2605.11182", "exact reverse KL over the whole vocabulary", {"loss": "rkl"}),
    "tm_opd": Preset(
        "Thinking Machines, On-Policy Distillation",
        "log-ratio of the sampled token as reward, importance weights at most 2",
        {"loss": "pg", "tis": "token"}),
    "vopd": Preset(
        "KL for a KL", "policy gradient with the reverse KL on the top 100 as baseline",
        {"loss": "vopd", "baseline": "topk", "baseline_k": 100}),
    "grpo": Preset(
        "2402.03300", "policy gradient on group-normalised rewards, no teacher",
        {"loss": "none", "rl": "ppo"}),
    "kdrl": Preset(
        "2506.02208", "GRPO and half the squared log-ratio, its factor 5e-3 falling to 1e-3",
        {"loss": "k2", "rl": "ppo", "coef": 5e-3, "coef_end": 1e-3, "coef_steps": 80}),
    "opsd_grpo": Preset(
        "2605.11182", "GRPO, a token's advantage weighed by how the teacher, which sees more, "
        "likes it within its response",
        {"loss": "none", "rl": "ppo", "rl_weigh": "teacher"}),
    "skill_sd": Preset(
        "2604.10674", "GRPO and 1e-3 times k3 through the live ratio; the teacher sees skills",
        {"loss": "k3pp", "rl": "ppo", "coef": 1e-3}),
    "rlad": Preset(
        "2602.22495", "GRPO whose ratio is to the old policy and the teacher, half each (ours)",
        {"loss": "none", "rl": "trrd", "rl_clip_high": 0.2}),
    "rapo": Preset(
        "2510.03865", "GRPO, an entropy bonus, and forward KL from the reference (the teacher), "
        "which is tempered where the reward is low; factors ours",
        {"loss": "rapo", "rl": "ppo", "coef": 1e-3, "entropy_coef": 1e-3}),
    "paced": Preset(
        "2603.11178", "reverse KL, each prompt by p (1 - p) of its pass rate; second_loss makes "
        "two stages of it", {"loss": "rkl", "weigh": "pass_rate"}),
    "dph_f": Preset(
        "2509.07430", "GRPO, and KL(initial || student) on stored samples of solved prompts",
        {"loss": "none", "rl": "ppo", "replay": "dph_forward", "replay_coef": 0.02}),
    "dph_js": Preset(
        "2509.07430", "the same with the Jensen-Shannon divergence",
        {"loss": "none", "rl": "ppo", "replay": "dph_js", "replay_coef": 0.1}),
    "posterior_rkl": Preset(
        "2205.11275", "reward and 0.05 (ours) times the log-ratio to the initial policy, the "
        "teacher: reverse KL to the posterior",
        {"loss": "k1_reward", "rl": "ppo", "coef": 0.05, "advantage": "centred"}),
    "posterior_fkl": Preset(
        "2205.11275", "policy gradient on each sample's weight under the posterior initial x "
        "exp(reward / 0.05) (ours), the teacher being the initial policy: forward KL to it",
        {"loss": "none", "rl": "dpg", "reward_scale": 0.05}),
    "minillm": Preset(
        "2306.08543", "exact reverse KL of the next token, and a policy gradient on the mean "
        "log-ratio of the tokens after it", {"loss": "rkl", "returns": "mean"}),
    "gopd": Preset(
        "2602.12125", "reverse KL to teacher^1.25 / base^0.25, over the whole vocabulary",
        {"loss": "rkl", "target": "geometric", "target_weight": 1.25}),
    "gkd": Preset(
        "2306.13649", "Jensen-Shannon divergence, beta 0.5, on the student's samples",
        {"loss": "jsd", "beta": 0.5}),
    "distillm": Preset(
        "2402.03898", "skewed forward KL, alpha 0.1", {"loss": "skew_fkl", "alpha": 0.1}),
    "pskd": Preset(
        "2006.12000", "cross-entropy to a mixture of the label and the student of the last epoch "
        "(the teacher), whose share rises to 0.8 over the run (steps ours)",
        {"loss": "fkl", "target": "one_hot", "target_weight": 0.8, "target_steps": 500}),
    "bdkd": Preset(
        "2212.12965", "forward and reverse KL weighed by the entropy gap, soft gate (ours)",
        {"loss": "bdkd", "variant": "soft", "beta": 1.0}),
    "sinkd": Preset(
        "2402.17110", "forward KL at temperature 2, and 0.1 (ours) times the Sinkhorn divergence "
        "of both models' laws of 128 tokens",
        {"loss": "fkl", "temperature": 2.0, "sinkd_coef": 0.1}),
    "pld": Preset(
        "2506.12542", "Plackett-Luce likelihood of the teacher's order, first 64 ranks (ours)",
        {"loss": "pld", "k": 64}),
    "kl_top": Preset(
        "2501.13987", "forward KL renormalised on the teacher's top 1000",
        {"loss": "kl_top", "k": 1000}),
    "ta_opd": Preset(
        "2608.14728", "reverse KL on the teacher's top 20 (ours) and one bucket for the rest",
        {"loss": "rkl", "support": "teacher_topk", "k": 20, "variant": "tail"}),
    "revisiting_opd": Preset(
        "2603.25562", "reverse KL renormalised on the teacher's top 32",
        {"loss": "rkl", "support": "teacher_topk", "k": 32, "variant": "renorm"}),
}
# fmt: on


def check_preset(name: str) -> None:
    """UserError for a name that is no preset."""
    if name in PRESETS or not name:
        return
    near = difflib.get_close_matches(name, PRESETS, 1)
    raise UserError(
        f"objective.preset = {name!r}",
        expected="one of " + ", ".join(map(repr, PRESETS)),
        fix=f"did you mean {near[0]!r}?" if near else "",
    )


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """values of [objective] with those of its preset where it gives none."""
    name = values.get("preset", "")
    if not isinstance(name, str):
        return dict(values)  # the type check says so
    check_preset(name)
    return {**(PRESETS[name].values if name else {}), **values}
