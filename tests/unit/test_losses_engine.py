"""The production paths on one process: METHODS 21's golden rows and property tests.

Logits are given, or are hidden states behind the identity as output layer. fp64 unless said.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaopd import losses
from megaopd.errors import UserError
from megaopd.losses import Objective, OutputLayer, reference
from megaopd.losses import fused_linear_objectives as fused_loss
from megaopd.losses import vocab_parallel_divergence as sharded
from megaopd.losses.blocks import BLOCK_ELEMENTS
from megaopd.losses.kernels import native
from megaopd.losses.terms import VALID, CrossEntropy, Divergence, Entropy, Sampled
from tests.unit.test_losses_golden import GOLDEN, Z_S, Z_T, check_golden, close, gradient

F32, F64 = torch.float32, torch.float64
V, K, ROWS = 40, 6, 10
LABELS = torch.tensor([0, 5, 7, 33, 36, 1, 2, 3, 4, 11])


def options_of(kind, support, variant, k=K):
    found = {"kind": kind, "support": support, "variant": None if variant == "none" else variant}
    return found if support == "full" else {**found, "k": k}


CASES = [options_of(*key, variant) for key, names in VALID.items() for variant in names]
CASES.append(options_of("fkl", "teacher_topk", "renorm", 2))  # a gradient on the list alone
STOPPED = ("sg", "sampled_tail", "soft", "hard")  # the gradient is not that of the value

# fmt: off
POOL = {
    "rkl": Divergence(kind="rkl"), "fkl": Divergence(kind="fkl"), "jsd": Divergence(kind="jsd"),
    "hot": Divergence(kind="rkl", temperature=1.7), "bdkd": Divergence(kind="bdkd"),
    "tail": Divergence(kind="rkl", support="student_topk", k=K),
    "sampled_tail": Divergence(kind="rkl", support="student_topk", k=K, variant="sampled_tail"),
    "renorm": Divergence(kind="fkl", support="teacher_topk", k=4, variant="renorm"),
    "both": Divergence(kind="jsd", support="intersection", k=K, variant="intersect"),
    "pld": Divergence(kind="pld", k=5), "sft": CrossEntropy(), "entropy": Entropy(),
    "k2": Sampled(estimator="k2"), "vopd": Sampled(estimator="vopd", baseline="optimal"),
    "vopd_topk": Sampled(estimator="vopd", baseline="topk", k=K),
}
# fmt: on


@pytest.fixture(params=["torch", "native"])
def backend(request, monkeypatch):
    """Of fp32: blocks.py, and the compiled kernels where they exist."""
    if request.param == "torch":
        monkeypatch.setenv("MEGAOPD_NO_NATIVE", "1")
    elif native(torch.empty(1)) is None:
        pytest.skip("no compiled kernels here")
    return request.param


def name_of(case):
    return "-".join(map(str, case.values()))


every = pytest.mark.parametrize("case", CASES, ids=name_of)


def logits(rows=ROWS, width=V, scale=1.5, seed=0):
    """A student, and a teacher that agrees with it in part."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, width, generator=g, dtype=F64) for _ in range(2))
    return scale * a, scale * (a + b) / math.sqrt(2)


def with_labels(case, labels=LABELS):
    needed = case["kind"] == "pld" or case["variant"] == "sampled_tail"
    return {**case, "labels": labels} if needed else case


def behind_a_head(student, teacher, **options):
    """Values [T] whose sum has the gradient of the fused loss with weights 1."""
    eye, ones = torch.eye(student.shape[1], dtype=student.dtype), torch.ones(len(student))
    out = losses.fused_linear_divergence(student, eye, teacher, eye, token_weights=ones, **options)
    return out.per_token + (out.loss - out.loss.detach()) / len(student)


PATHS = (sharded, behind_a_head)


def truth(student, teacher, **case):
    case.pop("chunk_size", None)
    case["variant"] = None if case["variant"] == "soft" else case["variant"]
    case["support"] = "full" if case["kind"] == "pld" else case["support"]
    return reference.divergence(student, teacher, **case)


