"""A teacher known by lists, against the dense reference that sees its logits, at world 1, 2 and 4.

The lists are cut out of the same logits in fp64. Gradients decide, of hidden states and of weight:
36 tokens in chunks of 16, a vocabulary of 1013 in 1024, with and without sequence parallel, entries
that are absent, doubled or outside the vocabulary, and rows that the teacher did not score.
"""

import itertools

import pytest
import torch

from megaopd.losses import (
    CrossEntropy,
    Divergence,
    Entropy,
    ListedTeacher,
    Objective,
    OutputLayer,
    Sampled,
    Target,
    fused_linear_objectives,
    reference,
    sampled_loss,
    vopd_baseline,
)
from tests.dist.test_gradient_matrix import CASES, K, close, laws, options, truth
from tests.dist.test_losses_tp import CHUNK, V, group, local_rows, require, shard
from tests.dist.test_main_grad import parameter
from tests.often import often

LISTED = [c for c in CASES if c[1] != "full"]
BOUND = {torch.float64: 1e-9, torch.float32: 2e-5}
# q^2/p spans e^(2 x log-ratio); its sums lose a digit and a half in fp32 (test_gradient_matrix.py).
LOOSE = {"chi2": 2e-4, "jeffreys": 1e-4}


def listed(support, student, teacher, labels, dtype=torch.float64, k=K):
    """What a server would answer: the list, and log q of the sampled token."""
    log_q = teacher[:, :V].double().log_softmax(1)
    own = student if support == "student_topk" else teacher
    ids = reference.topk_ids(own[:, :V].double(), k)
    return ListedTeacher(
        ids, log_q.gather(1, ids).to(dtype), log_q.gather(1, labels[:, None])[:, 0].to(dtype),
        "student_topk" if support == "student_topk" else "teacher_topk",
    )  # fmt: skip


def backward(want, weights, full):
    for x in full[:2]:
        x.grad = None
    (want * weights.double()).sum().backward()


def matrix_on_rank(scale, dtype):
    errors = {}
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = laws(scale)
    inputs = [x.to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight)]
    full = [x.to(torch.float64, copy=True) for x in inputs]
    full[0].requires_grad_(), full[1].requires_grad_()
    for kind, support, variant in LISTED:
        case = options(kind, support, variant, 1.0)
        student, teacher = full[0] @ full[1].t(), (full[2] @ full[3].t()).detach()
        needs = variant == "sampled_tail"
        # A pld without labels: in the teacher's order.
        want = truth(case, student, teacher, labels if needs else None)
        backward(want, weights, full)
        remote = listed(support, student.detach(), teacher, labels, dtype)
        for sp in (False, True):
            h = local_rows(inputs[0], sp).clone().requires_grad_()
            w = shard(inputs[1]).requires_grad_()
            out = fused_linear_objectives(
                h, w, remote, {"a": Objective(Divergence(**case), weights)},
                labels=labels if needs else None, vocab_size=V, group=group(), chunk_size=CHUNK,
                sequence_parallel=sp,
            )  # fmt: skip
            (1.7 * out.loss).backward()
            errors[kind, support, variant, sp] = max(
                close(out.per_token, want.detach()),
                close(h.grad / 1.7, local_rows(full[0].grad, sp), 1e-9),
                close(w.grad / 1.7, shard(full[1].grad), 1e-9),
            )
    return errors


@pytest.mark.parametrize(
    ("dtype", "world"),
    often(itertools.product([torch.float64, torch.float32], [1, 2, 4]), [(torch.float64, 2)]),
    ids=str,
)
def test_gradients_equal_the_dense_reference(ranks, world, dtype):
    for scale in (1.0, 4.0):
        found = ranks.run(matrix_on_rank, world, scale, dtype, timeout=400)
        loose = LOOSE if dtype == torch.float32 else {}
        require(found, lambda case, loose=loose: loose.get(case[0], BOUND[dtype]))


