"""Every kind x support x variant, and mixtures: gradients against the dense fp64 reference.

At tensor-parallel world 1, 2 and 4, through given logits and through the output layer, with and
without sequence parallel, logit scales 1 and 4, a vocabulary of 1013 in 1024 and 36 tokens in
chunks of 16. Each `*_on_rank` function goes through its cases on every rank of a pool.
"""

import itertools

import pytest
import torch

from megaopd.errors import UserError
from megaopd.losses import (
    CrossEntropy,
    Divergence,
    Entropy,
    Objective,
    OutputLayer,
    Sampled,
    Target,
    fused_linear_divergence,
    fused_linear_objectives,
    reference,
    vocab_parallel_divergence,
)
from megaopd.losses.sampled import sampled_loss
from megaopd.losses.terms import DIVERGENCES, SUPPORTS, VALID, VARIANTS
from tests.dist.test_losses_tp import (
    CHUNK,
    HT,
    PADDED,
    H,
    T,
    V,
    group,
    local_rows,
    require,
    shard,
)
from tests.often import often

ANY = ("tail", "renorm", "unnorm")
RKL = (*ANY, "sg", "sampled_tail")
F_KINDS = (
    "fkl", "jsd", "skew_fkl", "skew_rkl", "tv", "hellinger", "jeffreys", "chi2", "softened_rkl",
    "alpha",
)  # fmt: skip
# The whole matrix. What is not here raises (test_everything_else_is_refused).
MATRIX: dict[str, dict[str, tuple[str | None, ...]]] = {
    "rkl": {
        "full": (None,),
        "student_topk": RKL,
        "teacher_topk": RKL,
        "intersection": (*RKL, "intersect"),
    },
    **{
        kind: {
            "full": (None,),
            "student_topk": ANY,
            "teacher_topk": ANY,
            "intersection": (*ANY, "intersect"),
        }
        for kind in F_KINDS
    },
    "bdkd": {"full": ("soft", "hard")},
    "pld": {"teacher_topk": (None,)},
    "kl_top": {"teacher_topk": ("renorm", "tail")},
}
CASES = [(k, s, v) for k, rows in MATRIX.items() for s, names in rows.items() for v in names]
K = 7
BOUND = 1e-5
# q^2/p spans e^(2 x log-ratio): at scale 4 its sums lose a digit and a half more.
LOOSE = {"chi2": 1e-4, "jeffreys": 2e-5}
BF16 = 2e-2


def laws(scale, seed=5):
    """Hidden states and output layers whose logits have this scale; the teacher is related."""
    torch.manual_seed(seed)
    hidden = torch.randn(T, H)
    weight = torch.randn(PADDED, H) * scale / H**0.5
    teacher_hidden = torch.cat([hidden + 0.5 * torch.randn(T, H), torch.randn(T, HT - H)], 1)
    extra = 0.3 * torch.randn(PADDED, HT - H) * scale / H**0.5
    teacher_weight = torch.cat([weight, extra], 1)
    labels = torch.randint(0, V, (T,))
    likely = (hidden @ weight.t())[:, :V].topk(3).indices
    labels[::3] = likely[::3, 1]  # a third of the labels lies in the supports
    weights = (torch.rand(T) < 0.8) * torch.rand(T) / T
    return hidden, weight, teacher_hidden, teacher_weight, labels, weights


def options(kind, support, variant, temperature):
    found = {"kind": kind, "support": support, "variant": variant, "temperature": temperature}
    if support != "full":
        found["k"] = K
    return found


def truth(case, student, teacher, labels):
    kwargs = dict(case)
    needs = case["variant"] == "sampled_tail" or case["kind"] == "pld"
    if case["variant"] == "soft":
        kwargs["variant"] = None
    if case["kind"] == "pld":
        kwargs["support"] = "full"
    return reference.divergence(
        student, teacher, vocab_size=V, labels=labels if needs else None, **kwargs
    )


def close(got, want, scale=None):
    """Norm-wise error; a value's norm is at least 1e-2 a token (fp32: 1e-7 of the log-probs)."""
    want = want.double()
    floor = want.numel() ** 0.5 * 1e-2 if scale is None else scale
    found = ((got.double() - want).norm() / want.norm().clamp_min(floor)).item()
    return found if found == found else float("inf")


