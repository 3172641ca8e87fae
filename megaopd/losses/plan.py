"""From terms to what one pass over a chunk must compute. Static: the same on every rank and chunk.

Terms that see the same laws (temperature, target) and no two different token lists share a pass:
its plan. Others get a plan of their own, which costs another set of scalars and a copy of the
chunk's logits, but no matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.divergences import FUSED, KINDS
from megaopd.losses.remote import Known, check_known
from megaopd.losses.terms import (
    CrossEntropy,
    Divergence,
    Entropy,
    Sampled,
    Sinkhorn,
    Target,
    Term,
    check_positive,
)
from megaopd.losses.vocab_parallel import Shard, group_size

# Vocabulary per list entry from which products over the list beat dense ones; 0: never (on CUDA the
# weight gradient's scattered sums would not be reproducible).
SPARSE_SHARE = {"cpu": 16, "cuda": 0}
# Full-vocabulary kinds whose value and gradient need no second round of sums.
_MOMENTS = {
    "rkl": ("d_s",),
    "fkl": ("d_t",),
    "jeffreys": ("d_s", "d_t"),
    "bdkd": ("d_s", "d_t", "a_s", "a_t"),
}
_ORDER = ("z_s", "z_t", "d_s", "d_t", "a_s", "a_t", "q_s", "r_s")


@dataclass(frozen=True)
class Lists:
    """A top-k list: whose order it follows, its length, and what it is intersected with."""

    source: str  # "student" or "teacher"
    k: int
    intersect: bool = False
    label_first: bool = False


@dataclass(frozen=True)
class Plan:
    """One pass: terms (rows of the weights that they take: `rows`), laws, and statistics."""

    terms: tuple[Term, ...]
    rows: tuple[int, ...]
    shard: Shard
    temperature: float = 1.0
    target: Target = field(default_factory=Target)
    lists: Lists | None = None
    stats: bool = False
    has_teacher: bool = True  # its logits; False also where it is known on a list
    has_labels: bool = False
    known: Known | None = None
    softcap: float | None = None
    inline: bool = False

    def scaled(self, z: Tensor) -> Tensor:
        """Logits that were picked from a buffer, soft-capped and divided by the temperature.

        inline: the buffers hold raw logits and the kernels scale what they read; else they are
        scaled already.
        """
        if not self.inline:
            return z
        z = z.float() if self.softcap is None else self.softcap * (z.float() / self.softcap).tanh()
        return z / self.temperature

    def slope(self, scaled: Tensor) -> Tensor | None:
        """d capped / d raw at scaled logits, where nobody else applies it."""
        if not self.inline or self.softcap is None:
            return None
        return 1 - (scaled * (self.temperature / self.softcap)).square()

    @property
    def lists_of_student(self) -> bool:
        """Whether a listed teacher's lists are tokens that the student chose."""
        return self.known is not None and self.known.support == "student_topk"

    @property
    def full(self) -> list[Divergence]:
        """Divergences over the whole vocabulary."""
        return [t for t in self.terms if isinstance(t, Divergence) and t.support == "full"]

    @property
    def fused(self) -> bool:
        """Whether the kernels know all kinds of it."""
        return not any(t.kind in KINDS and t.kind not in FUSED for t in self.full)

    @property
    def program(self) -> str:
        """Which gradient blocks.py has to make."""
        kinds = {t.kind for t in self.full}
        entropy = any(isinstance(t, Entropy) for t in self.terms)
        if entropy or not kinds <= {"rkl", "fkl"} or len(kinds) > 1:
            return "general"
        if kinds:
            return kinds.pop()
        return "zero" if all(map(_on_list_only, self.terms)) else "p"

    def sparse(self, s: Tensor) -> bool:
        """Is a gradient on the list alone worth products of its own?"""
        share = SPARSE_SHARE[s.device.type]
        return self.lists is not None and bool(share) and self.lists.k * share <= s.shape[1]

    @property
    def complete(self) -> bool:
        """One shard and one divergence: a block's gradient needs nothing from elsewhere."""
        alone = group_size(self.shard.group) == 1 and len(self.terms) == 1
        return alone and self.lists is None and bool(self.full)

    @property
    def coupled(self) -> bool:
        """Its one term is no sum over the chunk's rows: sinkhorn.py."""
        return any(isinstance(term, Sinkhorn) for term in self.terms)

    @property
    def uses_labels(self) -> bool:
        label_terms = any(isinstance(t, CrossEntropy | Sampled) for t in self.terms)
        variants = {t.variant for t in self.terms if isinstance(t, Divergence)}
        first = self.lists is not None and self.lists.label_first
        return (
            label_terms or first or "sampled_tail" in variants or (self.stats and self.has_labels)
        )

    @property
    def moments(self) -> tuple[str, ...]:
        """Sums of round 1 (chunk.py): what the terms need, then what the statistics need."""
        names = set() if self.program == "zero" else {"z_s"}
        for term in self.terms:
            names |= _term_moments(term)
        if self.stats:
            names |= {"z_s", "a_s", *(("a_t",) if self.has_teacher else ())}
        if names and self.has_teacher:
            names.add("z_t")
        return tuple(n for n in _ORDER if n in names)

    @property
    def general_rows(self) -> list[int]:
        """Positions of the terms whose value comes from the second round."""
        return [i for i, t in enumerate(self.terms) if is_general(t)]

    @property
    def factors(self) -> list[float]:
        """By term: d value / d raw logits over d value / d scaled logits."""
        tau = self.temperature
        # pld's student is not scaled: its temperature is that of the teacher's weights.
        return [tau if _squared(t) else 1.0 if is_pld(t) else 1.0 / tau for t in self.terms]

    @property
    def tau_squared(self) -> list[float]:
        """By term: temperature^2 where it keeps the size of a divergence's gradient."""
        return [self.temperature**2 if _squared(t) else 1.0 for t in self.terms]