def fused(student, teacher, terms, weights=None, **more):
    """(FusedLoss, d loss / d logits) behind the identity; terms, weights: one, or many by name."""
    eye = torch.eye(student.shape[1], dtype=student.dtype)
    terms = terms if isinstance(terms, dict) else {"a": terms}
    weights = torch.ones(len(student), dtype=F64) if weights is None else weights
    weights = weights if isinstance(weights, dict) else dict.fromkeys(terms, weights)
    z = student.clone().requires_grad_()
    objectives = {name: Objective(term, weights[name]) for name, term in terms.items()}
    out = fused_loss(z, eye, OutputLayer(teacher, eye), objectives, **more)
    return out, torch.autograd.grad(out.loss, z)[0]


def near(got, want, bound):
    """Norm-wise, of values and gradients; NaN is not near."""
    for one, other in zip(got, want, strict=True):
        error = (one.double() - other).norm() / other.norm().clamp_min(1e-2)
        assert error < bound, error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_divergences(name, path):
    # The reference has the variant intersect on every top-k support.
    more = {"support": "intersection"} if name == "intersect" else {}
    check_golden(name, lambda s, t, **options: path(s, t, **{**options, **more}))


L, LOG_P = 1.035625, math.log(0.643914)
SCORE = torch.tensor([[0.356086, -0.236883, -0.087144, -0.032059]], dtype=F64)  # e_y - p
K2 = [0.368771, -0.245322, -0.090249, -0.033201]
# The table's value of PG and vOPD is -A log p; ours is -rho A with rho = 1.
SAMPLED = {
    "k2": ({}, 0.536260, K2),
    "k3": ({}, 0.390630, [0.229674, -0.152788, -0.056208, -0.020678]),
    "k3pp": ({}, 0.390630, K2),
    "pg": ({}, -0.455872 / LOG_P, K2),
    "vopd": ({"baseline": "value"}, -0.266087 / LOG_P, [0.215247, -0.143191, -0.052677, -0.019379]),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_golden_sampled_rows(name):
    options, value, grad = SAMPLED[name]
    out, dz = fused(Z_S, Z_T, Sampled(estimator=name, **options), labels=torch.tensor([0]))
    scale = abs(1 / LOG_P) if name in ("pg", "vopd") else 1.0  # the table's digits, divided
    close(out.per_token, torch.tensor([value], dtype=F64), 1e-6 * scale)
    close(dz, torch.tensor([grad], dtype=F64), 1e-6)


def test_golden_log_ratio():  # k1 differentiated trains nothing: it is taken as a reward
    one = {"labels": torch.tensor([0])}
    out, dz = fused(Z_S, Z_T, Sampled(estimator="k1_reward"), **one)
    close(out.per_token, torch.tensor([L], dtype=F64), 1e-6)
    close(dz, L * SCORE, 1e-6)
    close(-fused(Z_S, Z_T, CrossEntropy(), **one)[1], SCORE, 1e-6)
    with pytest.raises(UserError, match="trains nothing"):
        fused(Z_S, Z_T, Sampled(estimator="k1"), **one)


@every
def test_gradient_sums_to_zero_and_ignores_shifts(case):
    student, teacher = logits()
    case = with_labels(case)
    shift = torch.linspace(-20, 20, ROWS, dtype=F64)[:, None]
    for path in PATHS:
        value, grad = gradient(student, teacher, path, **case)
        assert grad.sum(1).abs().max() < 1e-12
        for a, b in ((shift, 0), (0, shift.flip(0)), (shift, -3)):
            close(gradient(student + a, teacher + b, path, **case), (value, grad))


@every
def test_chunks_and_blocks_change_nothing(case, monkeypatch):
    case = with_labels(case)
    want = [gradient(*logits(), path, **case) for path in PATHS]
    for block, size in ((1 << 17, 1), (1 << 17, 3), (1, 7), (3 * V, 64)):
        monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", block)  # 1: a block for each row
        for path, expected in zip(PATHS, want, strict=True):
            close(gradient(*logits(), path, chunk_size=size, **case), expected, 1e-12)


@every
def test_padded_ids_change_nothing(case):
    student, teacher = logits(width=37)
    case = with_labels(case)
    for path in PATHS:
        value, grad = gradient(student, teacher, path, **case)
        for fill in (1e4, -1e4, 1e300):
            ends = [torch.nn.functional.pad(z, (0, 5), value=fill) for z in (student, teacher)]
            ends[1][:, 37:] *= -1
            got, got_grad = gradient(*ends, path, vocab_size=37, **case)
            close((got, got_grad[:, :37]), (value, grad), 1e-12)
            assert got_grad[:, 37:].abs().max() == 0


@pytest.mark.parametrize("loss_agg", losses.LOSS_AGG)
def test_microbatches_add_up_to_the_step(loss_agg):
    """Weights are decided for the whole step; a split of it then changes nothing."""
    samples, length = 5, 6
    g = torch.Generator().manual_seed(2)
    mask = (torch.rand(samples, length, generator=g) < 0.6).long()
    mask[1], mask[2] = 0, 1  # uneven: an empty sample and a full one
    extra = {"max_length": length} if loss_agg.endswith("norm") else {}
    weights = losses.loss_weights(mask, loss_agg=loss_agg, **extra).double()
    student, teacher = logits(samples * length)
    labels = torch.randint(0, V, (samples * length,), generator=g)
    terms = {name: POOL[name] for name in ("tail", "jsd", "k2")}

    def run(a, b):
        rows = slice(a * length, b * length)
        some = weights[a:b].flatten()
        return fused(student[rows], teacher[rows], terms, some, labels=labels[rows])

    whole, dz = run(0, samples)
    parts = [run(a, b) for a, b in ((0, 1), (1, 2), (2, 5))]
    close(sum(out.loss for out, _ in parts).detach(), whole.loss.detach(), 1e-12)
    close(torch.cat([grad for _, grad in parts]), dz, 1e-12)
    if loss_agg == "token-mean":
        mean = (whole.per_token.view_as(mask) * mask).sum() / mask.sum()
        close(whole.loss.detach(), mean, 1e-6)  # the weights are rounded to fp32


@pytest.mark.parametrize("scale", [0.1, 1.5, 5.0])
def test_values_are_not_negative_and_buckets_lose(scale):
    student, teacher = logits(60, scale=scale)
    labels = torch.arange(60) % V
    full = {}
    for case in CASES:
        if case["variant"] in ("unnorm", "sg", "sampled_tail"):
            continue
        value = sharded(student, teacher, **with_labels(case, labels))
        assert (value >= -1e-12).all(), case
        if case["support"] == "full":
            full[case["kind"]] = value
        elif case["variant"] == "tail" and case["kind"] != "kl_top":
            assert (value <= full[case["kind"]] * (1 + 1e-9) + 1e-12).all(), case
        if case["kind"] != "pld":
            same, grad = gradient(student[:9], student[:9], sharded, **case)
            assert same.abs().max() < 1e-12 and grad.abs().max() < 1e-12, case
    _, stats = sharded(student, teacher, kind="rkl", k=K, return_stats=True)
    assert (stats["bucket_kl"] <= full["rkl"] + 1e-12).all()


@pytest.mark.parametrize("dtype", [F32, F64])
@every
def test_excluded_and_improbable_ids_stay_finite(case, dtype, backend):
    student, teacher = logits()
    student[:, 7], teacher[:, 7] = -40.0, 5.0  # p ~ 0 at the teacher's favourite
    case = with_labels(case)
    want = gradient(student, teacher, truth, **case)
    got = gradient(student.to(dtype), teacher.to(dtype), sharded, **case)
    near(got, want, 1e-9 if dtype == F64 else 1e-4)
    student[:, 7] = -80.0
    student[:, 5], teacher[:, 5] = 6.0, -torch.inf  # q = 0 at the student's favourite
    student[:, 8:10] = teacher[:, 8] = -torch.inf
    value, grad = gradient(student.to(dtype), teacher.to(dtype), sharded, **case)
    assert value.isfinite().all() and grad.isfinite().all()
    assert grad.sum(1).abs().max() <= (1e-11 if dtype == F64 else 1e-4) * grad.abs().max()


NARROW = [options_of(kind, "student_topk", "tail") for kind in ("fkl", "jeffreys", "chi2")]
NARROW.append(options_of("pld", "teacher_topk", None, 12))


@pytest.mark.parametrize("gap", [15.0, 25.0, 40.0])
@pytest.mark.parametrize("case", NARROW, ids=name_of)
def test_little_mass_outside_the_list_keeps_the_digits(case, gap, backend):
    """A confident student: p of the tail ~ e^-gap while the teacher has more there."""
    student, teacher = ((z * 64).round() / 64 for z in logits(scale=1.0))
    student[:, :K] += gap
    teacher[:, :K] += 4.0
    want = gradient(student, teacher, truth, **case)
    for dtype, bound in ((F32, 1e-4), (F64, 1e-9)):
        near(gradient(student.to(dtype), teacher.to(dtype), sharded, **case), want, bound)


def test_a_masked_batch_is_zero_and_keeps_the_graph(backend):
    g = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 5, generator=g).requires_grad_() for n in (ROWS, V))
    bias = torch.zeros(V, requires_grad=True)
    teacher = OutputLayer(torch.randn(ROWS, 5), torch.randn(V, 5))
    weights = losses.loss_weights(torch.zeros(2, 5)).flatten()
    labels = torch.full((ROWS,), -100)
    for term in [*(Divergence(**case) for case in CASES), *POOL.values()]:
        objective = {"a": Objective(term, weights)}
        out = fused_loss(hidden, weight, teacher, objective, labels=labels, bias=bias)
        assert out.loss.item() == 0 and out.loss.requires_grad
        for grad in torch.autograd.grad(out.loss, [hidden, weight, bias]):
            assert (grad == 0).all(), term


