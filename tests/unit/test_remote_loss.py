"""A teacher known by lists: what is refused, clamped and masked."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaopd.errors import UserError
from megaopd.losses import (
    CrossEntropy,
    Divergence,
    ListedTeacher,
    Objective,
    OutputLayer,
    Sampled,
    Target,
    fused_linear_objectives,
    reference,
)
from megaopd.losses.remote import TAIL_FLOOR
from megaopd.objectives.remote import check_remote, remote_payload
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.rollout.score_tables import (
    REQUEST_ENTRIES,
    Piece,
    ScoreRequest,
    TokenScores,
    fill_lists,
    plan_pieces,
)
from megaopd.trainer.config import RemoteTeacherConfig

V, ROWS, K = 29, 6, 5
F64 = torch.float64


def problem(seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(ROWS, V, generator=g, dtype=F64) * scale for _ in range(2))
    return student, teacher, torch.randint(V, (ROWS,), generator=g)


def teacher_list(teacher, k=K, labels=None, support="teacher_topk", ids=None):
    log_q = teacher.log_softmax(1)
    ids = reference.topk_ids(teacher, k) if ids is None else ids
    label = None if labels is None else log_q.gather(1, labels[:, None])[:, 0]
    return ListedTeacher(ids, log_q.gather(1, ids), label, support)


def run(student, teacher, term, **more):
    """(per-token values, d loss / d logits) behind the identity as output layer."""
    z = student.clone().requires_grad_()
    eye = torch.eye(V, dtype=F64)
    out = fused_linear_objectives(
        z, eye, teacher, {"a": Objective(term, torch.ones(len(z), dtype=F64))}, **more
    )
    return out, torch.autograd.grad(out.loss, z)[0]


@pytest.mark.parametrize("kind", ["rkl", "fkl", "jsd"])
def test_a_teacher_surer_than_fp32_can_say_reads_as_a_tail_of_a_millionth(kind):
    """1 - Q of fp32 log-probs is noise there: unclamped it would be a log-ratio of 60."""
    student, teacher, _ = problem()
    teacher[:, 3] += 60.0
    exact = teacher_list(teacher)
    term = Divergence(kind=kind, support="teacher_topk", k=K)
    values = []
    for noise in (0.0, 3e-7, -3e-7):
        log_q = (exact.log_q.float() + noise).double()
        out, grad = run(student, ListedTeacher(exact.ids, log_q, None, "teacher_topk"), term)
        assert out.per_token.isfinite().all() and grad.isfinite().all()
        assert grad.sum(1).abs().max() < 1e-10
        values.append(out.per_token)
    assert (values[0] - values[1]).abs().max() < 1e-4 and (values[0] - values[2]).abs().max() < 1e-4
    x, y = student.log_softmax(1), teacher.log_softmax(1)
    mask = reference.topk_mask(teacher, K)
    tail_p = torch.where(mask, 0.0, x.exp()).sum(1)
    bucket = reference.TERMS[kind](tail_p.log(), torch.full_like(tail_p, TAIL_FLOOR).log())
    want = torch.where(mask, reference.TERMS[kind](x, y), 0.0).sum(1) + bucket
    torch.testing.assert_close(values[0], want, atol=1e-6, rtol=1e-6)


def test_the_order_of_a_list_does_not_matter():
    student, teacher, labels = problem()
    given_ = teacher_list(teacher, labels=labels)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    other = ListedTeacher(given_.ids[:, order], given_.log_q[:, order], given_.label_log_q,
                          "teacher_topk")  # fmt: skip
    for term in (
        Divergence(kind="pld", k=K),
        Divergence(kind="rkl", support="teacher_topk", k=K),
        Divergence(kind="rkl", support="teacher_topk", k=K, variant="sampled_tail"),
        Divergence(kind="fkl", support="intersection", k=K),
    ):
        more = {} if term.kind == "pld" else {"labels": labels}
        for mine in (given_, other):
            _, grad = run(student, mine, term, **more)
            _, want = run(student, OutputLayer(teacher, torch.eye(V, dtype=F64)), term, **more)
            torch.testing.assert_close(grad, want, atol=1e-10, rtol=1e-10)


def test_only_the_sampled_token_is_enough_for_its_estimators():
    student, teacher, labels = problem()
    mine = ListedTeacher(label_log_q=teacher_list(teacher, labels=labels).label_log_q)
    dense = OutputLayer(teacher, torch.eye(V, dtype=F64))
    for estimator in ("k1_reward", "k2", "k3", "k3pp", "k5", "pg"):
        found = [
            run(student, law, Sampled(estimator=estimator), labels=labels) for law in (mine, dense)
        ]
        torch.testing.assert_close(found[0][1], found[1][1], atol=1e-12, rtol=1e-12)
    # Terms without a teacher share the pass.
    run(student, mine, CrossEntropy(), labels=labels)


LISTED = {"support": "teacher_topk", "k": K}
REFUSED = [
    (Divergence(kind="rkl"), {}, "full vocabulary"),
    (Divergence(kind="bdkd"), {}, "full vocabulary"),
    (Divergence(kind="rkl", **LISTED, temperature=2.0), {}, "need a sum over the whole"),
    (Divergence(kind="rkl", support="student_topk", k=K), {}, "student_topk list of 5"),
    (Divergence(kind="rkl", support="teacher_topk", k=K + 1), {}, "teacher_topk list of 6"),
    (
        Divergence(kind="rkl", **LISTED, target=Target(kind="tempered", weight=0.5)),
        {},
        "whole laws",
    ),
    (Divergence(kind="pld", k=K), {"labels": True}, "no labels"),
    (
        Sampled(estimator="vopd", baseline="value"),
        {"labels": True},
        "sums over the whole vocabulary",
    ),
    (Sampled(estimator="vopd", baseline="topk", k=K), {"labels": True}, "student_topk list"),
    (Divergence(kind="rkl", **LISTED), {"stats_k": 4, "return_stats": True}, "stats_k"),
]


@pytest.mark.parametrize(("term", "more", "said"), REFUSED)
def test_what_a_list_does_not_hold_is_refused(term, more, said):
    student, teacher, labels = problem()
    more = {**more, **({"labels": labels} if "labels" in more else {})}
    with pytest.raises(UserError) as caught:
        run(student, teacher_list(teacher, labels=labels), term, **more)
    assert said in str(caught.value) and caught.value.expected


def test_numbers_that_are_missing_are_named():
    student, teacher, labels = problem()
    bare = teacher_list(teacher)
    for term in (
        Sampled(estimator="k2"),
        Divergence(kind="rkl", **LISTED, variant="sampled_tail"),
        Divergence(kind="rkl", **LISTED, target=Target(kind="one_hot", weight=0.8)),
    ):
        with pytest.raises(UserError, match="did not score the sampled tokens"):
            run(student, bare, term, labels=labels)
    with pytest.raises(UserError, match="with nothing"):
        ListedTeacher()
    with pytest.raises(UserError, match="all three"):
        ListedTeacher(bare.ids, bare.log_q)
    with pytest.raises(UserError, match="that of the ids"):
        ListedTeacher(bare.ids, bare.log_q[:, 1:], None, "teacher_topk")
    with pytest.raises(UserError, match="intersection"):
        ListedTeacher(bare.ids, bare.log_q, None, "intersection")
    with pytest.raises(UserError, match=f"teacher ids has {ROWS - 1} rows"):
        short = ListedTeacher(bare.ids[1:], bare.log_q[1:], None, "teacher_topk")
        run(student, short, Divergence(kind="rkl", **LISTED))


# ---- objectives: METHODS 18's table --------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "payload"),
    [
        ({"support": "teacher_topk", "k": 20}, "topk"),
        ({"support": "student_topk", "k": 20, "variant": "sg"}, "topk"),
        ({"support": "intersection", "k": 20, "variant": "intersect"}, "topk"),
        ({"loss": "fkl", "support": "teacher_topk", "k": 9}, "topk"),
        ({"loss": "pld"}, "topk"),
        ({"loss": "kl_top"}, "topk"),
        ({"loss": "vopd"}, "topk"),
        ({"loss": "k2"}, "sampled"),
        ({"loss": "pg", "tis": "token", "sft_coef": 0.1, "entropy_coef": 0.1}, "sampled"),
        ({"support": "teacher_topk", "k": 9, "target": "one_hot", "target_weight": 0.8}, "topk"),
    ],
    ids=str,
)
def test_what_servers_can_serve(values, payload):
    objective = ObjectiveConfig(**values)
    assert remote_payload(objective) == payload
    check_remote(objective, log_probs=True)
    check_remote(objective, log_probs=True, top_ids=objective.own_k)


@pytest.mark.parametrize(
    ("values", "more", "said"),
    [
        ({}, {}, "the teacher's whole law"),
        ({"loss": "jsd"}, {}, "the teacher's whole law"),
        ({"loss": "bdkd"}, {}, "the teacher's whole law"),
        ({"loss": "k2", "stats_k": 5}, {}, "objective.stats_k = 5"),
        ({"loss": "vopd", "baseline": "value"}, {}, "objective.baseline = value"),
        ({"target": "tempered", "target_weight": 0.5, "support": "teacher_topk", "k": 5}, {},
         "objective.target = tempered"),
        ({"support": "teacher_topk", "k": 5, "temperature": 2.0}, {}, "score at temperature 1"),
        ({"support": "student_topk", "k": 5}, {"top_ids": 0}, "SamplingParams.top_ids"),
        ({"loss": "vopd"}, {"top_ids": 99}, "a loss on 100 of them"),
        ({"loss": "pg", "tis": "token"}, {"log_probs": False}, "without rollout log-probs"),
    ],
    ids=str,
)  # fmt: skip
def test_what_servers_cannot_serve_is_refused_with_the_reason(values, more, said):
    with pytest.raises(UserError) as caught:
        check_remote(ObjectiveConfig(**values), **{"log_probs": True, **more})
    assert said in str(caught.value) and caught.value.expected


def test_the_statistics_of_a_list_that_is_not_the_teachers():
    both = {"mass_student", "mass_teacher", "bucket_kl"}
    of_student = ObjectiveConfig(support="student_topk", k=5)
    assert set(of_student.statistics_of("topk")) == both
    assert set(of_student.statistics_of("hidden")) == both | {"overlap", "teacher_rank"}
    of_teacher = ObjectiveConfig(support="teacher_topk", k=5)
    assert set(of_teacher.statistics_of("topk")) == both | {"teacher_rank"}
    shared = ObjectiveConfig(support="intersection", k=5)
    assert set(shared.statistics_of("topk")) == both | {"overlap", "teacher_rank"}
    assert ObjectiveConfig(loss="k2").statistics_of("sampled") == ()


def test_addresses_are_checked():
    for wrong, said in (
        ({"addresses": ("localhost:1",)}, "http://host:30000"),
        ({"calls": 0}, "at least 1"),
        ({"retries": -1}, "0 or more"),
        ({"timeout_s": 0.0}, "above 0"),
    ):
        with pytest.raises(UserError, match=said):
            RemoteTeacherConfig(**wrong)


# ---- the student's supports: one list of ids a request ------------------------------------------


@st.composite
def supports(draw):
    rng = random.Random(draw(st.integers(0, 1 << 20)))
    vocab, k = draw(st.sampled_from([(8, 3), (200, 5), (5000, 20)]))
    stays, gap = draw(st.floats(0.0, 1.0)), draw(st.floats(0.0, 0.4))
    top = []
    for _ in range(draw(st.integers(0, 60))):
        kept = [i for i in (top[-1] if top else ()) if rng.random() < stays]
        ids = dict.fromkeys([*kept, *rng.sample(range(vocab), k)])
        top.append(() if rng.random() < gap else tuple(ids)[:k])
    return ScoreRequest("s", (1,), (0,) * len(top), top_ids=tuple(top))


@given(supports(), st.integers(20, 200))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_pieces_hold_every_position_once_within_the_bound(request_, bound):
    pieces = plan_pieces(request_, max_union=bound, max_entries=1 << 40)
    seen = [p for piece in pieces for p in range(piece.start, piece.stop)]
    assert seen == [i for i, ids in enumerate(request_.top_ids) if ids]
    for piece in pieces:
        assert len(piece.ids) <= bound and list(piece.ids) == sorted(set(piece.ids))
        wanted = {i for p in range(piece.start, piece.stop) for i in request_.top_ids[p]}
        assert wanted == set(piece.ids)


def cost(pieces):
    return sum(REQUEST_ENTRIES + piece.entries for piece in pieces)


@pytest.mark.parametrize("new", [0.05, 0.3, 1.0])
def test_the_cut_is_close_to_the_best_constant_length(new):
    """Supports of 20 ids, of which a share is new at each position."""
    rng = random.Random(0)
    top, fresh = [tuple(range(20))], 20
    for _ in range(500):
        keep = [i for i in top[-1] if rng.random() >= new]
        top.append((*keep, *range(fresh, fresh + 20 - len(keep))))
        fresh += 20 - len(keep)
    request_ = ScoreRequest("s", (1,), (0,) * len(top), top_ids=tuple(top))
    found = cost(plan_pieces(request_, max_union=1 << 20, max_entries=1 << 40))
    constant = []
    for length in range(1, 200):
        cut = range(0, len(top), length)
        unions = [set().union(*top[a : a + length]) for a in cut]
        constant.append(sum(REQUEST_ENTRIES + length * len(u) for u in unions))
    assert found <= 1.1 * min(constant)
    alone = sum(REQUEST_ENTRIES + 20 for _ in top)
    assert found < 0.5 * alone


def test_tables_are_put_back_at_their_positions():
    request_ = ScoreRequest("s", (1,), (0, 0, 0), top_ids=((7, 3), (), (9,)))
    tables = [
        (Piece(0, 1, (3, 7)), np.array([[-3.0, np.nan]], np.float32)),
        (Piece(2, 3, (9,)), np.array([[-9.0]], np.float32)),
    ]
    ids, log_q = fill_lists(request_, tables)
    assert ids.tolist() == [[-1, 3], [-1, -1], [9, -1]]
    assert log_q[0, 1] == -3 and log_q[2, 0] == -9
    scores = TokenScores(np.array([-1, -1, np.nan], np.float32), ids, log_q)
    assert scores.valid.tolist() == [True, False, False]
