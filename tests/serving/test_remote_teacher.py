"""Training against a teacher on a real SGLang server equals training beside the same teacher.

fp32 on both sides, so losses, gradient norms and statistics agree to rounding, under every layout:
scores are made by the leaders of the data-parallel ranks, or earlier on rank 0, and travel.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dist.layouts import samples
from tests.dist.models import save_tiny

pytest.importorskip("sglang", reason="SGLang is not installed")

from megaopd.rollout.config import ServerConfig
from megaopd.rollout.loop import LoopThread
from megaopd.rollout.server import Fleet

K = 8
# world, tensor, pipeline, sequence parallel
LAYOUTS = {
    "one": (1, 1, 1, False),
    "tp2-pp2-sp": (4, 2, 2, True),
    "tp2-dp2": (4, 2, 1, False),
    "pp2-dp2": (4, 1, 2, False),
}
LISTED = {"support": "teacher_topk", "k": K}
OBJECTIVES = {
    "tail": LISTED,
    "fkl": {"loss": "fkl", **LISTED, "entropy_coef": 0.1},
    "intersect": {"support": "intersection", "k": K, "variant": "intersect"},
    "kl_top": {"loss": "kl_top", "k": K},
    "pld": {"loss": "pld", "k": K},
    "past": {**LISTED, "target": "one_hot", "target_weight": 0.8},
    "k2": {"loss": "k2", "loss_agg": "seq-mean-token-mean"},
    "pg": {"loss": "pg", "tis": "mask"},
    "student": {"support": "student_topk", "k": K, "variant": "sg"},
    "sampled tail": {"support": "student_topk", "k": K, "variant": "sampled_tail"},
    "vopd": {"loss": "vopd", "baseline_k": K},
}
BOUND = 2e-5


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("hf")
    wide = {"hidden_size": 96, "num_hidden_layers": 6, "seed": 11}
    return (
        str(save_tiny(root / "student", "qwen3", tied=False)),
        str(save_tiny(root / "teacher", "qwen3", tied=True, **wide)),
    )


@pytest.fixture(scope="module")
def url(checkpoints: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    loop = LoopThread("test-teacher")
    config = ServerConfig(port=31320)
    logs = tmp_path_factory.mktemp("logs")
    fleet = Fleet(config, Path(checkpoints[1]), device="cpu", dtype="float32", log_dir=logs)
    loop.run(fleet.start())
    yield fleet.servers[0].url
    loop.run(fleet.stop())
    loop.close()


def with_top_ids(made: list[Any], path: str) -> list[Any]:
    """The samples with the student's most probable ids, as an engine reports them."""
    from dataclasses import replace

    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    found = []
    for sample in made:
        with torch.no_grad():
            logits = model(torch.tensor([sample.tokens])).logits[0]
        rows = logits[len(sample.prompt.token_ids) - 1 : -1].topk(K).indices.tolist()
        found.append(replace(sample, top_ids=tuple(map(tuple, rows))))
    return found


