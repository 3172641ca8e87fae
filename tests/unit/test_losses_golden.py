"""The dense truth itself: the golden table of METHODS 21, and the properties that define each loss.

GOLDEN and `check_golden` serve any implementation with reference.divergence's signature.
"""

import math

import pytest
import torch

from megaopd.losses import reference
from megaopd.losses.reference import TERMS, divergence

F64 = torch.float64
V, K, ROWS = 40, 6, 3
Z_S = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=F64)
Z_T = torch.tensor([[1.0, 2.0, 0.5, -2.0]], dtype=F64)
TOP2 = {"kind": "rkl", "support": "student_topk", "k": 2}
PLD = {"kind": "pld", "labels": torch.tensor([0])}
UNNORM = {**TOP2, "variant": "unnorm"}
RENORM = (0.462117, [0.393224, -0.393224, 0, 0])

# name: (arguments of divergence, value, gradient), student logits Z_S, teacher logits Z_T.
GOLDEN = {
    "rkl": ({"kind": "rkl"}, 0.431143, [0.389235, -0.330574, -0.078039, 0.019379]),
    "fkl": ({"kind": "fkl"}, 0.415104, [0.415322, -0.384496, -0.051504, 0.020678]),
    "jsd": ({"kind": "jsd"}, 0.101643, [0.093198, -0.082206, -0.015632, 0.004640]),
    "jsd .9": ({"kind": "jsd", "beta": 0.9}, 0.038062, [0.034254, -0.029308, -0.006651, 0.001705]),
    "skew_fkl": ({"kind": "skew_fkl"}, 0.329679, [0.314422, -0.284571, -0.045505, 0.015654]),
    "skew_rkl": ({"kind": "skew_rkl"}, 0.336724, [0.302661, -0.260905, -0.056824, 0.015069]),
    "tv": ({"kind": "tv"}, 0.436000, [0.208646, -0.160126, -0.058907, 0.010388]),
    "hellinger": ({"kind": "hellinger"}, 0.103662, [0.096753, -0.085666, -0.015905, 0.004817]),
    "unnorm": (UNNORM, 0.438410, [0.461312, -0.304058, -0.114961, -0.042292]),
    "sg": ({**TOP2, "variant": "sg"}, 0.438410, [0.384555, -0.332296, -0.038205, -0.014055]),
    "renorm": ({**TOP2, "variant": "renorm"}, *RENORM),
    "intersect": ({**TOP2, "variant": "intersect"}, *RENORM),
    "tail": (TOP2, 0.410993, [0.402210, -0.325801, -0.055859, -0.020549]),
    "kl_top": ({"kind": "kl_top", "k": 2}, 0.462117, [0.462117, -0.462117, 0, 0]),
    "pld": (PLD, 0.397335, [-0.081398, -0.153862, 0.134701, 0.100560]),
}


def gradient(student, teacher, implementation=divergence, **options):
    """(value, d value.sum() / d student)."""
    z = student.clone().requires_grad_()
    value = implementation(z, teacher, **options)
    (grad,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), grad


def check_golden(name, implementation, atol=1e-6):
    """Value and gradient of one row of the table, under any implementation."""
    options, value, grad = GOLDEN[name]
    got, got_grad = gradient(Z_S, Z_T, implementation, **options)
    close(got, torch.tensor([value], dtype=F64), atol)
    close(got_grad, torch.tensor([grad], dtype=F64), atol)


def close(got, want, atol=1e-11):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def truncations(kinds, variants=("unnorm", "renorm", "tail"), **more):
    return [
        {"kind": kind, "support": support, "k": K, "variant": variant, **more}
        for kind in kinds
        for support in ("student_topk", "teacher_topk", "intersection")
        for variant in variants
    ]


