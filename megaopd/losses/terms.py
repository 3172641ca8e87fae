"""What a loss at the output layer is made of: terms, which combinations exist, and their defaults.

A term is a per-token loss of (student law, teacher law, sampled token). Several terms can share one
pass over the logits; each has its own token weights. Which kinds, supports and variants go together
is one table, VALID: everything else is refused with the reason before any work is done.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megaopd.errors import UserError
from megaopd.losses.divergences import KINDS, Kind

SUPPORTS = ("full", "student_topk", "teacher_topk", "intersection")
# pld and kl_top are losses on the teacher's list; bdkd weighs rkl and fkl token by token.
DIVERGENCES = [*KINDS, "bdkd", "pld", "kl_top"]
# variant -> what a truncated divergence does about the tokens outside its support S
VARIANTS = {
    "tail": "one more bucket holds the mass outside S: the K+1-bucket divergence",
    "sg": "sum over S of p * stop_gradient(log p - log q): unbiased head, the tail is ignored",
    "renorm": "both laws renormalised on S: the mass on S is free",
    "unnorm": "the plain partial sum: BIASED, drives mass out of S; keep it as a failure baseline",
    "intersect": "renorm on the intersection of both top-k lists",
    "sampled_tail": "sg on S, plus the sampled token where it is outside S: unbiased",
}
DEFAULT_VARIANT = "tail"
TARGETS = ("teacher", "geometric", "tempered", "linear", "one_hot")


def _variants(kind: str, support: str) -> tuple[str, ...]:
    if kind in ("pld", "kl_top"):
        return ()
    if kind == "bdkd":
        return ("soft", "hard") if support == "full" else ()
    if support == "full":
        return ("none",)
    common = ("tail", "renorm", "unnorm")
    extra = ("sg", "sampled_tail") if kind == "rkl" else ()
    return (*common, *extra, *(("intersect",) if support == "intersection" else ()))


VALID: dict[tuple[str, str], tuple[str, ...]] = {
    (kind, support): names
    for kind in DIVERGENCES
    for support in SUPPORTS
    if (names := _variants(kind, support))
} | {("pld", "teacher_topk"): ("none",), ("kl_top", "teacher_topk"): ("renorm", "tail")}

DEFAULT_K = {"pld": 64, "kl_top": 1000}


def add_kind(name: str, kind: Kind) -> None:
    """A divergence beside those of this package, with the supports and variants of an f-divergence.

    No kernel knows it: it is computed by the plain passes of blocks.py.
    """
    KINDS[name] = kind
    DIVERGENCES.append(name)
    VALID.update({(name, s): names for s in SUPPORTS if (names := _variants(name, s))})


@dataclass(frozen=True, kw_only=True)
class Target:
    """The law that the student is pulled to, made of the teacher's and (some) a base model's.

    teacher    q
    geometric  softmax((1 - weight) base + weight teacher); weight > 1 extrapolates (G-OPD)
    tempered   softmax(weight * teacher)                                             (RAPO)
    linear     (1 - weight) softmax(base) + weight q
    one_hot    (1 - weight) onehot(label) + weight q                                (PS-KD)
    """

    kind: str = "teacher"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in TARGETS:
            raise UserError(
                f"target {self.kind!r}", expected="one of " + ", ".join(map(repr, TARGETS))
            )
        mixture = self.kind in ("linear", "one_hot")
        if (mixture and not 0 < self.weight < 1) or not self.weight >= 0:
            raise UserError(
                f"target {self.kind!r} with weight {self.weight}",
                expected="0 < weight < 1" if mixture else "weight >= 0",
                fix="weight is the teacher's share of the target",
            )

    @property
    def needs_base(self) -> bool:
        return self.kind in ("geometric", "linear")


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A divergence of the student from the target, over a support. See VALID and docs/losses.md."""

    kind: str
    support: str | None = None
    k: int | None = None
    variant: str | None = None
    temperature: float = 1.0
    alpha: float | None = None
    beta: float | None = None
    target: Target = field(default_factory=Target)

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise UserError(
                f"kind={self.kind!r}",
                expected="one of " + ", ".join(map(repr, DIVERGENCES)),
                fix="'rkl' is KL(student||teacher), 'fkl' is KL(teacher||student)",
            )
        listed = self.kind in DEFAULT_K
        support = self.support or ("teacher_topk" if listed else "full")
        if support not in SUPPORTS:
            raise UserError(
                f"support={support!r}", expected="one of " + ", ".join(map(repr, SUPPORTS))
            )
        allowed = VALID.get((self.kind, support), ())
        if not allowed:
            good = [s for k, s in VALID if k == self.kind]
            raise UserError(
                f"kind={self.kind!r} with support={support!r}",
                expected="support " + " or ".join(map(repr, good)),
                fix="leave support out" if listed else "use support='full'",
            )
        variant = self.variant or (allowed[0] if allowed != ("none",) else None)
        if variant is not None and (variant not in allowed or variant == "none"):
            raise UserError(
                f"variant={variant!r} with kind={self.kind!r}, support={support!r}",
                expected="no variant"
                if allowed == ("none",)
                else "one of " + ", ".join(map(repr, allowed)),
                fix=_why_not(variant, self.kind),
            )
        k = self.k if self.k is not None else DEFAULT_K.get(self.kind)
        self._check_k(support, k)
        object.__setattr__(self, "support", support)
        object.__setattr__(self, "variant", variant)
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "alpha", self._parameter("alpha"))
        object.__setattr__(self, "beta", self._parameter("beta"))
        check_positive("temperature", self.temperature)

    def _check_k(self, support: str, k: int | None) -> None:
        if (support == "full") != (k is None):
            raise UserError(
                f"k={k} with support={support!r}",
                expected="no k" if k is not None else "k, the number of tokens in the support",
                fix="remove k, or use support='student_topk' (rkl) or 'teacher_topk' (fkl)"
                if k is not None
                else "pass k, for instance 20",
            )
        if k is not None and (k != int(k) or k < 1):
            raise UserError(f"k={k}", expected="a whole number, at least 1", fix="for instance 20")

    def _parameter(self, name: str) -> float | None:
        value = getattr(self, name)
        default, low, high = self._range(name)
        if default is None:
            if value is not None:
                raise UserError(
                    f"{name}={value!r} with kind={self.kind!r}, variant={self.variant!r}",
                    expected=f"no {name}: this divergence does not use it",
                    fix=f"remove {name}",
                )
            return None
        value = default if value is None else value
        if not low < value < high:
            raise UserError(
                f"{name}={value} with kind={self.kind!r}",
                expected=f"{low} < {name} < {high}",
                fix="the limits are kinds of their own: jsd at beta 0 and 1 is fkl and rkl"
                if self.kind == "jsd"
                else f"leave {name} out for its default {default}",
            )
        return value

    def _range(self, name: str) -> tuple[float | None, float, float]:
        """(default, low, high) of alpha or beta; default None where the kind does not take it."""
        if self.kind == "bdkd":  # beta: temperature of the soft gate; alpha: the hard gate's delta
            mine = "beta" if self.variant == "soft" else "alpha"
            return (1.0 if mine == "beta" else 2.0) if name == mine else None, 0.0, float("inf")
        entry = KINDS.get(self.kind)
        if entry is None or entry.parameter != name:
            return None, 0.0, 1.0
        return entry.default, entry.low, entry.high

    @property
    def parameter(self) -> float:
        """The one number that the kind takes; 0.0 where it takes none."""
        return self.alpha if self.alpha is not None else self.beta if self.beta is not None else 0.0

    def resolved(self) -> "Divergence":
        """kl_top spelled as what it is: fkl on the teacher's list."""
        return replace(self, kind="fkl") if self.kind == "kl_top" else self


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """-log p(label): supervised fine-tuning. dz = (p - e_label) / temperature."""

    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """H(p); give it negative weights for an entropy bonus. dz = -p (log p + H) / temperature."""

    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """An estimator of sampled.py on log p(label) and log q(label), at temperature 1.

    options: the estimator's numbers; its per-token inputs (advantage, old_log_prob, ...) come with
    the batch. baseline: for vopd, computed in the same pass: value, topk, unnorm (these two on the
    student's top-k) or optimal. without: inputs of the batch that are another term's. advantage:
    name of the input that is its advantage, where another term has one too.
    """

    estimator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    k: int | None = None
    without: tuple[str, ...] = ()
    advantage: str = "advantage"

    def __post_init__(self) -> None:
        if self.baseline not in (None, "value", "topk", "unnorm", "optimal"):
            raise UserError(
                f"baseline={self.baseline!r}",
                expected="None, 'value', 'topk', 'unnorm' or 'optimal'",
            )
        listed = self.baseline in ("topk", "unnorm")
        if listed != (self.k is not None):
            raise UserError(
                f"k={self.k} with baseline={self.baseline!r}",
                expected="k with the baselines topk and unnorm, and only there",
                fix="pass k=100" if listed else "remove k",
            )


