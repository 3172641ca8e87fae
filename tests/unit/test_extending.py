"""docs/extending.md: its files parse, its losses have the gradients that it says, its hooks run."""

import os
import shlex
import subprocess
import sys

import pytest
import torch

from megaopd import extend
from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError
from megaopd.objectives.weights import completed
from megaopd.recipes import method
from megaopd.schema import make_config
from megaopd.study.methods import check
from tests.extending import commands, write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Loaded once: names of losses are of the process, and go with this module's last test."""
    from megaopd.data.tasks import TASKS
    from megaopd.losses import divergences, sampled, terms
    from megaopd.objectives import names

    lists = [terms.DIVERGENCES, names.DIVERGENCES, names.ESTIMATORS, names.LOSSES, names.CAPPED]
    tables = [divergences.KINDS, terms.VALID, sampled.ESTIMATORS, TASKS]
    before = [one.copy() for one in (*lists, *tables)]
    root = tmp_path_factory.mktemp("page")
    write_files(root)
    extend.load([str(root / "my_losses.py"), str(root / "my_task.py")])
    yield root
    for now, old in zip((*lists, *tables), before, strict=True):
        now.clear()
        now.update(old) if isinstance(now, dict) else now.extend(old)


@pytest.fixture
def told(folder):
    values = method(str(folder / "triangular.toml")).values("tiny")
    return extend.hooks_of(check(values).run.plugins)


def sample(finish="stop", ids=(3, 4)):
    prompt = Prompt("p", (1, 2), "", None, "")
    return Sample(prompt, ids, (-0.5,) * len(ids), finish, 0)


def test_every_command_of_the_page_parses(folder):
    """In processes of their own: what a run does with its overrides, without running."""
    lines = [line for line in commands() if "--show" not in line]
    assert len(lines) >= 5
    program = (
        "import sys, shlex, megaopd.study.methods as m\n"
        "for line in sys.argv[1:]:\n"
        "    name, *overrides = shlex.split(line)[1:]\n"
        "    m.as_toml(name, 'tiny', overrides)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *lines], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(shlex.split(line)[0] == "recipe" for line in lines)


def test_the_divergence_has_the_derivative_that_it_says(folder):
    from megaopd.losses.divergences import KINDS, Laws

    torch.manual_seed(0)
    p = torch.randn(5, 7, dtype=torch.float64).softmax(-1).requires_grad_()
    q = torch.randn(5, 7, dtype=torch.float64).softmax(-1)
    term, g = KINDS["triangular"].pair(Laws(p.log(), q.log(), p, q), 0.0)
    assert torch.allclose(term, (p - q) ** 2 / (p + q))
    (slope,) = torch.autograd.grad(term.sum(), p)
    assert torch.allclose(g, p * slope)
    zero = torch.zeros(1, 3)
    empty = KINDS["triangular"].pair(Laws(zero.log(), zero.log(), zero, zero), 0.0)
    assert all(bool((x == 0).all()) for x in empty)


@pytest.mark.parametrize("extra", [{}, {"support": "student_topk", "k": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_has_its_gradient_at_the_logits(folder, extra, dtype):
    """In fp32 too, where the kernels are: they do not know it, and are not asked."""
    from megaopd.losses import vocab_parallel_divergence

    torch.manual_seed(1)
    student = torch.randn(4, 9, dtype=dtype).requires_grad_()
    teacher = torch.randn(4, 9, dtype=dtype)
    loss = vocab_parallel_divergence(student * 1.0, teacher, kind="triangular", **extra)
    (got,) = torch.autograd.grad(loss.sum(), student)
    p, q = student.softmax(-1), teacher.softmax(-1)
    if extra:
        ids = student.detach().topk(3, -1).indices
        p, q = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, True)], 1) for x in (p, q))
    want = ((p - q) ** 2 / (p + q)).sum(-1)
    assert torch.allclose(loss, want, atol=1e-5)
    (slope,) = torch.autograd.grad(want.sum(), student)
    assert torch.allclose(got, slope, atol=1e-5)


def test_the_estimator_has_the_slope_that_it_says(folder):
    from megaopd.losses import sampled_loss

    log_p = torch.tensor([-3.0, -1.0, -0.5], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([-0.5, -1.0, -4.0], dtype=torch.float64)
    loss = sampled_loss(log_p, log_q, estimator="pseudo_huber", cap=2.0)
    (slope,) = torch.autograd.grad(loss.sum(), log_p)
    ratio = (log_p - log_q).detach()
    assert torch.allclose(slope, ratio / (1 + ratio**2 / 4).sqrt())
    assert slope.abs().max() < 2.0 and loss[1] == 0


def test_hooks_are_of_the_runs_that_name_their_file(folder, told):
    weighed = completed(told["weighed"][0]([sample(), sample("length")], 0))
    assert weighed[0].weights["distill"] == 1.0
    assert weighed[1].weights["distill"] == 0.5 and weighed[1].weights["entropy"] == 1.0
    assert told["metrics"][0]([sample(), sample(ids=(1, 2, 3))], 0) == {"my/longest": 3}
    plain = check(method("full_rkl").values("tiny"))
    assert not any(extend.hooks_of(plain.run.plugins).values())


def test_the_task_draws_and_verifies(folder):
    from megaopd.data.tasks import get_task

    task = get_task("successor2")
    one = task.example(3, 0, "train")
    assert one == task.example(3, 0, "train") and int(one.answer) == int(one.prompt[:-3]) + 1
    assert task.verify(f" {one.answer}", one.answer, {}) == 1.0
    assert task.verify("x", one.answer, {}) == 0.0


def plugin(tmp_path, text):
    path = tmp_path / "one.py"
    path.write_text("from megaopd import extend\n" + text)
    return [str(path)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extend.divergence('rkl')", "that no other loss has"),
        ("extend.divergence('k1')", "that no other loss has"),
        ("extend.divergence('mine', parameter='alpha')", "parameter 'alpha' or 'beta' and its"),
        ("extend.estimator('mine', parameters={'width': 1.0})", "of clip_low, clip_high and cap"),
        ("extend.task('math')", "that no other task has"),
        ("extend.hook('before')", "one of 'verified', 'weighed', 'metrics'"),
    ],
)
def test_what_a_plugin_may_not_do(tmp_path, text, said):
    with pytest.raises(UserError) as caught:
        extend.load(plugin(tmp_path, text))
    assert said in str(caught.value)


def test_files_that_are_no_plugins(tmp_path):
    base = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"source": "task:math"}}
    with pytest.raises(UserError, match=r"run\.plugins holds"):
        make_config({**base, "run": {"plugins": [str(tmp_path / "none.py")]}})
    with pytest.raises(UserError, match=r"run\.plugins"):
        make_config({**base, "run": {"plugins": "one.py"}})
    with pytest.raises(UserError, match="outside of a plugin"):
        extend.hook("verified")