def train(
    paths: tuple[str, str],
    layout: tuple[int, int, int, bool],
    values: dict[str, Any],
    url: str,
    steps: int,
    early: bool,
    count: int,
) -> list[dict[str, float]]:
    """The metrics of each step; url "": with the teacher beside the student."""
    from megaopd.models.arch import architecture, padded_vocab, read_hf_config
    from megaopd.models.config import ModelConfig
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.batch import make_micro_batches, plan_step, shares_of
    from megaopd.trainer.config import OptimConfig, RemoteTeacherConfig
    from megaopd.trainer.remote_teacher import RemoteTeacher
    from megaopd.trainer.student import Student
    from megaopd.trainer.teacher import Teacher

    _, tensor, pipeline, sequence = layout
    grid = make_grid(ParallelConfig(tensor, pipeline, sequence=sequence))
    arch = architecture(read_hf_config(paths[0]))
    optim = OptimConfig(lr=1e-2, clip_grad=0.5, eps=1e-5)
    objective = ObjectiveConfig(chunk_size=7, **values)
    student = Student(ModelConfig(path=paths[0]), arch, grid, objective, optim, total_steps=steps)
    remote = local = None
    if url:
        remote = RemoteTeacher(RemoteTeacherConfig(addresses=(url,)), objective, grid)
    else:
        rows = padded_vocab(arch.vocab, tensor, 8)
        teacher_arch = architecture(read_hf_config(paths[1]))
        local = Teacher(ModelConfig(path=paths[1]), teacher_arch, grid, vocab_rows=rows)
    curve = []
    for step in range(steps):
        made = with_top_ids(samples(step, count=count), paths[0])
        scores = None
        if remote is not None:
            if early and grid.rank == 0:
                remote.submit(made[::2])
            shares = shares_of(plan_step(made, grid=grid, micro_batch_size=2), len(made))
            scores = remote.score(made, shares)
        batch = make_micro_batches(
            made, grid=grid, micro_batch_size=2, pad_id=0, loss_agg=objective.loss_agg,
            remote=scores,
        )  # fmt: skip
        metrics = student.update(batch, local)
        curve.append({**metrics, **(scores.metrics if scores else {})})
    if remote is not None:
        remote.close()
    return curve


def both(
    paths: tuple[str, str],
    layout: tuple[int, int, int, bool],
    objectives: dict[str, dict[str, Any]],
    url: str,
    early: bool = False,
    count: int = 7,
) -> dict[str, tuple[list[dict[str, float]], list[dict[str, float]]]]:
    """Each objective with a remote and with a local teacher. One step where the student's own ids
    are those of its first weights."""
    found = {}
    for name, values in objectives.items():
        own = values.get("support") == "student_topk" or "baseline_k" in values
        steps = 1 if own else 2
        found[name] = tuple(
            train(paths, layout, values, where, steps, early, count) for where in (url, "")
        )
    return found


def compare(name: str, remote: list[dict[str, float]], local: list[dict[str, float]]) -> None:
    for mine, theirs in zip(remote, local, strict=True):
        # What a list does not say is left out, and nothing else.
        unknown = {"teacher_entropy", "entropy_gap", "overlap", "teacher_rank"}
        assert set(theirs) - set(mine) <= unknown
        for metric in set(theirs) & set(mine):
            scale = max(abs(theirs[metric]), 1e-2)
            error = abs(mine[metric] - theirs[metric]) / scale
            assert error < BOUND, (name, metric, mine[metric], theirs[metric])
        assert "teacher_entropy" not in mine
        assert mine["teacher/missing"] == 0 and mine["teacher/bytes"] > 0
        assert mine.get("teacher/missing_entries", 0) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_step_as_beside_the_teacher(
    ranks: Any, checkpoints: tuple[str, str], url: str, layout: str
) -> None:
    names = OBJECTIVES if layout == "one" else ("tail", "k2", "student", "pg")
    objectives = {name: OBJECTIVES[name] for name in names}
    place = LAYOUTS[layout]
    per_rank = ranks.run(both, place[0], checkpoints, place, objectives, url, timeout=400)
    for name in objectives:
        for found in per_rank:
            assert found[name][0] == per_rank[0][name][0], "ranks report different metrics"
        compare(name, *per_rank[0][name])


@pytest.mark.parametrize("layout", ["tp2-dp2", "pp2-dp2"])
def test_samples_that_rank_0_scored_early_reach_their_ranks(
    ranks: Any, checkpoints: tuple[str, str], url: str, layout: str
) -> None:
    place = LAYOUTS[layout]
    objectives = {name: OBJECTIVES[name] for name in ("tail", "k2")}
    per_rank = ranks.run(
        both, place[0], checkpoints, place, objectives, url, early=True, timeout=400
    )
    for name in objectives:
        compare(name, *per_rank[0][name])


def test_ranks_without_samples(ranks: Any, checkpoints: tuple[str, str], url: str) -> None:
    """Three samples on four data-parallel ranks: two of them hold copies that weigh nothing."""
    place = (4, 1, 1, False)
    objectives = {"tail": OBJECTIVES["tail"]}
    per_rank = ranks.run(both, 4, checkpoints, place, objectives, url, count=3, timeout=400)
    compare("tail", *per_rank[0]["tail"])