@dataclass(frozen=True, kw_only=True)
class Sinkhorn:
    """How far the student's laws of a chunk of tokens are from the target's: sinkhorn.py.

    A chunk of the pass is what one transport plan couples: it is no sum over tokens, and its terms
    are those of the student's tokens, sum_j Pi_ij W_ij. No temperature^2.
    """

    temperature: float = 2.0
    epsilon: float = 0.1  # of the plan's entropy
    iterations: int = 20
    target: Target = field(default_factory=Target)

    def __post_init__(self) -> None:
        for name in ("temperature", "epsilon", "iterations"):
            check_positive(name, getattr(self, name))


Term = Divergence | CrossEntropy | Entropy | Sampled | Sinkhorn


def divergence_term(stats: bool, k: int | None, **options: Any) -> tuple[Divergence, int | None]:
    """(the term, k of the statistics): a k that the term has no use for is the statistics' list."""
    listed = options["support"] not in (None, "full") or options["kind"] in DEFAULT_K
    if stats and not listed:
        return Divergence(**options), k
    return Divergence(k=k, **options), None


def check_positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise UserError(f"{name}={value}", expected="a number > 0", fix=f"set {name} > 0")


def _why_not(variant: str, kind: str) -> str:
    if variant in ("sg", "sampled_tail"):
        return f"{variant!r} is defined for rkl; {kind} has 'tail', 'renorm' and 'unnorm'"
    if variant == "intersect":
        return "use support='intersection'"
    return "leave variant out for the default"