def matrix_on_rank(scale, dtype=torch.float32):
    errors = {}
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = laws(scale)
    inputs = [x.to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight)]
    for (kind, support, variant), tau in itertools.product(CASES, (1.0, 1.3)):
        case = options(kind, support, variant, tau)
        full = [x.double() for x in inputs]
        full[0].requires_grad_(), full[1].requires_grad_()
        student, teacher = full[0] @ full[1].t(), (full[2] @ full[3].t()).detach()
        student.retain_grad()
        if dtype != torch.float32:  # the logits are rounded by definition; what follows is not
            student = student + (inputs[0] @ inputs[1].t() - student).detach()
            teacher = (inputs[2] @ inputs[3].t()).double()
        want = truth(case, student, teacher, labels)
        (want * weights.double()).sum().backward()
        needs = variant == "sampled_tail" or kind == "pld"
        extra = {"vocab_size": V, "group": group(), "chunk_size": CHUNK, **case}
        extra["labels"] = labels if needs else None
        if dtype == torch.float32:
            mine = shard(student.detach().float()).requires_grad_()
            got = vocab_parallel_divergence(mine, shard(teacher.float()), **extra)
            (got * weights).sum().backward()
            errors["logits", kind, support, variant, tau] = max(
                close(got.detach(), want.detach()), close(mine.grad, shard(student.grad), 1e-9)
            )
        for sp in (False, True):
            mine = [
                local_rows(inputs[0], sp).clone().requires_grad_(),
                shard(inputs[1]).requires_grad_(),
                local_rows(inputs[2], sp),
                shard(inputs[3]),
            ]
            out = fused_linear_divergence(
                *mine, token_weights=weights, sequence_parallel=sp, **extra
            )
            (1.7 * out.loss).backward()
            errors["fused", kind, support, variant, tau, sp] = max(
                close(out.per_token, want.detach()),
                close(mine[0].grad / 1.7, local_rows(full[0].grad, sp), 1e-9),
                close(mine[1].grad / 1.7, shard(full[1].grad), 1e-9),
            )
    return errors


def bound(case):
    return LOOSE.get(case[1], BOUND)


@pytest.mark.parametrize(
    ("scale", "world"), often(itertools.product([1.0, 4.0], [1, 2, 4]), [(4.0, 2)])
)
def test_gradient_matrix(ranks, world, scale):
    require(ranks.run(matrix_on_rank, world, scale, timeout=400), bound)


@pytest.mark.parametrize("world", often([1, 2], [1]))
def test_gradient_matrix_in_bf16(ranks, world):
    """bf16 rounds the logits' gradient to 8 bits, and the hidden gradient once more."""
    results = ranks.run(matrix_on_rank, world, 1.0, torch.bfloat16, timeout=400)
    require(results, lambda case: BF16)


def test_the_matrix_is_what_the_validator_accepts():
    listed = {
        (k, s): {v or "none" for v in names} for k, r in MATRIX.items() for s, names in r.items()
    }
    assert listed == {key: set(names) for key, names in VALID.items()}


def test_everything_else_is_refused():
    variants = (None, *VARIANTS, "soft", "hard", "none", "biased")
    supports = (*SUPPORTS, "topk")
    kinds = (*DIVERGENCES, "kl")
    refused = 0
    for kind, support, variant in itertools.product(kinds, supports, variants):
        known = MATRIX.get(kind, {}).get(support, ())
        k = None if support == "full" else K
        if variant in known or (variant is None and known):
            Divergence(kind=kind, support=support, variant=variant, k=k)
            continue
        with pytest.raises(UserError):
            Divergence(kind=kind, support=support, variant=variant, k=k)
        refused += 1
    assert refused > 500