def mixtures(labels, baseline):
    """name -> (terms, whose lists, the same in dense fp64)."""

    def log_p(z):
        return -reference.cross_entropy(z, labels, 1.0, V)

    def sampled(estimator, **more):
        return lambda s, t: sampled_loss(log_p(s), log_p(t), estimator=estimator, **more)

    def listing(kind, support, variant):
        return lambda s, t: truth(options(kind, support, variant, 1.0), s, t, labels)

    def vopd(s, t):
        return sampled_loss(log_p(s), log_p(t), estimator="vopd", baseline=baseline(s, t))

    def one_hot(kind, support, variant):
        case = options(kind, support, variant, 1.0)

        def dense(s, t):
            goal = reference.one_hot_target(labels, t[:, :V], 0.8, 1.0, V)
            return reference.divergence(s[:, :V], goal, **case)

        return dense

    past = Target(kind="one_hot", weight=0.8)
    sg = Divergence(kind="rkl", support="student_topk", k=K, variant="sg")
    tail = Divergence(kind="fkl", support="teacher_topk", k=K)
    both = Divergence(kind="rkl", support="intersection", k=K, variant="intersect")
    return {
        **{name: ([Sampled(estimator=name)], None, [sampled(name)])
           for name in ("k1_reward", "k2", "k3", "k3pp", "k5", "pg")},
        "f_pg": ([Sampled(estimator="f_pg", options={"kind": "js"})], None,
                 [sampled("f_pg", kind="js")]),
        "k2 + sft + entropy": (
            [Sampled(estimator="k2"), CrossEntropy(), Entropy()], None,
            [sampled("k2"), lambda s, t: -log_p(s), lambda s, t: reference.entropy(s, 1.0, V)]),
        "vopd": ([Sampled(estimator="vopd", baseline="topk", k=K)], "student_topk", [vopd]),
        "sg + k2 + sft": (
            [sg, Sampled(estimator="k2"), CrossEntropy()], "student_topk",
            [listing("rkl", "student_topk", "sg"), sampled("k2"), lambda s, t: -log_p(s)]),
        "tail + intersect + entropy": (
            [tail, both, Entropy()], "teacher_topk",
            [listing("fkl", "teacher_topk", "tail"), listing("rkl", "intersection", "intersect"),
             lambda s, t: reference.entropy(s, 1.0, V)]),
        "one_hot student": (
            [Divergence(kind="rkl", support="student_topk", k=K, target=past)], "student_topk",
            [one_hot("rkl", "student_topk", "tail")]),
        "one_hot teacher": (
            [Divergence(kind="fkl", support="teacher_topk", k=K, target=past)], "teacher_topk",
            [one_hot("fkl", "teacher_topk", "tail")]),
        "one_hot both": (
            [Divergence(kind="jsd", support="intersection", k=K, target=past)], "teacher_topk",
            [one_hot("jsd", "intersection", "tail")]),
    }  # fmt: skip


def topk_baseline(s, t):
    x, y = (z[:, :V].detach().log_softmax(1) for z in (s, t))
    ids = reference.topk_ids(x, K)
    return vopd_baseline(
        "topk", student_log_probs=x.gather(1, ids), teacher_log_probs=y.gather(1, ids)
    )


def mixtures_on_rank():
    errors = {}
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = laws(2.0)
    full = [x.double() for x in (hidden, weight, teacher_hidden, teacher_weight)]
    full[0].requires_grad_(), full[1].requires_grad_()
    for name, (terms, support, dense) in mixtures(labels, topk_baseline).items():
        student, teacher = full[0] @ full[1].t(), (full[2] @ full[3].t()).detach()
        want = [f(student, teacher) for f in dense]
        scales = [weights * (0.3 + i) for i in range(len(terms))]
        for x in full[:2]:
            x.grad = None
        sum((a * b.double()).sum() for a, b in zip(want, scales, strict=True)).backward()
        remote = listed(support or "teacher_topk", student.detach(), teacher, labels)
        if support is None:
            remote = ListedTeacher(label_log_q=remote.label_log_q)
        for sp, main in itertools.product((False, True), (False, True)):
            h = local_rows(full[0].detach(), sp).clone().requires_grad_()
            w = shard(full[1].detach())
            w = parameter(w) if main else w.requires_grad_()
            if main:
                w.main_grad = torch.zeros_like(w)
            objectives = {
                str(i): Objective(term, scale)
                for i, (term, scale) in enumerate(zip(terms, scales, strict=True))
            }
            out = fused_linear_objectives(
                h, w, remote, objectives, labels=labels, vocab_size=V, group=group(),
                chunk_size=CHUNK, sequence_parallel=sp, into_main_grad=main, return_stats=True,
            )  # fmt: skip
            out.loss.backward()
            grad = w.main_grad if main else w.grad
            errors[name, sp, main] = max(
                *(close(g, x.detach()) for g, x in zip(out.terms.values(), want, strict=True)),
                close(h.grad, local_rows(full[0].grad, sp), 1e-9),
                close(grad, shard(full[1].grad), 1e-9),
            )
            errors["statistics", name, sp, main] = statistics(
                out, support, student, teacher, labels
            )
    return errors


def statistics(out, support, student, teacher, labels):
    """What is said of the list is what the dense diagnostics say."""
    student, teacher = student.detach(), teacher.detach()
    want = reference.diagnostics(student, teacher, k=K, labels=labels, vocab_size=V)
    names = {"student_entropy", "student_log_prob", "teacher_log_prob"}
    if support is not None:
        names |= {"mass_student", "mass_teacher", "bucket_kl"}
    if support == "teacher_topk":
        names |= {"teacher_rank"}
    assert names <= set(out.stats) <= names | {"overlap"}, set(out.stats) ^ names
    assert "teacher_entropy" not in out.stats
    exact = {"student_entropy", "student_log_prob"}
    if support == "student_topk":
        exact |= {"mass_student"}
    return max(close(out.stats[n], want[n]) for n in exact)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_several_terms_and_main_grad(ranks, world):
    require(ranks.run(mixtures_on_rank, world, timeout=400), lambda case: 1e-9)


