"""A teacher that is somewhere else: all that is known of it are log-probs of a few tokens a row.

What such a teacher sends (METHODS 18, modes B and C): a list of token ids with log q, normalised
over its whole vocabulary, and log q of the sampled token. Both fit the engine without a second
spelling of any loss. A listed token's "teacher logit" is log q itself, the teacher's log-sum-exp is
0, and the mass outside the list is 1 - Q. The student's side is computed as always, from its
vocabulary shards, at the ids that are given:

    student's logits at the list   one owner-masked SUM, 4 K bytes a token, for the all-gather
    everything else                as in chunk.py; the student's moments only

1 - Q is a difference: log q comes in fp32 from logits of some 30, so Q is known to about 1e-6. The
tail is therefore clamped to at least TAIL_FLOOR. A teacher that is surer than that reads as one
with a tail of 1e-6: it pulls the student's tail to 1e-6, not to 0. (TAIL_FLOOR of lists.py, 1e-30,
would turn rounding noise into a log-ratio of 60.)

Not computable from a list, and refused: a divergence over the full vocabulary; targets that mix
before the softmax; and temperatures other than 1. The law at temperature tau is q^(1/tau) divided
by its sum over the whole vocabulary, which a list does not give. (Renormalised on a list that sum
cancels, so the variants renorm and intersect would be exact; masses and bucket KL would not.)

Shapes: T tokens, C rows of a chunk, K entries of a list.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.blocks import Norm
from megaopd.losses.terms import Divergence, Sampled, Sinkhorn, Target, Term
from megaopd.losses.topk import MASKED, Head, contains, global_lists, take_out_
from megaopd.losses.vocab_parallel import all_reduce_sum_

if TYPE_CHECKING:
    from megaopd.losses.evaluate import Evaluation, Labels
    from megaopd.losses.plan import Plan

TAIL_FLOOR = 1e-6
ABSENT = -1  # the id of an entry that is not there
# Names under which the numbers travel with a chunk's inputs: [K, C], [K, C], [C].
IDS, LOG_Q, LABEL_LOG_Q = "remote_ids", "remote_log_q", "remote_label_log_q"


@dataclass(frozen=True)
class ListedTeacher:
    """The numbers of a teacher elsewhere, at temperature 1, for all T rows; None: not asked for.

    support: whose top-k the lists are ("teacher_topk", or "student_topk": ids that the student
    gave). ids, log_q [T, K]: an entry counts for nothing where its id is ABSENT or outside the
    vocabulary, its log q is not finite, or its id stands in the row already. label_log_q [T]: log q
    of `labels`; rows that were not scored need any finite number and weight 0.
    """

    ids: Tensor | None = None
    log_q: Tensor | None = None
    label_log_q: Tensor | None = None
    support: str | None = None

    def __post_init__(self) -> None:
        lists = [x is not None for x in (self.ids, self.log_q, self.support)]
        if any(lists) != all(lists) or not (any(lists) or self.label_log_q is not None):
            raise UserError(
                "a listed teacher with a part of ids, log_q and support, or with nothing",
                expected="all three for lists, label_log_q for sampled terms, or both",
            )
        if self.support not in (None, "teacher_topk", "student_topk"):
            raise UserError(
                f"support={self.support!r} of a listed teacher",
                expected="'teacher_topk' or 'student_topk'",
                fix="an intersection is computed from the teacher's list",
            )
        if self.ids is not None and self.log_q is not None and self.ids.shape != self.log_q.shape:
            raise UserError(
                f"log_q of shape {list(self.log_q.shape)}",
                expected=f"that of the ids, {list(self.ids.shape)}",
            )

    @property
    def known(self) -> "Known":
        k = 0 if self.ids is None else self.ids.shape[1]
        return Known(self.support, k, self.label_log_q is not None)

    def rows(self) -> dict[str, Tensor]:
        """By name, each with T rows, for the check of shapes."""
        named = {"teacher ids": self.ids, "teacher log_q": self.log_q}
        named["teacher label_log_q"] = self.label_log_q
        return {name: x for name, x in named.items() if x is not None}

    def inputs(self, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """What travels with the chunks: lists in rank order (ties by id), each id once."""
        found = {}
        if self.ids is not None and self.log_q is not None:
            ids, log_q = _ranked(self.ids, self.log_q.detach().to(dtype), vocab)
            found = {IDS: ids.t().contiguous(), LOG_Q: log_q.t().contiguous()}
        if self.label_log_q is not None:
            found[LABEL_LOG_Q] = self.label_log_q.detach().to(dtype).clamp_max(0.0)
        return found


@dataclass(frozen=True)
class Known:
    """What a listed teacher offers: whose list of how many tokens, and the label's log-prob."""

    support: str | None
    k: int
    label: bool


