"""The names that a configuration may use, without torch: tests hold them against losses/.

What the losses do is in losses/terms.py, divergences.py and sampled.py. Here is what a
configuration has to be checked against before torch is imported.
"""

# Lists, so that plugins (extend.py) can add their own.
DIVERGENCES = [
    "rkl", "fkl", "jsd", "skew_fkl", "skew_rkl", "tv", "hellinger", "jeffreys", "chi2",
    "softened_rkl", "alpha", "bdkd", "pld", "kl_top",
]  # fmt: skip
# Divergences of all tokens of a chunk at once.
COUPLED = ("sinkd",)
# Estimators on the sampled token that need no rewards.
ESTIMATORS = ["k1_reward", "k2", "k3", "k3pp", "k5", "pg", "vopd", "f_pg"]
# rapo: forward KL from a reference that is tempered where the reward is low. none: only `rl`.
LOSSES = [*DIVERGENCES, *COUPLED, *ESTIMATORS, "rapo", "sft", "none"]

SUPPORTS = ("full", "student_topk", "teacher_topk", "intersection")
VARIANTS = ("tail", "sg", "renorm", "unnorm", "intersect", "sampled_tail")
TARGETS = ("teacher", "geometric", "tempered", "linear", "one_hot")
BASELINES = ("value", "topk", "unnorm", "optimal")
F_KINDS = ("rkl", "fkl", "js", "softened_rkl", "hellinger", "jeffreys", "tv", "chi2")
TIS_MODES = ("off", "token", "seq", "mask", "reject")
LIST_STATS = ("mass_student", "mass_teacher", "bucket_kl", "overlap", "teacher_rank")

# Lists of these lengths where objective.k is 0; other truncated divergences have no default.
DEFAULT_K = {"pld": 64, "kl_top": 1000}
DEFAULT_BASELINE, DEFAULT_BASELINE_K = "topk", 100

# The field that a divergence's one number is in; bdkd's depends on its variant.
PARAMETER = {"jsd": "beta", "skew_fkl": "alpha", "skew_rkl": "alpha", "alpha": "alpha"}
# Which estimators take which numbers.
CLIPPED = ["pg", "vopd"]
CAPPED = ["k2", "k3pp", "f_pg"]

# Names that one may expect as objective.loss: why they are not, and what to take instead.
REFUSED: dict[str, tuple[str, str]] = {
    "k1": (
        "log p - log q differentiated has expected gradient 0: it trains nothing",
        "k1 in the reward trains: set objective.loss=k1_reward (or k2)",
    ),
    "k3_reward": (
        "k3 in the reward has the gradient of neither KL",
        "set objective.loss=k3pp, or k1_reward",
    ),
    "ppo": (
        "a policy gradient on rewards stands beside the loss, not in its place",
        "set objective.rl=ppo, with objective.loss=none where there is no teacher",
    ),
    "trrd": (
        "RLAD is a policy gradient on rewards, which stands beside the loss",
        "set objective.rl=trrd objective.loss=none, with the teacher as its anchor",
    ),
    "rapo_paper": (
        "w log w - w + 1 differentiated is not the gradient of forward KL",
        "take objective.loss=rapo, which has it exactly",
    ),
    "dph": (
        "it acts on stored samples of the initial policy, beside the loss",
        "set objective.replay=dph_forward (or dph_js, dph_alpha) and [mix]",
    ),
    "sinkhorn": ("it is called sinkd", "set objective.loss=sinkd"),
}
REFUSED |= {
    "rlad": REFUSED["trrd"],
    "grpo": REFUSED["ppo"],
    "dph_forward": REFUSED["dph"],
    "dph_js": REFUSED["dph"],
    "dph_alpha": REFUSED["dph"],
}


def variants(kind: str, support: str) -> tuple[str, ...]:
    """The variants of a divergence on a support, its default first; ("none",): it has no variants.

    (): the two do not go together.
    """
    if kind == "pld":
        return ("none",) if support == "teacher_topk" else ()
    if kind == "kl_top":
        return ("renorm", "tail") if support == "teacher_topk" else ()
    if kind in COUPLED:
        return ("none",) if support == "full" else ()
    if kind == "bdkd":
        return ("soft", "hard") if support == "full" else ()
    if support == "full":
        return ("none",)
    common = ("tail", "renorm", "unnorm")
    extra = ("sg", "sampled_tail") if kind == "rkl" else ()
    return (*common, *extra, *(("intersect",) if support == "intersection" else ()))