@pytest.mark.parametrize("case", [c for c in CASES if c["variant"] not in STOPPED], ids=name_of)
def test_finite_differences(case):
    rows, step = 3, 1e-5
    student, teacher = logits(rows)
    case = {"temperature": 1.3, "vocab_size": 37, **case}
    _, grad = gradient(student, teacher, sharded, **case)
    steps = step * torch.eye(V, dtype=F64)[:, None]  # [V, 1, V]: one perturbed copy an id
    up, down = (
        sharded((student + s).flatten(0, 1), teacher.repeat(V, 1), **case).view(V, rows)
        for s in (steps, -steps)
    )
    close(grad, ((up - down) / (2 * step)).t(), 1e-8)


@every
def test_offsets_in_fp32(case, backend, monkeypatch):
    """Logits in steps of 1/64, which fp32 holds at any of these shifts exactly."""
    student, teacher = ((z * 64).round() / 64 for z in logits())
    case = with_labels(case)
    want = gradient(student, teacher, truth, **case)
    bound = 2e-4 if case["kind"] == "bdkd" else 1e-5  # its gate: entropies, sums of p times s
    mixed = torch.tensor([0, 500, -500, 60, -60, 33, -33, 88, -104, 2000], dtype=F64)[:, None]
    for block in (3 * V, 1 << 17) if backend == "torch" else (1 << 17,):
        monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", block)
        for shift in (0, 500, -500, 60, -60, 33, mixed):
            laws = [(z + shift).float() for z in (student, teacher)]
            for path in PATHS:
                near(gradient(*laws, path, **case), want, bound)
    # Not common to both models: s - t has that many digits less.
    laws = student.float(), (teacher + mixed.flip(0) / 8).float()
    near(gradient(*laws, sharded, **case), want, 3e-4)