LABELS = torch.tensor([0, 11, 33])
PLAIN = [{"kind": kind} for kind in TERMS]
OTHERS = [
    {"kind": "jsd", "beta": 0.9},
    {"kind": "alpha", "alpha": 0.7},
    {"kind": "rkl", "support": "student_topk", "k": K, "variant": "intersect"},
    {"kind": "kl_top", "k": K},
    {"kind": "kl_top"},
    {"kind": "pld"},
    {"kind": "pld", "k": K, "labels": LABELS},
]
GRADIENT_OF_VALUE = PLAIN + truncations(TERMS) + OTHERS
GATED = [{"kind": "bdkd"}, {"kind": "bdkd", "variant": "hard"}]
STOPPED = truncations(["rkl"], ("sg", "sampled_tail"), labels=LABELS)
EVERY = GRADIENT_OF_VALUE + GATED + STOPPED


def case_name(options):
    return "-".join(str(v) for v in options.values() if not isinstance(v, torch.Tensor))


every = pytest.mark.parametrize("options", EVERY, ids=case_name)


def random_logits(rows=ROWS, scale=1.5):
    """A student, and a teacher that agrees with it in part: their top-k lists meet."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(rows, V, generator=generator, dtype=F64) for _ in range(2)]
    return scale * noise[0], scale * (noise[0] + noise[1]) / math.sqrt(2)


@pytest.fixture
def logits():
    return random_logits()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    check_golden(name, divergence)


# METHODS 5 and 7: D = sum_v p f(r), r = q/p.
GENERATORS = {
    "rkl": lambda r: -r.log(),
    "fkl": lambda r: r * r.log(),
    "softened_rkl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "hellinger": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "tv": lambda r: (r - 1).abs() / 2,
    "chi2": lambda r: (r - 1) ** 2,
    "alpha": lambda r: (r**0.2 - 0.8 - 0.2 * r) / (0.2 * -0.8),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_generator_and_its_gradient(kind, logits):
    """dD/dz = p (w - sum p w), w = f(r) - r f'(r)."""
    p, q = (z.softmax(-1) for z in logits)
    r = (q / p).requires_grad_()
    f = GENERATORS[kind](r)
    weight = (f - r * torch.autograd.grad(f.sum(), r)[0]).detach()
    value, grad = gradient(*logits, kind=kind)
    close(value, (p * f.detach()).sum(-1))
    close(grad, p * (weight - (p * weight).sum(-1, keepdim=True)))


def test_jsd_limits_and_alpha_limits(logits):
    for beta, kind in ((0, "fkl"), (1, "rkl")):
        close(divergence(*logits, kind="jsd", beta=beta), divergence(*logits, kind=kind))
    for alpha, kind in ((1e-6, "rkl"), (1 - 1e-6, "fkl")):
        close(divergence(*logits, kind="alpha", alpha=alpha), divergence(*logits, kind=kind), 1e-4)


@every
def test_gradient_sums_to_zero(options, logits):
    value, grad = gradient(*logits, **options)
    assert value.shape == (ROWS,)
    assert grad.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("options", GRADIENT_OF_VALUE, ids=case_name)
def test_finite_differences(options, logits):
    student, teacher = logits
    options = {"temperature": 1.3, "vocab_size": 37, **options}
    _, grad = gradient(student, teacher, **options)
    step = 1e-5
    steps = step * torch.eye(V, dtype=F64)[:, None]  # [V, 1, V]: one perturbed copy an id
    teacher = teacher.expand(V, ROWS, V)
    if "labels" in options:
        options["labels"] = options["labels"].expand(V, ROWS)
    up, down = (divergence(student + s, teacher, **options) for s in (steps, -steps))
    close(grad, ((up - down) / (2 * step)).t(), 1e-8)
    assert grad[:, 37:].abs().max() == 0


@every
def test_shifts_and_padding_change_nothing(options, logits):
    student, teacher = logits
    value, grad = gradient(student, teacher, **options)
    shift = torch.linspace(-20, 20, ROWS, dtype=F64)[:, None]
    close(gradient(student + shift, teacher - 3, **options), (value, grad))
    for fill, vocab_size in ((50.0, V), (-torch.inf, None)):
        padded = [torch.nn.functional.pad(z, (0, 5), value=fill) for z in logits]
        got, got_grad = gradient(*padded, vocab_size=vocab_size, **options)
        close(got, value)
        close(got_grad[:, :V], grad)
        assert got_grad[:, V:].abs().max() == 0