def mixture_case(name, labels, per_token):
    """(terms, and the same in dense fp64 as a function of student and teacher logits)."""
    old, advantage = per_token["old_log_prob"], per_token["advantage"]

    def log_p(z):
        return -reference.cross_entropy(z, labels, 1.0, V)

    def pg(s, t):
        return sampled_loss(
            log_p(s), log_p(t), estimator="pg", old_log_prob=old.double(),
            advantage=advantage.double(),
        )  # fmt: skip

    def plain(estimator, **more):
        return lambda s, t: sampled_loss(log_p(s), log_p(t), estimator=estimator, **more)

    rkl = Divergence(kind="rkl")
    sg = Divergence(kind="rkl", support="student_topk", k=K, variant="sg")
    cases = {
        "rkl + pg + sft + entropy": (
            [rkl, Sampled(estimator="pg"), CrossEntropy(), Entropy()],
            [lambda s, t: reference.rkl(s, t, 1.0, V), pg,
             lambda s, t: -log_p(s), lambda s, t: reference.entropy(s, 1.0, V)],
        ),
        "sg + sft": (
            [sg, CrossEntropy()],
            [lambda s, t: truth(options("rkl", "student_topk", "sg", 1.0), s, t, labels),
             lambda s, t: -log_p(s)],
        ),
        "rkl at 1.3 + jsd + tail": (
            [Divergence(kind="rkl", temperature=1.3), Divergence(kind="jsd"),
             Divergence(kind="fkl", support="teacher_topk", k=K)],
            [lambda s, t: reference.rkl(s, t, 1.3, V),
             lambda s, t: truth(options("jsd", "full", None, 1.0), s, t, labels),
             lambda s, t: truth(options("fkl", "teacher_topk", "tail", 1.0), s, t, labels)],
        ),
        "hellinger + rkl + fkl + entropy": (
            [Divergence(kind="hellinger"), rkl, Divergence(kind="fkl"), Entropy()],
            [lambda s, t: truth(options("hellinger", "full", None, 1.0), s, t, labels),
             lambda s, t: reference.rkl(s, t, 1.0, V), lambda s, t: reference.fkl(s, t, 1.0, V),
             lambda s, t: reference.entropy(s, 1.0, V)],
        ),
        "k2": ([Sampled(estimator="k2")], [plain("k2")]),
        "two lists": (
            [sg, Divergence(kind="fkl", support="teacher_topk", k=4, variant="renorm")],
            [lambda s, t: truth(options("rkl", "student_topk", "sg", 1.0), s, t, labels),
             lambda s, t: reference.divergence(
                s, t, kind="fkl", support="teacher_topk", k=4, variant="renorm", vocab_size=V)],
        ),
    }  # fmt: skip
    return cases[name]


MIXTURES = (
    "rkl + pg + sft + entropy", "sg + sft", "rkl at 1.3 + jsd + tail",
    "hellinger + rkl + fkl + entropy", "k2", "two lists",
)  # fmt: skip


def mixtures_on_rank():
    errors = {}
    for scale, name, sp in itertools.product((1.0, 4.0), MIXTURES, (False, True)):
        hidden, weight, teacher_hidden, teacher_weight, labels, weights = laws(scale)
        per_token = {"old_log_prob": -3 - torch.rand(T), "advantage": torch.randn(T)}
        terms, dense = mixture_case(name, labels, per_token)
        full = [x.double() for x in (hidden, weight, teacher_hidden, teacher_weight)]
        full[0].requires_grad_(), full[1].requires_grad_()
        student, teacher = full[0] @ full[1].t(), (full[2] @ full[3].t()).detach()
        want = [f(student, teacher) for f in dense]
        scales = [weights * (0.3 + i) for i in range(len(terms))]
        sum((a * b.double()).sum() for a, b in zip(want, scales, strict=True)).backward()
        h = local_rows(hidden, sp).clone().requires_grad_()
        w = shard(weight).requires_grad_()
        uses = any(isinstance(t, Sampled) and t.estimator == "pg" for t in terms)
        out = fused_linear_objectives(
            h,
            w,
            OutputLayer(local_rows(teacher_hidden, sp), shard(teacher_weight)),
            {str(i): Objective(t, s) for i, (t, s) in enumerate(zip(terms, scales, strict=True))},
            labels=labels,
            inputs=per_token if uses else None,
            vocab_size=V,
            group=group(),
            chunk_size=CHUNK,
            sequence_parallel=sp,
        )
        out.loss.backward()
        errors[name, scale, sp] = max(
            *(close(got, x.detach()) for got, x in zip(out.terms.values(), want, strict=True)),
            close(h.grad, local_rows(full[0].grad, sp), 1e-9),
            close(w.grad, shard(full[1].grad), 1e-9),
        )
    return errors