@st.composite
def problems(draw):
    case = dict(draw(st.sampled_from(CASES)))
    rows, width = draw(st.integers(1, 9)), draw(st.integers(2, 40))
    if "k" in case:
        case["k"] = draw(st.integers(1, width + 3))
    scale, seed = draw(st.sampled_from([0.5, 2.0, 4.0])), draw(st.integers(0, 1 << 20))
    laws = logits(rows, width, scale, seed)
    if draw(st.booleans()) and case["kind"] not in ("tv", "bdkd"):  # ties; not where p = q jumps
        laws = [z.round() for z in laws]
    padding = torch.full((rows, draw(st.integers(0, 5))), 99.0, dtype=F64)
    g = torch.Generator().manual_seed(seed)
    case = with_labels(case, torch.randint(0, width, (rows,), generator=g))
    case |= {"temperature": draw(st.floats(0.5, 2.0)), "vocab_size": width}
    return [torch.cat([z, padding], 1) for z in laws], case, draw(st.integers(1, 9))


@given(problems())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_random_problems_equal_the_reference(problem):
    laws, case, chunk = problem
    want = gradient(*laws, truth, **case)
    for path in PATHS:
        got = gradient(*laws, path, chunk_size=chunk, **case)
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_objectives_in_one_pass_equal_separate_passes(seed):
    g = torch.Generator().manual_seed(seed)
    names = [list(POOL)[i] for i in torch.randperm(len(POOL), generator=g)[: 2 + seed % 5]]
    student, teacher = logits(seed=seed)
    weights = {n: torch.randn(ROWS, generator=g, dtype=F64) for n in names}
    more = {"labels": LABELS, "chunk_size": 4}
    alone = {n: fused(student, teacher, POOL[n], weights[n], **more) for n in names}
    terms = {n: POOL[n] for n in names}
    for stats in ({}, {"return_stats": True}, {"return_stats": True, "stats_k": 3}):
        out, dz = fused(student, teacher, terms, weights, **more, **stats)
        close(out.terms, {n: x.per_token for n, (x, _) in alone.items()})
        close(out.loss.detach(), sum(x.loss for x, _ in alone.values()).detach(), 1e-10)
        close(dz, sum(grad for _, grad in alone.values()))