def is_general(term: Term) -> bool:
    """Does this term's value need normalised probabilities of the whole vocabulary?"""
    full = isinstance(term, Divergence) and term.support == "full"
    return full and term.kind not in _MOMENTS  # pyright: ignore


def make_plans(
    terms: Sequence[Term],
    shard: Shard,
    *,
    stats: bool,
    stats_k: int | None,
    has_teacher: bool,
    has_labels: bool,
    vocab: int,
    known: Known | None = None,
) -> list[Plan]:
    """Groups terms into as few passes as their laws and lists allow. Statistics ride on the first.

    known: the teacher is elsewhere (remote.py), has_teacher is False. Raises UserError for a term
    that needs labels or a teacher that is not there, or more of it than is known.
    """
    plans: list[Plan] = []
    order = sorted(range(len(terms)), key=lambda i: not isinstance(terms[i], Divergence | Sinkhorn))
    for i in order:
        term = terms[i].resolved() if isinstance(terms[i], Divergence) else terms[i]  # pyright: ignore
        _check_inputs(term, has_teacher or known is not None, has_labels)
        check_positive("temperature", _temperature(term))
        if known is not None:
            check_known(term, known, vocab, has_labels)
        lists = _lists(term, vocab, has_labels, listed=known is not None)
        for n, plan in enumerate(plans):
            if _fits(term, lists, plan):
                plans[n] = replace(
                    plan,
                    terms=(*plan.terms, term),
                    rows=(*plan.rows, i),
                    lists=plan.lists or lists,
                )
                break
        else:
            target = term.target if isinstance(term, Divergence | Sinkhorn) else Target()
            plans.append(
                Plan((term,), (i,), shard, _temperature(term), target, lists,
                     has_teacher=has_teacher, has_labels=has_labels, known=known)
            )  # fmt: skip
    if stats:
        if plans[0].coupled:  # which computes nothing but itself; the statistics are of its laws
            plans.insert(0, replace(plans[0], terms=(), rows=()))
        plan = plans[0]
        lists = plan.lists
        if stats_k is not None and lists is None and has_teacher:
            lists = Lists("student", min(stats_k, vocab))
        plans[0] = replace(plan, stats=True, lists=lists)
    return plans


def _fits(term: Term, lists: Lists | None, plan: Plan) -> bool:
    if isinstance(term, Sinkhorn) or plan.coupled:
        return False
    if _temperature(term) != plan.temperature:
        return False
    if isinstance(term, Divergence) and term.target != plan.target:
        return False
    if isinstance(term, Sampled) and plan.target != Target():
        return False  # its teacher is q, not a mixture
    if is_pld(term) or any(map(is_pld, plan.terms)):
        return isinstance(term, CrossEntropy | Entropy) and plan.temperature == 1.0
    return lists is None or plan.lists is None or lists == plan.lists


def _lists(term: Term, vocab: int, has_labels: bool, *, listed: bool) -> Lists | None:
    """listed: the teacher is known on its own list, which is then what an intersection cuts."""
    if isinstance(term, Sampled) and term.k is not None:
        return Lists("student", min(term.k, vocab))
    if not isinstance(term, Divergence) or term.support == "full" or term.k is None:
        return None
    teachers = term.support == "teacher_topk" or (listed and term.support == "intersection")
    source = "teacher" if teachers else "student"
    first = term.kind == "pld" and has_labels
    return Lists(source, min(term.k, vocab), term.support == "intersection", first)


def _term_moments(term: Term) -> set[str]:
    if isinstance(term, Entropy):
        return {"a_s"}
    if isinstance(term, Sampled):
        optimal = {"d_s", "q_s", "r_s"}
        return {"value": {"d_s"}, "optimal": optimal}.get(term.baseline or "", set())
    if isinstance(term, Divergence) and term.support == "full":
        return set(_MOMENTS.get(term.kind, ()))
    return set()


def _check_inputs(term: Term, has_teacher: bool, has_labels: bool) -> None:
    needs_teacher = isinstance(term, Divergence | Sampled | Sinkhorn)
    if needs_teacher and not has_teacher and not _is_reward_only(term):
        raise UserError(
            f"{type(term).__name__} without a teacher",
            expected="teacher hidden states and output weight",
            fix="pass them, or use CrossEntropy or Entropy",
        )
    sampled_tail = isinstance(term, Divergence) and term.variant == "sampled_tail"
    if (isinstance(term, CrossEntropy | Sampled) or sampled_tail) and not has_labels:
        raise UserError(
            f"{type(term).__name__} without labels",
            expected="labels [T], the sampled or supervised token of each row",
            fix="pass labels",
        )
    one_hot = isinstance(term, Divergence | Sinkhorn) and term.target.kind == "one_hot"
    if one_hot and not has_labels:
        raise UserError("target 'one_hot' without labels", expected="labels [T]", fix="pass labels")


def _is_reward_only(term: Term) -> bool:
    return isinstance(term, Sampled) and term.estimator == "ppo"


def is_pld(term: Term) -> bool:
    return isinstance(term, Divergence) and term.kind == "pld"


def _on_list_only(term: Term) -> bool:
    return isinstance(term, Divergence) and term.variant in ("renorm", "intersect")


def _temperature(term: Term) -> float:
    return 1.0 if isinstance(term, Sampled) else term.temperature


def _squared(term: Term) -> bool:
    return isinstance(term, Divergence) and term.kind != "pld"