@pytest.mark.parametrize("world", [1, 2, 4])
def test_several_objectives_in_one_pass(ranks, world):
    require(ranks.run(mixtures_on_rank, world), lambda case: BOUND)


def targets_on_rank():
    errors = {}
    torch.manual_seed(9)
    made = {
        "geometric": lambda b, t, y, tau: reference.geometric_target(b, t, 1.25),
        "tempered": lambda b, t, y, tau: reference.tempered_target(t, 0.6),
        "linear": lambda b, t, y, tau: reference.linear_target(b, t, 0.6, tau, V),
        "one_hot": lambda b, t, y, tau: reference.one_hot_target(y, t, 0.8, tau, V),
    }
    weight_of = {"geometric": 1.25, "tempered": 0.6, "linear": 0.6, "one_hot": 0.8}
    kinds = (("rkl", "full"), ("fkl", "full"), ("jsd", "full"), ("rkl", "student_topk"))
    for (name, law), (kind, support), tau in itertools.product(made.items(), kinds, (1.0, 1.3)):
        hidden, weight, teacher_hidden, teacher_weight, labels, weights = laws(2.0)
        base_weight = weight + 0.1 * torch.randn_like(weight)
        full = [x.double() for x in (hidden, weight)]
        full[0].requires_grad_(), full[1].requires_grad_()
        teacher = (teacher_hidden @ teacher_weight.t()).double()
        base = (hidden @ base_weight.t()).double()
        goal = law(base[:, :V], teacher[:, :V], labels, tau)
        case = options(kind, support, None if support == "full" else "tail", tau)
        want = reference.divergence((full[0] @ full[1].t())[:, :V], goal, **case)
        (want * weights.double()).sum().backward()
        h, w = hidden.clone().requires_grad_(), shard(weight).requires_grad_()
        target = Target(kind=name, weight=weight_of[name])
        uses_base = target.needs_base
        out = fused_linear_divergence(
            h, w, teacher_hidden, shard(teacher_weight), token_weights=weights, target=target,
            base=OutputLayer(hidden, shard(base_weight)) if uses_base else None,
            labels=labels, vocab_size=V, group=group(), chunk_size=CHUNK, **case,
        )  # fmt: skip
        out.loss.backward()
        errors[name, kind, support, tau] = max(
            close(out.per_token, want.detach()),
            close(h.grad, full[0].grad, 1e-9),
            close(w.grad, shard(full[1].grad), 1e-9),
        )
    return errors


@pytest.mark.parametrize("world", [1, 2, 4])
def test_targets(ranks, world):
    require(ranks.run(targets_on_rank, world), lambda case: BOUND)


def stats_on_rank():
    errors = {}
    names = ("mass_student", "mass_teacher", "bucket_kl", "overlap", "teacher_rank")
    cases = {"full": {"kind": "rkl"}, "list": {"kind": "rkl", "support": "student_topk"}}
    for (name, case), tau in itertools.product(cases.items(), (1.0, 1.3)):
        hidden, weight, teacher_hidden, teacher_weight, labels, weights = laws(2.0)
        student, teacher = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
        want = reference.diagnostics(
            student.double(), teacher.double(), k=K, labels=labels, vocab_size=V, temperature=tau
        )
        out = fused_linear_divergence(
            hidden, shard(weight), teacher_hidden, shard(teacher_weight), token_weights=weights,
            k=K, labels=labels, return_stats=True, vocab_size=V, group=group(), chunk_size=CHUNK,
            temperature=tau, **case,
        )  # fmt: skip
        assert set(names) < set(out.stats)
        for stat, value in out.stats.items():
            errors[name, stat, tau] = close(value, want[stat])
    return errors


@pytest.mark.parametrize("world", [1, 2, 4])
def test_statistics(ranks, world):
    require(ranks.run(stats_on_rank, world), lambda case: BOUND)