@dataclass
class Given:
    """The numbers of one chunk: ids, log_q [C, K] or None, label_log_q [C] or None."""

    ids: Tensor | None
    log_q: Tensor | None
    label_log_q: Tensor | None

    @classmethod
    def of(cls, plan: "Plan", inputs: Mapping[str, Tensor], labels: Tensor | None) -> "Given":
        """The chunk's numbers, of the plan's target."""
        ids, log_q = inputs.get(IDS), inputs.get(LOG_Q)
        given = cls(
            None if ids is None else ids.t(),
            None if log_q is None else log_q.t(),
            inputs.get(LABEL_LOG_Q),
        )
        if plan.target.kind == "one_hot":
            assert labels is not None
            given._mix_one_hot(plan.target.weight, labels, keep_ids=plan.lists_of_student)
        return given

    def _mix_one_hot(self, weight: float, labels: Tensor, *, keep_ids: bool) -> None:
        """log of (1 - weight) onehot(label) + weight q; the mixture's own top-k of a teacher's.

        That is among the teacher's k and the label, since mixing keeps the order of all others.
        """
        ids, log_q, label = self.ids, self.log_q, self.label_log_q
        assert ids is not None and log_q is not None and label is not None
        log_w, rest = math.log(weight), torch.full_like(label, math.log1p(-weight))
        label = torch.logaddexp(label + log_w, rest)
        hit = ids == labels[:, None]
        log_q = torch.where(hit, label[:, None], log_q + log_w)
        if not keep_ids:
            k, there = ids.shape[1], hit.any(1)
            extra = torch.where(there, ABSENT, labels)[:, None]
            value = torch.where(there, -torch.inf, label)[:, None]
            ids, log_q = _ranked(torch.cat([ids, extra], 1), torch.cat([log_q, value], 1))
            ids, log_q = ids[:, :k], log_q[:, :k]
        self.ids, self.log_q, self.label_log_q = ids, log_q, label

    def take_head(self, plan: "Plan", s: Tensor) -> tuple[Head | None, Tensor | None]:
        """The list with the student's logits, taken out of s; the teacher's ids where it is theirs.

        One SUM of [C, K]. intersection: the student's own top-k is found as well (one all-gather).
        """
        need, ids, log_q = plan.lists, self.ids, self.log_q
        if need is None:
            return None, None
        assert ids is not None and log_q is not None
        there = ids != ABSENT
        member = there
        if need.intersect:
            # The list of s alone: it stands in for the teacher's logits, which nobody reads.
            found = global_lists(s, s, need.k, plan.shard, student=True, teacher=False)
            member = there & contains(found[0][0], ids)
        owned, column = plan.shard.owned(ids)
        wide = torch.float64 if s.dtype == torch.float64 else torch.float32
        s_k = torch.zeros(ids.shape, dtype=wide, device=s.device)
        if plan.shard.valid:
            s_k = torch.where(owned, s.gather(1, column).to(wide), s_k)
        all_reduce_sum_(s_k, plan.shard.group)
        take_out_(s, s, ids, plan.shard)  # there is one buffer to take them out of
        s_k = torch.where(there, plan.scaled(s_k), MASKED)
        head = Head(ids, s_k, torch.where(there, log_q.to(s_k), MASKED), member)
        return head, None if plan.lists_of_student else ids

    def complete(
        self,
        norm: Norm,
        moments: dict[str, Tensor],
        tail: dict[str, Tensor],
        labels: "Labels | None",
        head: Head | None,
    ) -> tuple[Norm, dict[str, Tensor], dict[str, Tensor]]:
        """The teacher's side of chunk.py's sums: log q is a logit whose log-sum-exp is 0."""
        zero = torch.zeros_like(norm.m_s)
        norm = Norm(norm.m_s, norm.log_z_s, zero, zero)
        if labels is not None:
            labels.t = zero if self.label_log_q is None else self.label_log_q.to(zero)
        if head is None:
            return norm, moments, tail
        outside = (1.0 - head.t.double().exp().sum(1)).clamp_min(TAIL_FLOOR)
        one = torch.ones_like(outside)
        return norm, {**moments, "z_t": one}, {**tail, "z_t": outside}

    def stats(self, plan: "Plan", facts: "Evaluation") -> dict[str, Tensor]:
        """Statistics that evaluate.py makes of a teacher's logits, [C] each, where they are known.

        teacher_log_prob; overlap with an intersection. Not known: the teacher's entropy, its rank
        of the label and the overlap where the list is the student's.
        """
        if not plan.stats:
            return {}
        found = {}
        if facts.labels is not None and self.label_log_q is not None:
            found["teacher_log_prob"] = facts.labels.t
        if plan.lists is not None and plan.lists.intersect and facts.head is not None:
            both = facts.head.member.sum(1) / facts.head.ids.shape[1]
            found["overlap"] = both.to(facts.norm.m_s)
        return found