def incomplete_on_rank():
    """Absent, doubled and foreign entries, and rows without any: as a support without them."""
    errors = {}
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = laws(2.0)
    full = [x.double() for x in (hidden, weight, teacher_hidden, teacher_weight)]
    full[0].requires_grad_(), full[1].requires_grad_()
    teacher = (full[2] @ full[3].t()).detach()
    g = torch.Generator().manual_seed(3)
    for support, softcap in itertools.product(("student_topk", "teacher_topk"), (None, 5.0)):
        logits = full[0] @ full[1].t()
        student = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        remote = listed(support, student.detach(), teacher, labels)
        drop = torch.rand(remote.ids.shape, generator=g) < 0.3
        drop[5] = True  # a row that the teacher did not score
        ids = torch.where(drop, -1, remote.ids)
        foreign = drop & (torch.rand(ids.shape, generator=g) < 0.3)
        ids[foreign] = V + 2
        doubled = ids.clone()
        free = (ids < 0).any(1) & (ids >= 0).any(1)
        for row in free.nonzero()[:, 0].tolist():
            first = int((ids[row] >= 0).nonzero()[0])
            doubled[row, int((ids[row] < 0).nonzero()[0])] = ids[row, first]
        mask = torch.zeros(student.shape[0], V, dtype=torch.bool)
        for row, entries in enumerate(ids.tolist()):
            mask[row, [i for i in entries if 0 <= i < V]] = True
        x, y = student[:, :V].log_softmax(1), teacher[:, :V].log_softmax(1)
        weights = torch.where(mask.any(1), weights, 0.0)
        for kind, variant in itertools.product(("rkl", "jsd"), ("tail", "renorm", "unnorm")):
            dense = {"tail": reference._with_tail, "renorm": reference._renormalised}.get(variant)
            term = reference.TERMS[kind]
            want = dense(term, x, y, mask) if dense else reference._sum_on(mask, term(x, y))
            for parameter_ in full[:2]:
                parameter_.grad = None
            want = torch.where(mask.any(1), want, 0.0)
            (want * weights.double()).sum().backward(retain_graph=True)
            for name, given in (("absent", ids), ("doubled", doubled)):
                log_q = y.detach().gather(1, given.clamp(0, V - 1))
                if name == "absent":
                    log_q[drop] = torch.nan
                known = ListedTeacher(given, log_q, remote.label_log_q, support)
                h = full[0].detach().clone().requires_grad_()
                w = shard(full[1].detach()).requires_grad_()
                out = fused_linear_objectives(
                    h, w, known, {"a": Objective(
                        Divergence(kind=kind, support=support, k=K, variant=variant), weights)},
                    vocab_size=V, group=group(), chunk_size=CHUNK, softcap=softcap,
                )  # fmt: skip
                out.loss.backward()
                assert out.per_token.isfinite().all()
                errors[support, softcap, kind, variant, name] = max(
                    close(out.loss.detach(), (want * weights.double()).sum().detach(), 1e-3),
                    close(h.grad, full[0].grad, 1e-9),
                    close(w.grad, shard(full[1].grad), 1e-9),
                )
    return errors


@pytest.mark.parametrize("world", [1, 2, 4])
def test_entries_and_rows_that_are_missing(ranks, world):
    require(ranks.run(incomplete_on_rank, world, timeout=400), lambda case: 1e-9)


def narrow_on_rank():
    """bf16 weights: as a teacher on the same ranks, to the rounding of both."""
    errors = {}
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = (
        x.bfloat16() if x.is_floating_point() and x.dim() == 2 else x for x in laws(1.0)
    )
    student, teacher = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    for support, variant in (("student_topk", "sg"), ("teacher_topk", "tail")):
        term = Divergence(kind="rkl", support=support, k=K, variant=variant)
        found = []
        for law in (
            OutputLayer(teacher_hidden, shard(teacher_weight)),
            listed(support, student, teacher, labels, torch.float32),
        ):
            h, w = hidden.clone().requires_grad_(), shard(weight).requires_grad_()
            out = fused_linear_objectives(
                h, w, law, {"a": Objective(term, weights)}, vocab_size=V, group=group(),
                chunk_size=CHUNK,
            )  # fmt: skip
            out.loss.backward()
            found.append((out.per_token, h.grad, w.grad))
        errors[support, variant] = max(close(a, b, 1e-9) for a, b in zip(*found, strict=True))
    return errors


@pytest.mark.parametrize("world", [1, 2])
def test_bf16(ranks, world):
    require(ranks.run(narrow_on_rank, world), lambda case: 2e-2)
