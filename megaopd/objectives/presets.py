"""Published methods as values of [objective]: what their papers set, as far as it is set here.

A value that is given wins over the preset's. Learning rates, sampling and models are not part of a
preset. Values that a paper does not state are marked (ours).
"""

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
    "kdrl": Preset(
        "2506.02208", "the distillation part of KDRL: half the squared log-ratio", {"loss": "k2"}),
    "gkd": Preset(
        "2306.13649", "Jensen-Shannon divergence, beta 0.5, on the student's samples",
        {"loss": "jsd", "beta": 0.5}),
    "distillm": Preset(
        "2402.03898", "skewed forward KL, alpha 0.1", {"loss": "skew_fkl", "alpha": 0.1}),
    "bdkd": Preset(
        "2212.12965", "forward and reverse KL weighed by the entropy gap, soft gate (ours)",
        {"loss": "bdkd", "variant": "soft", "beta": 1.0}),
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

# Methods that one may look for, and what they need that cannot be configured.
NOT_YET: dict[str, str] = {
    "gopd": "a base model beside the teacher (target geometric)",
    "pskd": "the student's own past as teacher, and labels of the data",
    "rapo": "a reference tempered by each sample's reward",
    "rlad": "an advantage from group rewards",
    "skill_sd": "a teacher with skills in its prompt that follows the student",
    "paced": "pass rates of prompts as sample weights",
    "dph_f": "stored samples of the initial policy",
    "dph_js": "stored samples of the initial policy",
    "sinkd": "a loss that couples the tokens of a chunk",
}


def check_preset(name: str) -> None:
    """UserError for a name that is no preset, with what is missing for those of known methods."""
    if name in PRESETS or not name:
        return
    reason = f": it needs {NOT_YET[name]}, which cannot be configured" if name in NOT_YET else ""
    raise UserError(
        f"objective.preset = {name!r}{reason}",
        expected="one of " + ", ".join(map(repr, PRESETS)),
        fix="remove objective.preset and set objective.loss" if name in NOT_YET else "",
    )


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """values of [objective] with those of its preset where it gives none."""
    name = values.get("preset", "")
    if not isinstance(name, str):
        return dict(values)  # the type check says so
    check_preset(name)
    return {**(PRESETS[name].values if name else {}), **values}