def unreachable(url: str) -> str:
    from megaopd.errors import UserError
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.config import RemoteTeacherConfig
    from megaopd.trainer.remote_teacher import RemoteTeacher

    grid = make_grid(ParallelConfig(2))
    try:
        RemoteTeacher(RemoteTeacherConfig(addresses=(url,)), ObjectiveConfig(loss="k2"), grid)
    except UserError as err:
        return str(err)
    return ""


def too_long(url: str) -> str:
    from dataclasses import replace

    from megaopd.errors import UserError
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.config import RemoteTeacherConfig
    from megaopd.trainer.remote_teacher import RemoteTeacher

    grid = make_grid(ParallelConfig())
    teacher = RemoteTeacher(RemoteTeacherConfig(addresses=(url,)), ObjectiveConfig(loss="k2"), grid)
    made = samples(0, count=4)
    made[3] = replace(made[3], response_ids=(5,) * 80, log_probs=(-1.0,) * 80)
    try:
        teacher.score(made, [range(len(made))])
    except UserError as err:
        return str(err)
    finally:
        teacher.close()
    return ""


def test_every_rank_raises_what_one_of_them_met(ranks: Any, url: str) -> None:
    for found in ranks.run(unreachable, 2, "http://127.0.0.1:31398"):
        assert "does not answer" in found
    for found in ranks.run(too_long, 2, url):
        assert "--context-length" in found and "'0/3'" in found


SYMBOLS = "".join(map(chr, range(33, 126)))


@pytest.fixture(scope="module")
def speaking(checkpoints: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of the teacher that holds a tokenizer, as users start them."""
    import os
    import shutil
    import subprocess
    import time
    import urllib.request

    from megaopd.data.tokenizer import char_tokenizer
    from megaopd.rollout.command import server_command

    where = tmp_path_factory.mktemp("speaking") / "teacher"
    shutil.copytree(checkpoints[1], where)
    char_tokenizer(SYMBOLS).save_pretrained(where)
    config = ServerConfig(port=31330)
    made = server_command(
        config, where, device="cpu", dtype="float32", port=31330, environ=dict(os.environ)
    )
    argv = [word for word in made.argv if word != "--skip-tokenizer-init"]
    log = (where.parent / "log").open("w")
    server = subprocess.Popen(argv, env=made.env, stdout=log, stderr=log, start_new_session=True)
    url = "http://127.0.0.1:31330"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            break
        except OSError:
            assert server.poll() is None, Path(log.name).read_text()[-2000:]
            time.sleep(1)
    yield url
    os.killpg(server.pid, 9)
    server.wait()


def compared(url: str, symbols: str) -> tuple[str, str]:
    """What was not checked, and what a student with this tokenizer is told."""
    from megaopd.data.tokenizer import char_tokenizer
    from megaopd.errors import UserError
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.config import RemoteTeacherConfig
    from megaopd.trainer.remote_teacher import RemoteTeacher

    config = RemoteTeacherConfig(addresses=(url,))
    grid = make_grid(ParallelConfig())
    tokenizer = char_tokenizer(symbols)
    try:
        teacher = RemoteTeacher(config, ObjectiveConfig(loss="k2"), grid, tokenizer=tokenizer)
    except UserError as err:
        return "", str(err)
    teacher.close()
    return teacher.unchecked, ""


def test_a_teacher_with_another_tokenizer_is_refused(ranks: Any, url: str, speaking: str) -> None:
    swapped = SYMBOLS.replace("A", "\0").replace("B", "A").replace("\0", "B")
    assert ranks.run(compared, 1, speaking, SYMBOLS) == [("", "")]
    ((_, refusal),) = ranks.run(compared, 1, speaking, swapped)
    assert "'B' to the student and 'A' to the teacher's servers" in refusal
    ((unchecked, _),) = ranks.run(compared, 1, url, swapped)
    assert "was not checked" in unchecked