@every
def test_excluded_and_improbable_ids_stay_finite(options, logits):
    student, teacher = logits
    student[:, 5], teacher[:, 5] = 6.0, -torch.inf  # q = 0 at the student's favourite
    student[:, 7], teacher[:, 7] = -60.0, 5.0  # p ~ 0 at the teacher's
    student[:, 8] = teacher[:, 8] = -torch.inf
    student[:, 9] = -torch.inf
    value, grad = gradient(student, teacher, **options)
    assert value.isfinite().all() and grad.isfinite().all()
    assert grad.sum(-1).abs().max() <= 1e-12 * grad.abs().max()
    if options == {"kind": "fkl"}:  # p - q there too
        close(grad, student.softmax(-1) - teacher.softmax(-1))


@pytest.mark.parametrize("options", EVERY[:5] + OTHERS[:4] + GATED, ids=case_name)
def test_temperature(options, logits):
    tau = 1.7
    value, grad = gradient(*logits, temperature=tau, **options)
    want, want_grad = gradient(*(z / tau for z in logits), **options)
    close(value, want * tau**2)
    close(grad, want_grad * tau)


@pytest.mark.parametrize("kind", [*TERMS, "bdkd"])
def test_values_are_not_negative_and_buckets_lose(kind, logits):
    full = divergence(*logits, kind=kind)
    assert (full > 0).all()
    close(divergence(logits[0], logits[0], kind=kind), torch.zeros(ROWS, dtype=F64))
    for options in truncations([kind] if kind in TERMS else []):
        value = divergence(*logits, **options)
        assert options["variant"] == "unnorm" or (value > -1e-15).all()
        assert options["variant"] != "tail" or (value <= full).all()


@pytest.mark.parametrize("kind", TERMS)
def test_variants_are_the_full_divergence_of_other_laws(kind, logits):
    """renorm: of the logits on S. tail: of the K+1 bucket logits."""
    ids = reference.topk_ids(logits[1], K)
    on_s = [z.gather(-1, ids) for z in logits]
    rest = [z.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) for z in logits]
    buckets = [torch.cat(pair, dim=-1) for pair in zip(on_s, rest, strict=True)]
    for variant, laws in (("renorm", on_s), ("tail", buckets)):
        options = {"support": "teacher_topk", "k": K, "variant": variant}
        close(divergence(*logits, kind=kind, **options), divergence(*laws, kind=kind))


def test_tail_of_no_mass_is_dropped(logits):
    student, teacher = logits
    whole = divergence(student, teacher, kind="jsd", support="student_topk", k=V + 1)
    close(whole, divergence(student, teacher, kind="jsd"))
    student[:, 5] = teacher[:, 5] = 60.0
    value, grad = gradient(student, teacher, kind="rkl", support="student_topk", k=1)
    assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12


def test_empty_intersection_is_zero(logits):
    for options in truncations(TERMS) + STOPPED:
        if options["support"] == "intersection" and options["variant"] != "sampled_tail":
            value, grad = gradient(logits[0], -logits[0], **options)
            limit = 1e-15 if options["variant"] == "tail" else 0
            assert value.abs().max() <= limit and grad.abs().max() <= limit


def test_stop_gradient_and_sampled_tail(logits):
    x, y = (z.log_softmax(-1) for z in logits)
    p, rho = x.exp(), x - y
    mask = reference.topk_mask(logits[0], K)
    c = (p * rho * mask).sum(-1)
    options = {"kind": "rkl", "support": "student_topk", "k": K}
    value, grad = gradient(*logits, variant="sg", **options)
    close(value, c)
    close(grad, p * (mask * rho - c[:, None]))
    mean = torch.zeros_like(p)
    for token in range(V):  # exact expectation over the sampled token
        labels = torch.full((ROWS,), token)
        value, grad = gradient(*logits, variant="sampled_tail", labels=labels, **options)
        close(value, c + torch.where(mask[:, token], 0.0, rho[:, token]))
        mean += p[:, token, None] * grad
    close(mean, gradient(*logits, kind="rkl")[1])