def check_known(term: Term, known: Known, vocab: int, has_labels: bool) -> None:
    """Refuse a term that a listed teacher does not hold enough for.

    Raises:
        UserError: with what the term needs.
    """
    if isinstance(term, Sinkhorn):
        raise UserError(
            "Sinkhorn with a teacher known on a list",
            expected="a teacher on the same ranks: it compares whole laws",
            fix="give the teacher's hidden states and output weight",
        )
    if isinstance(term, Divergence):
        _check_divergence(term, known, vocab)
        if term.kind == "pld" and has_labels:
            raise UserError(
                "pld with labels and a teacher known on a list",
                expected="no labels: pld would put them in front of the teacher's order",
                fix="leave labels out, or give the teacher's hidden states and output weight",
            )
    needs_label = isinstance(term, Sampled) and term.estimator != "ppo"
    if isinstance(term, Divergence):
        needs_label = term.variant == "sampled_tail" or term.target.kind == "one_hot"
    if needs_label and not known.label:
        raise UserError(
            f"{_name(term)} with a teacher that did not score the sampled tokens",
            expected="label_log_q [T]: log q of each sampled token",
            fix="pass label_log_q with the lists",
        )
    if isinstance(term, Sampled) and term.baseline in ("value", "optimal"):
        raise UserError(
            f"baseline={term.baseline!r} with a teacher known on a list",
            expected="a teacher on the same ranks: this baseline sums over the whole vocabulary",
            fix="take baseline='topk' with the student's list, or estimator='pg'",
        )
    if isinstance(term, Sampled) and term.k is not None:
        _check_list(_name(term), "student_topk", min(term.k, vocab), known)


def _check_divergence(term: Divergence, known: Known, vocab: int) -> None:
    if term.support == "full" or term.k is None:
        raise UserError(
            f"{_name(term)} over the full vocabulary with a teacher known on a list",
            expected="a support: student_topk, teacher_topk or intersection",
            fix="set support and k, or give the teacher's hidden states and output weight",
        )
    if term.temperature != 1.0:
        raise UserError(
            f"temperature={term.temperature} with a teacher known on a list",
            expected="1.0: the list's log-probs are of temperature 1, and those of another one "
            "need a sum over the whole vocabulary",
            fix="set temperature=1.0, or give the teacher's hidden states and output weight",
        )
    if term.target.kind not in ("teacher", "one_hot"):
        raise UserError(
            f"target {term.target.kind!r} with a teacher known on a list",
            expected=f"target {Target().kind!r} or 'one_hot': this one mixes whole laws",
            fix="give the teacher's hidden states and output weight",
        )
    support = "teacher_topk" if term.support == "intersection" else term.support
    assert support is not None
    _check_list(_name(term), support, min(term.k, vocab), known)


def _check_list(who: str, support: str, k: int, known: Known) -> None:
    if (known.support, known.k) != (support, k):
        have = f"a {known.support} list of {known.k}" if known.support else "no list"
        raise UserError(
            f"{who} with a teacher that gave {have}",
            expected=f"the {support} list of {k} tokens",
            fix="ask the teacher for the list that the loss is defined on",
        )


def _name(term: Term) -> str:
    if isinstance(term, Divergence):
        return term.kind
    return term.estimator if isinstance(term, Sampled) else type(term).__name__


def _ranked(ids: Tensor, log_q: Tensor, vocab: int | None = None) -> tuple[Tensor, Tensor]:
    """(ids, log q) [T, K] by descending log q and ascending id; absent entries last, as ABSENT.

    An id that a row holds twice counts once: what a list adds to a gradient is added by id.
    """
    there = (ids >= 0) & log_q.isfinite()
    if vocab is not None:
        there &= ids < vocab
    ids = torch.where(there, ids, ABSENT).long()
    by_id = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(there)
    again[:, 1:] = by_id.values[:, 1:] == by_id.values[:, :-1]
    ids = by_id.values.masked_fill(again, ABSENT)
    log_q = log_q.gather(1, by_id.indices).clamp_max(0.0)
    order = torch.where(ids == ABSENT, -torch.inf, log_q).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order.indices)
    return ids, torch.where(ids == ABSENT, MASKED, order.values)
