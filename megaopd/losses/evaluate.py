"""From a chunk's complete sums to each term's value and its share of the gradient's coefficients.

A few numbers a token; nothing here touches the vocabulary or communicates. The coefficients are
those of blocks.py; what lives on a list of tokens or at the label is kept apart, in Contributions.

Shapes: C rows, K entries of the list.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaopd.losses.blocks import Coefs, Norm
from megaopd.losses.divergences import Laws
from megaopd.losses.importance import vopd_baseline
from megaopd.losses.lists import ListLoss, head_laws, plackett_luce, sampled_tail, truncated
from megaopd.losses.plan import Plan, is_general
from megaopd.losses.sampled import ESTIMATORS, sampled_terms
from megaopd.losses.terms import CrossEntropy, Divergence, Entropy, Sampled, Term
from megaopd.losses.topk import Head, contains


@dataclass
class Labels:
    """The sampled tokens of a chunk: ids [C], who owns them, and their logits (complete)."""

    ids: Tensor
    owned: Tensor
    column: Tensor
    s: Tensor
    t: Tensor


@dataclass
class Contributions:
    """dz on the list ([C, K] each) and at the label [C], beyond what Coefs says."""

    head: list[Tensor] = field(default_factory=list)
    label: Tensor | None = None
    rest: Tensor | None = None  # [C], p's coefficient off the list only

    def at_label(self, coef: Tensor) -> None:
        self.label = coef if self.label is None else self.label + coef


@dataclass
class Evaluation:
    """All that is known of a chunk after the first round of sums."""

    norm: Norm
    moments: Mapping[str, Tensor]
    tail: Mapping[str, Tensor]
    labels: Labels | None
    head: Head | None
    teacher_list: Tensor | None
    inputs: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.laws = None if self.head is None else head_laws(self.head, self.norm)

    @property
    def rkl(self) -> Tensor:
        return self.mean_d - self.log_z_ratio

    @property
    def fkl(self) -> Tensor:
        return self.moments["d_t"] / self.moments["z_t"] + self.log_z_ratio

    @property
    def mean_d(self) -> Tensor:
        """E_p[s - t]."""
        return self.moments["d_s"] / self.moments["z_s"]

    @property
    def log_z_ratio(self) -> Tensor:
        """logsumexp(s) - logsumexp(t); the rounded parts cancel exactly where they are close."""
        n = self.norm
        assert n.m_t is not None and n.log_z_t is not None
        return (n.m_s - n.m_t) + (n.log_z_s - n.log_z_t)

    def entropy(self, law: str) -> Tensor:
        m, log_z = (
            (self.norm.m_s, self.norm.log_z_s) if law == "s" else (self.norm.m_t, self.norm.log_z_t)
        )
        assert m is not None and log_z is not None
        return m - self.moments["a_" + law] / self.moments["z_" + law] + log_z

    def log_prob(self, law: str) -> Tensor:
        assert self.labels is not None and self.norm.m_t is not None
        assert self.norm.log_z_t is not None
        if law == "s":
            return self.labels.s - self.norm.m_s - self.norm.log_z_s
        return self.labels.t - self.norm.m_t - self.norm.log_z_t

    def masses_outside(self, member: Tensor) -> tuple[Tensor, Tensor]:
        """Student and teacher mass outside the support: summed, never 1 - P."""
        assert self.laws is not None
        listed = [torch.where(member, 0.0, x).sum(1) for x in (self.laws.p, self.laws.q)]
        rest = [self.tail[z] / self.moments[z] for z in ("z_s", "z_t")]
        return rest[0] + listed[0], rest[1] + listed[1]

    def stats(self, plan: Plan) -> dict[str, Tensor]:
        """METHODS 25's quantities that this pass knows, [C] each, at the plan's temperature."""
        if not plan.stats:
            return {}
        found = {"student_entropy": self.entropy("s")}
        if plan.has_teacher:
            found["teacher_entropy"] = self.entropy("t")
        if self.labels is not None:
            found["student_log_prob"] = self.log_prob("s")
            if plan.has_teacher:
                found["teacher_log_prob"] = self.log_prob("t")
        if self.head is not None and plan.lists is not None and not plan.lists.label_first:
            found |= self._list_stats(plan)
        return found

    def _list_stats(self, plan: Plan) -> dict[str, Tensor]:
        assert self.head is not None and self.laws is not None and plan.lists is not None
        member = self.head.member
        outside = self.masses_outside(member)
        found = {
            "mass_student": torch.where(member, self.laws.p, 0.0).sum(1),
            "mass_teacher": torch.where(member, self.laws.q, 0.0).sum(1),
            "bucket_kl": truncated("rkl", 0.0, "tail", self.laws, member, *outside).value,
        }
        found = {name: value.to(self.norm.m_s.dtype) for name, value in found.items()}
        if self.teacher_list is not None:
            k = self.teacher_list.shape[1]
            if plan.lists.source == "student":
                found["overlap"] = contains(self.teacher_list, self.head.ids).sum(1) / k
            if self.labels is not None:
                hit = self.teacher_list == self.labels.ids[:, None]
                rank = torch.where(hit.any(1), hit.to(torch.int8).argmax(1), k)
                found["teacher_rank"] = rank.to(self.norm.m_s)
        return found


def evaluate_terms(
    plan: Plan, facts: Evaluation, factors: Tensor
) -> tuple[Tensor, Coefs, Contributions]:
    """(values [terms, C], coefficients, contributions); factors [terms, C] scale the gradient.

    Rows of general f-divergences are left at 0: the second round fills them.
    """
    zero = torch.zeros_like(facts.norm.m_s)
    values = torch.zeros_like(zero).repeat(len(plan.terms), 1)
    coefs, extra = Coefs(zero), Contributions()
    for i, term in enumerate(plan.terms):
        scale = factors[i].expand_as(zero)
        if isinstance(term, Divergence) and is_general(term):
            coefs.parts.append((term.kind, term.parameter, scale))
        else:
            values[i] = _evaluate(term, facts, scale, coefs, extra)
    return values, coefs, extra


def _evaluate(
    term: Term, facts: Evaluation, scale: Tensor, coefs: Coefs, extra: Contributions
) -> Tensor:
    if isinstance(term, Divergence):
        if term.support == "full":
            return _full(term, facts, scale, coefs)
        return _listed(_list_loss(term, facts), scale, coefs, extra)
    if isinstance(term, Entropy):
        entropy = facts.entropy("s")
        coefs.p = coefs.p - scale * entropy
        coefs.px = -scale if coefs.px is None else coefs.px - scale
        return entropy
    if isinstance(term, CrossEntropy):
        value, slope = -facts.log_prob("s"), -torch.ones_like(scale)
    else:
        assert isinstance(term, Sampled)  # a Sinkhorn term couples tokens: the engine takes it
        value, slope = _sampled(term, facts)
    coefs.p = coefs.p - scale * slope
    extra.at_label(scale * slope)
    return value


def _full(term: Divergence, facts: Evaluation, scale: Tensor, coefs: Coefs) -> Tensor:
    """rkl, fkl and their sums: known from the moments of the first round."""
    w_f, w_r = _weights(term, facts)
    value = torch.zeros_like(scale)
    if w_r is not None:
        value = value + w_r * facts.rkl
        coefs.pd = _plus(coefs.pd, scale * w_r)
        coefs.p = coefs.p - scale * w_r * facts.mean_d
    if w_f is not None:
        value = value + w_f * facts.fkl
        coefs.q = _plus(coefs.q, -scale * w_f)
        coefs.p = coefs.p + scale * w_f
    return value


def _weights(term: Divergence, facts: Evaluation) -> tuple[Tensor | None, Tensor | None]:
    """Weights of fkl and of rkl, [C] or None; BD-KD's (arXiv 2212.12965) from the entropy gap."""
    one = torch.ones_like(facts.norm.m_s)
    if term.kind != "bdkd":
        return (None if term.kind == "rkl" else one), (None if term.kind == "fkl" else one)
    gap = facts.entropy("t") - facts.entropy("s")
    if term.variant == "soft":
        forward = 2 * torch.sigmoid(gap / term.parameter)
        return forward, 2 - forward
    strong = term.parameter * one
    return torch.where(gap > 0, strong, one), torch.where(gap > 0, one, strong)


