"""What a run minimises, as configuration: one loss on the sampled tokens, and terms beside it.

Of METHODS' axes: target, divergence, support and variant, or an estimator on the sampled token;
sample and token weights (weigh, only, tis), reduction (loss_agg) and the loss's factor over the
steps. 0 and "" stand for the default of the chosen loss.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from megaopd.objectives.names import (
    COUPLED,
    DEFAULT_BASELINE,
    DEFAULT_BASELINE_K,
    DEFAULT_K,
    DIVERGENCES,
    ESTIMATORS,
    LIST_STATS,
)
from megaopd.objectives.presets import with_preset
from megaopd.objectives.validate import check


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss of one optimizer step: what each token costs, and how tokens make one number.

    A preset's values are filled in by `of` and by schema.load_config; the constructor only records
    its name.

    Raises:
        UserError: names that do not exist, and combinations that objectives/validate.py refuses.
    """

    preset: str = ""  # a name of objectives/presets.py, whose values stand where none is given
    # A divergence (rkl: KL(student || teacher), fkl: KL(teacher || student), ...), an estimator on
    # the sampled token (k2, pg, ...), or sft: -log p(token) without a teacher.
    loss: str = "rkl"
    temperature: float = (
        1.0  # both models' logits are divided by it; the divergence gets its square
    )
    loss_agg: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = "token-mean"  # how token losses make one number; counted over the whole optimizer step
    # The tokens that a divergence looks at; "": all of them (pld, kl_top: the teacher's top-k).
    support: Literal["", "full", "student_topk", "teacher_topk", "intersection"] = ""
    k: int = 0  # tokens of the support; 0: none, or the default of pld (64) and kl_top (1000)
    # What is done about the tokens outside the support; bdkd: soft or hard gate. "": the default.
    variant: Literal[
        "", "tail", "sg", "renorm", "unnorm", "intersect", "sampled_tail", "soft", "hard"
    ] = ""
    alpha: float = 0.0  # of skew_fkl, skew_rkl, alpha and bdkd's hard gate; 0: its default
    beta: float = 0.0  # of jsd, bdkd's soft gate and sinkd's plan (epsilon); 0: its default
    # The law that the student is pulled to; geometric and linear mix the teacher with [reference].
    target: Literal["teacher", "geometric", "tempered", "linear", "one_hot"] = "teacher"
    # tempered: the teacher's exponent; others: its share of the target, geometric above 1 too.
    target_weight: float = 1.0
    target_steps: int = 0  # in so many steps the weight rises from 0, in a line; 0: it is constant
    f_kind: Literal[
        "", "rkl", "fkl", "js", "softened_rkl", "hellinger", "jeffreys", "tv", "chi2"
    ] = ""  # the f-divergence that f_pg estimates
    baseline: Literal["", "value", "topk", "unnorm", "optimal"] = ""  # of vopd; "": topk
    baseline_k: int = 0  # tokens of vopd's topk and unnorm baselines; 0: 100
    clip_low: float = 0.0  # pg and vopd: the ratio is clipped at 1 - clip_low; 0: not at all
    clip_high: float = 0.0  # pg and vopd: the ratio is clipped at 1 + clip_high; 0: not at all
    cap: float = 0.0  # limit of k2's slope, of k3pp's and f_pg's ratio; 0: the estimator's default
    # Weights p_trainer / p_engine of the sampled tokens: clipped by token or by sample (seq), or
    # tokens (mask) or samples (reject) with a far ratio dropped. Costs one more forward pass.
    tis: Literal["off", "token", "seq", "mask", "reject"] = "off"
    coef: float = 1.0  # factor of the loss
    coef_end: float = 0.0  # where the factor goes, in a line
    coef_steps: int = 0  # in so many steps, and stays there; 0: it is constant
    second_loss: str = ""  # takes the place of the loss from a step on, in the same setting
    second_from: int = 0  # that step
    # Samples that the loss looks at (KDRL): those with a reward below 1, or in whose group no
    # sample has reward 1; right: with reward 1. "": all of them.
    only: Literal["", "wrong", "unsolved", "right"] = ""
    # Factor of a sample in the loss; pass_rate: p (1 - p) of its group's, 1 in the mean (PACED).
    weigh: Literal["", "pass_rate"] = ""
    low_power: float = 0.5  # rapo: exponent of the reference where the reward is 0
    # Beside a loss of reverse KL, whose next token it looks at, a policy gradient on the log-ratios
    # of the tokens after it (MiniLLM), with the loss's factor: on their mean, or on their sum, with
    # which the gradient is that of the whole sequences' KL. Costs one more forward pass.
    returns: Literal["", "mean", "sum"] = ""
    # A policy gradient on rewards beside the loss. ppo: clipped ratio, as GRPO; trrd: RLAD's, whose
    # ratio is to the old policy's and the teacher's geometric mean; dpg: on the sample's weight
    # under the posterior teacher x exp(reward / reward_scale); the teacher is the initial policy.
    rl: Literal["", "ppo", "trrd", "dpg"] = ""
    rl_coef: float = 1.0  # its factor
    # From rewards: group: (r - mean) / std of the prompt's samples; centred: r - mean; reward: r.
    advantage: Literal["group", "centred", "reward"] = "group"
    rl_clip_low: float = 0.2  # the ratio is clipped at 1 - rl_clip_low
    rl_clip_high: float = 0.28  # and at 1 + rl_clip_high
    dual_clip: float = 3.0  # of the ratio where the advantage is negative
    # Of a token's advantage. teacher: where the teacher likes the token more than the rest of its
    # response, it counts more in a good response and less in a bad one (OPSD as a reweighting of
    # GRPO); nothing is imitated. Costs one more forward pass.
    rl_weigh: Literal["", "teacher"] = ""
    rl_weigh_clip: float = 0.2  # the factor lies between 1 - this and 1 + this
    mix: float = 0.5  # trrd: the old policy's share of the mean
    reward_scale: float = 0.05  # dpg: rewards are divided by it
    # What is asked of samples that are not to be forgotten ([mix]), with the teacher as the law
    # that sampled them: KL(teacher || student), twice the Jensen-Shannon one, or alpha's.
    replay: Literal["", "dph_forward", "dph_js", "dph_alpha"] = ""
    replay_coef: float = 0.02  # its factor
    sft_coef: float = 0.0  # of -log p(token) beside the loss: on [mix]'s samples, or the student's
    entropy_coef: float = 0.0  # of the student's entropy as a bonus: it is subtracted
    # Of the Sinkhorn divergence of a chunk's laws beside the loss (SinKD), at temperature 2.
    sinkd_coef: float = 0.0
    stats_k: int = 0  # length of a list of its own for masses, overlap and ranks; 0: none
    i_know_biased: bool = False  # allows variant = unnorm, which drives mass out of the support
    # Tokens whose logits exist at once; 0: chosen for the device. sinkd: those that it couples,
    # 0: 128.
    chunk_size: int = 0

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def of(cls, preset: str, **changes: Any) -> "ObjectiveConfig":
        """The preset with some fields changed."""
        return cls(**with_preset({"preset": preset, **changes}))

    @property
    def is_divergence(self) -> bool:
        return self.loss in (*DIVERGENCES, *COUPLED)

    @property
    def is_sampled(self) -> bool:
        """An estimator: it sees the sampled token only."""
        return self.loss in ESTIMATORS

    @property
    def distils(self) -> bool:
        """Whether its loss compares with a teacher."""
        return self.loss not in ("sft", "none")

    @property
    def needs_teacher(self) -> bool:
        told = self.rl in ("trrd", "dpg") or bool(self.rl_weigh or self.replay)
        return self.distils or told

    @property
    def on_policy(self) -> bool:
        """Whether the student samples what it is trained on."""
        return self.loss != "sft"

    @property
    def needs_sequences(self) -> bool:
        """Both models' log-probs of whole sequences before the update."""
        return bool(self.returns or self.rl_weigh) or self.rl == "dpg"

    @property
    def needs_rewards(self) -> bool:
        return bool(self.rl or self.only or self.weigh) or self.loss == "rapo"

    @property
    def needs_groups(self) -> bool:
        """Several samples of a prompt."""
        groups = self.rl and self.advantage in ("group", "centred")
        return bool(groups or self.weigh or self.only == "unsolved")

    def at(self, step: int) -> "ObjectiveConfig":
        """The objective of step number `step` (from 0): its loss, factor and target. Of the step
        alone, so that a resumed run goes on as it would have."""
        now = self
        if self.second_loss and step >= self.second_from:
            now = replace(now, loss=self.second_loss, second_loss="", second_from=0)
        if self.coef_steps:
            share = min(step / self.coef_steps, 1.0)
            coef = self.coef + share * (self.coef_end - self.coef)
            now = replace(now, coef=coef, coef_end=0.0, coef_steps=0)
        if self.target_steps:
            # Never 0: a target without the teacher would be another loss.
            weight = self.target_weight * min((step + 1) / self.target_steps, 1.0)
            now = replace(now, target_weight=weight, target_steps=0)
        return now

    @property
    def resolved_support(self) -> str:
        return self.support or ("teacher_topk" if self.loss in DEFAULT_K else "full")

    @property
    def resolved_baseline(self) -> str:
        """vopd's baseline; "" for other losses."""
        return (self.baseline or DEFAULT_BASELINE) if self.loss == "vopd" else ""

    @property
    def resolved_baseline_k(self) -> int:
        """Length of the baseline's list; 0 where it has none."""
        listed = self.resolved_baseline in ("topk", "unnorm")
        return (self.baseline_k or DEFAULT_BASELINE_K) if listed else 0

    @property
    def own_k(self) -> int:
        """Length of the list that the loss itself needs; 0: none."""
        if self.is_divergence and self.resolved_support != "full":
            return self.k or DEFAULT_K.get(self.loss, 0)
        return self.resolved_baseline_k

    @property
    def lists_of_student(self) -> bool:
        """Whether the loss's list is the student's own, and not (also) the teacher's."""
        return self.resolved_support == "student_topk" or self.resolved_baseline_k > 0

    @property
    def passes_labels(self) -> bool:
        """Whether the loss is given the sampled tokens.

        Not pld: it would put them in front of the teacher's order, and a student's own sample is
        no ground truth.
        """
        return self.loss != "pld"

    @property
    def list_statistics(self) -> tuple[str, ...]:
        """The list statistics (METHODS 25) that the pass returns."""
        if not (self.own_k or self.stats_k):
            return ()
        left_out = set()
        if self.is_divergence and self.resolved_support == "teacher_topk":
            left_out.add("overlap")
        if not self.passes_labels:
            left_out.add("teacher_rank")
        return tuple(name for name in LIST_STATS if name not in left_out)

    def statistics_of(self, payload: str) -> tuple[str, ...]:
        """`list_statistics` where the teacher hands over `payload` (one of validate.PAYLOADS).

        Of a teacher that gave log-probs at the student's ids, its own top-k is not known.
        """
        if payload == "hidden":
            return self.list_statistics
        if payload == "sampled" or not self.own_k:
            return ()
        unknown = {"overlap", "teacher_rank"} if self.lists_of_student else set()
        return tuple(name for name in self.list_statistics if name not in unknown)

    @property
    def value_name(self) -> str:
        """Name of the loss's raw token mean: kl only where it is a KL of student and teacher."""
        if self.loss in ("sft", "none"):
            return "nll" if self.loss == "sft" else "reward"
        exact = self.loss in ("rkl", "fkl") and self.resolved_support == "full"
        return "kl" if exact and self.target == "teacher" else "distill"

    @property
    def is_reverse_kl(self) -> bool:
        """Whether the raw token mean is KL(student || teacher), and nothing in place of it."""
        return self.loss == "rkl" and self.value_name == "kl" and self.temperature == 1.0

    @property
    def reverse_kl(self) -> "ObjectiveConfig":
        """What an evaluation measures of any objective: see `is_reverse_kl`."""
        return ObjectiveConfig(loss="rkl", chunk_size=self.chunk_size)