def test_sampled_terms_share_a_pass_whatever_each_of_them_takes():
    """KDRL: GRPO's surrogate and k2. ppo takes an advantage and no teacher, k2 no advantage."""
    student, teacher = logits()
    inputs = {"advantage": torch.ones(ROWS), "old_log_prob": torch.full((ROWS,), -3.0)}
    terms = {"rl": Sampled(estimator="ppo"), "kd": Sampled(estimator="k2")}
    out, _ = fused(student, teacher, terms, labels=LABELS, inputs=inputs)
    assert out.loss.isfinite()


@pytest.mark.parametrize(("softcap", "teachers"), [(None, None), (3.0, "student's"), (3.0, 2.0)])
@every
def test_bias_and_softcap(case, softcap, teachers):
    g = torch.Generator().manual_seed(4)
    shapes = ((ROWS, 5), (V, 5), (V,), (ROWS, 6), (V, 6), (V,))
    parts = [torch.randn(*shape, generator=g, dtype=F64) for shape in shapes]
    own = [x.requires_grad_() for x in parts[:3]]
    weights = torch.rand(ROWS, generator=g, dtype=F64)

    def law(hidden, weight, bias, cap=softcap):
        z = hidden @ weight.t() + bias
        return z if cap is None else cap * torch.tanh(z / cap)

    case = {**with_labels(case), "temperature": 1.3, "vocab_size": 37}
    cap = softcap if teachers == "student's" else teachers
    want = truth(law(*own), law(*parts[3:], cap), **case)
    grads = torch.autograd.grad((want * weights).sum(), own)
    more = {"labels": case.pop("labels", None), "vocab_size": case.pop("vocab_size")}
    objective = {"a": Objective(Divergence(**case), weights)}
    more |= {"bias": own[2], "softcap": softcap, "chunk_size": 4}
    out = fused_loss(*own[:2], OutputLayer(*parts[3:], softcap=teachers), objective, **more)
    got = torch.autograd.grad(2 * out.loss, own)
    near((out.per_token, *got), (want.detach(), *(2 * x for x in grads)), 1e-12)