def _list_loss(term: Divergence, facts: Evaluation) -> ListLoss:
    head, laws = facts.head, facts.laws
    assert head is not None and laws is not None
    if term.kind == "pld":
        return plackett_luce(laws, facts.masses_outside(head.member)[0])
    assert term.variant is not None
    variant = "sg" if term.variant == "sampled_tail" else term.variant
    member = head.member
    tails = facts.masses_outside(member) if variant == "tail" else (laws.p[:, 0], laws.q[:, 0])
    loss = truncated(term.kind, term.parameter, variant, laws, member, *tails)
    if term.variant != "sampled_tail":
        return loss
    assert facts.labels is not None
    log_p = facts.log_prob("s")
    old = facts.inputs.get("old_log_prob")
    ratio = torch.ones_like(log_p) if old is None else (log_p - old).clamp(-20, 20).exp()
    outside = ~((head.ids == facts.labels.ids[:, None]) & member).any(1)
    return sampled_tail(laws, loss, log_p - facts.log_prob("t"), outside, ratio)


def _listed(loss: ListLoss, scale: Tensor, coefs: Coefs, extra: Contributions) -> Tensor:
    rest = scale * loss.const.to(scale.dtype)
    extra.rest = rest if extra.rest is None else extra.rest + rest
    extra.head.append(scale[:, None] * loss.coef)
    if loss.label_coef is not None:
        extra.at_label(scale * loss.label_coef.to(scale.dtype))
    return loss.value.to(scale.dtype)


def _sampled(term: Sampled, facts: Evaluation) -> tuple[Tensor, Tensor]:
    known = ESTIMATORS[term.estimator].inputs if term.estimator in ESTIMATORS else facts.inputs
    given = dict(facts.inputs)
    if term.advantage != "advantage":
        given["advantage"] = given[term.advantage]
    inputs = {name: x for name, x in given.items() if name in known and name not in term.without}
    if term.baseline is not None:
        inputs["baseline"] = _baseline(term.baseline, facts)
    return sampled_terms(
        facts.log_prob("s"),
        facts.log_prob("t") if "teacher_log_prob" in known else None,
        estimator=term.estimator,
        **inputs,
        **term.options,
    )


def _baseline(mode: str, facts: Evaluation) -> Tensor:
    if mode in ("topk", "unnorm"):
        laws: Laws | None = facts.laws
        assert laws is not None
        x, y = (law.to(facts.norm.m_s.dtype) for law in (laws.x, laws.y))
        return vopd_baseline(mode, student_log_probs=x, teacher_log_probs=y)
    if mode == "value":
        return vopd_baseline(mode, rkl=facts.rkl)
    z = facts.moments["z_s"]
    square = facts.moments["q_s"] / (z * z)
    square_rho = facts.moments["r_s"] / (z * z) - square * facts.log_z_ratio
    return vopd_baseline(mode, rkl=facts.rkl, sum_p2=square, sum_p2_rho=square_rho)


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