@pytest.mark.parametrize("variant", [None, "hard"])
def test_bdkd_weights(variant, logits):
    gap = reference.entropy(logits[1]) - reference.entropy(logits[0])
    assert (gap > 0).any() and (gap < 0).any()
    hard = variant == "hard"
    options = {"alpha": 3.0} if hard else {"beta": 0.5}
    forward = 1 + 2.0 * (gap > 0) if hard else 2 * torch.sigmoid(gap / 0.5)
    reverse = (4.0 if hard else 2.0) - forward
    value, grad = gradient(*logits, kind="bdkd", variant=variant, **options)
    parts = [gradient(*logits, kind=kind) for kind in ("fkl", "rkl")]
    close(value, forward * parts[0][0] + reverse * parts[1][0])
    close(grad, forward[:, None] * parts[0][1] + reverse[:, None] * parts[1][1])


def test_pld_in_its_limits(logits):
    student, teacher = logits
    certain = 100.0 * torch.nn.functional.one_hot(LABELS, V).to(F64)
    value = divergence(student, certain, kind="pld", labels=LABELS)
    close(value, reference.cross_entropy(student, LABELS))
    order = reference.topk_ids(teacher, V)
    p, x = student.softmax(-1).gather(-1, order), student.log_softmax(-1).gather(-1, order)
    taken = p.cumsum(-1) - p  # the mass of the ranks above
    weight = (teacher / 2).softmax(-1).gather(-1, order)
    want = (weight * ((1 - taken).log() - x))[:, :K].sum(-1)
    close(divergence(student, teacher, kind="pld", k=K, temperature=2.0), want)
    options = {"k": K, "temperature": 2.0, "labels": order[:, 0]}  # the teacher's own favourite
    close(divergence(student, teacher, kind="pld", **options), want)


def test_ties_go_to_the_lower_id():
    assert reference.topk_ids(torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0]), 4).tolist() == [1, 3, 4, 0]
    assert reference.topk_ids(torch.zeros(1, 500), 3).tolist() == [[0, 1, 2]]


def descend(student, teacher, steps, rate, **options):
    z = student
    for _ in range(steps):
        z = z - rate * gradient(z, teacher, **options)[1]
    return z


@pytest.mark.parametrize("variant", ["unnorm", "sg", "tail", "renorm"])
def test_fixed_points_on_a_fixed_support(variant):
    student, teacher = random_logits(scale=0.7)
    options = {"kind": "rkl", "support": "teacher_topk", "k": K, "variant": variant}
    end = descend(student, teacher, 2500, 4.0, **options)
    mask = reference.topk_mask(teacher, K)
    p, q = end.softmax(-1), teacher.softmax(-1)
    mass, teacher_mass = (p * mask).sum(-1), (q * mask).sum(-1)
    ratio = (p / q)[mask].view(ROWS, K)
    if variant == "renorm":  # the mass is free: it stays where it was
        assert (mass - teacher_mass).abs().min() > 0.01
        ratio, teacher_mass = ratio / ratio[:, :1], mass
    scale = 1 / math.e if variant == "unnorm" else 1.0
    close(ratio, torch.full_like(ratio, scale), 1e-6)
    close(mass, scale * teacher_mass, 1e-6)


def test_unnorm_lowers_its_value_and_loses_its_mass():
    """METHODS 1.2: the collapse, with the student's own top-k re-selected at every step."""
    student, teacher = random_logits(rows=5)
    options = {"kind": "rkl", "support": "student_topk", "k": K}

    def state(z):
        mass = (z.softmax(-1) * reference.topk_mask(z, K)).sum(-1)
        value = divergence(z, teacher, variant="unnorm", **options)
        return value, mass, divergence(z, teacher, kind="rkl")

    value, mass, kl = state(student)
    biased, fixed = (
        state(descend(student, teacher, 400, 2.0, variant=variant, **options))
        for variant in ("unnorm", "sg")
    )
    assert (biased[0] < value).all() and (biased[1] < mass - 0.15).all()
    assert (fixed[2] < kl).all() and (fixed[2] < biased[2]).all() and (fixed[1] > biased[1]).all()


def test_targets(logits):
    (a, b), tau, weight = logits, 1.3, 0.7
    law_a, law_b = ((z / tau).softmax(-1) for z in (a, b))

    def same(target, law):
        close((target / tau).softmax(-1), law)

    same(reference.linear_target(a, b, weight, tau), 0.3 * law_a + 0.7 * law_b)
    one_hot = torch.nn.functional.one_hot(LABELS, V).to(F64)
    same(reference.one_hot_target(LABELS, b, weight, tau), 0.3 * one_hot + 0.7 * law_b)
    same(reference.one_hot_target(LABELS, b, 0.0, tau), one_hot)
    for w in (weight, 1.25):
        powers = law_a ** (1 - w) * law_b**w
        same(reference.geometric_target(a, b, w), powers / powers.sum(-1, keepdim=True))
    same(reference.tempered_target(b, tau), b.softmax(-1))
    same(reference.tempered_target(b, 0.0), torch.full_like(b, 1 / V))
    assert reference.linear_target(a, b, weight, tau, vocab_size=37).shape == (ROWS, 37)


def test_targets_with_excluded_ids(logits):
    a, b = logits
    a[:, 3] = b[:, 4] = -torch.inf
    for w, excluded in ((0.5, [3, 4]), (1.25, [3, 4]), (1.0, [4]), (0.0, [3])):
        law = reference.geometric_target(a, b, w).softmax(-1)
        assert law.isfinite().all() and (law[0] == 0).nonzero().flatten().tolist() == excluded
    assert (reference.tempered_target(b, 0.0).softmax(-1)[:, 4] == 0).all()
    assert (reference.linear_target(a, b, 0.5).softmax(-1) > 0).all()


def test_diagnostics():
    labels = torch.tensor([0, 2])
    student, teacher = Z_S.expand(2, 4), Z_T.expand(2, 4)
    got = reference.diagnostics(student, teacher, k=2, labels=labels)
    want = {
        "mass_student": [0.880797] * 2,
        "mass_teacher": [0.849971] * 2,
        "bucket_kl": [0.410993] * 2,
        "teacher_rank": [1, 2],
        "kl_rkl": [0.431143] * 2,
        "log_ratio": [1.035625, -0.464375],
    }
    for name, values in want.items():
        assert got[name].tolist() == pytest.approx(values, abs=2e-6), name
    for name, z in (("student", student), ("teacher", teacher)):
        close(got[f"{name}_entropy"], reference.entropy(z))
        close(got[f"{name}_log_prob"], -reference.cross_entropy(z, labels))
    far = reference.diagnostics(-4 * Z_T, Z_T, k=1, labels=torch.tensor([1]))
    assert [far["teacher_prefers"].item(), far["overlap"].item()] == [1.0, 0.0]
    assert got["teacher_prefers"].tolist() == [0.0, 0.0] and got["overlap"].tolist() == [1.0, 1.0]


def test_what_does_not_exist_is_refused():
    for options in (
        {"kind": "kl"},
        {"kind": "rkl", "support": "topk", "k": 2},
        {"kind": "rkl", "support": "student_topk"},
        {"kind": "rkl", "variant": "tail"},
        {"kind": "fkl", "support": "student_topk", "k": 2, "variant": "sg"},
        {"kind": "bdkd", "support": "student_topk", "k": 2},
    ):
        with pytest.raises(ValueError, match="expected"):
            divergence(Z_S, Z_T, **options)
