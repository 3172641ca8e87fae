"""kill -9 at any moment: the run resumes to the same trajectory, byte for byte in fp32."""

import random
import re
import time

import pytest

from megaopd.faults import POINTS
from megaopd.models.weights import HfReader
from megaopd.report.metrics import read_metrics
from tests.e2e.runs import columns, make_models, megaopd, opd_arguments

STEPS, EVERY = 12, 2


def kill_plan(seed: int) -> list[tuple[str, int]]:
    """One step for each point, in rising order, seeded; checkpoint points die on a saving step."""
    rng = random.Random(seed)
    points = list(POINTS)
    rng.shuffle(points)
    plan = []
    for i, point in enumerate(points):
        step = 2 * i + 2 + (0 if point.startswith("checkpoint") else rng.choice([0, 1]))
        plan.append((point, step))
    return plan


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["parallel.tensor=1"], id="tp1"),
        pytest.param(
            ["parallel.tensor=2", "parallel.sequence=true"], id="tp2", marks=pytest.mark.slow
        ),
        pytest.param(["parallel.pipeline=2"], id="pp2", marks=pytest.mark.slow),
        pytest.param(
            [
                "parallel.context=2",
                "trainer.micro_batch_size=1",
                "trainer.micro_batch_tokens=64",
                "data.max_prompt_tokens=32",
            ],
            id="cp2-packed",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_five_times_and_resumed(tmp_path, layout):
    student, teacher = make_models(tmp_path)
    common = [f"run.steps={STEPS}", f"checkpoint.every={EVERY}", *layout]
    whole = megaopd(*opd_arguments(student, teacher, tmp_path / "whole", *common))
    assert whole.returncode == 0, whole.stderr

    killed = opd_arguments(student, teacher, tmp_path / "killed", *common)
    for point, step in kill_plan(seed=3):
        died = megaopd(*killed, env={"MEGAOPD_KILL_AT": f"{point}:{step}"})
        assert died.returncode not in (0, 2), f"{point}:{step} did not kill: {died.stdout}"
    end = megaopd(*killed)
    assert end.returncode == 0, end.stderr

    names = ("step", "loss", "grad_norm", "kl", "reward")
    assert columns(tmp_path / "killed", *names) == columns(tmp_path / "whole", *names)
    assert [row[0] for row in columns(tmp_path / "killed", "step")] == [
        str(i + 1) for i in range(STEPS)
    ]


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    student, teacher = make_models(tmp_path)
    run = opd_arguments(
        student, teacher, tmp_path / "run", "checkpoint.every=2", "checkpoint.keep=3"
    )
    assert megaopd(*run, "run.steps=6").returncode == 0
    before = columns(tmp_path / "run", "step", "loss")
    newest = tmp_path / "run" / "checkpoints" / "step_00000006"
    shard = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    again = megaopd(*run, "run.steps=6")
    assert again.returncode == 0, again.stderr
    assert "passing over a damaged checkpoint" in again.stdout
    assert columns(tmp_path / "run", "step", "loss") == before


def test_another_run_is_refused(tmp_path):
    student, teacher = make_models(tmp_path)
    run = opd_arguments(student, teacher, tmp_path / "run")
    assert megaopd(*run, "run.steps=2").returncode == 0
    other = megaopd(*run, "run.steps=4", "optim.lr=1e-3")
    assert other.returncode == 2
    assert "optim.lr: 0.002 -> 0.001" in other.stderr
    longer = megaopd(*run, "run.steps=3")
    assert longer.returncode == 0, longer.stderr
    assert len(columns(tmp_path / "run", "step")) == 3


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(tmp_path):
    """One rank stands still: the report, an exit code, a restart, the same trajectory."""
    student, teacher = make_models(tmp_path)
    common = ["--ranks=2", "run.steps=6", "checkpoint.every=2", "parallel.tensor=2"]
    common += ["run.stall_minutes=0.1", "report.rank_times_every=2"]
    whole = megaopd(*opd_arguments(student, teacher, tmp_path / "whole", *common))
    assert whole.returncode == 0, whole.stderr

    fault = {"MEGAOPD_HANG_AT": "forward:4:1"}
    hung = opd_arguments(student, teacher, tmp_path / "hung", *common)
    begun = time.monotonic()
    alone = megaopd(*hung, env=fault, timeout=90)
    assert alone.returncode == 1, alone.stderr
    assert "rank 1 holds the others up" in alone.stderr
    assert re.search(r"rank 1: step 4, update, beat \d+, at \(megaopd/faults.py", alone.stderr)
    assert "rank 0: step 4, update" in alone.stderr and "in point" in alone.stderr
    assert alone.stderr.count("no rank has moved") == 1
    print(f"ended {time.monotonic() - begun:.0f} s after the start")

    again = megaopd(*hung, "--restarts=1", env=fault, timeout=150)
    assert again.returncode == 0, again.stderr
    assert "restart: number 1, from step 2" in again.stderr
    names = ("step", "loss", "grad_norm", "kl", "reward")
    assert columns(tmp_path / "hung", *names) == columns(tmp_path / "whole", *names)
    lines = read_metrics(tmp_path / "hung")
    named = [line["step"] for line in lines if line.get("pace/slowest_ratio", 0) >= 1]
    assert named == [2, 4, 6] and all(line["pace/slowest_rank"] in (0, 1) for line in lines[1::2])


def test_a_rank_that_is_killed_is_started_again(tmp_path):
    student, teacher = make_models(tmp_path)
    common = ["run.steps=4", "checkpoint.every=2", "parallel.pipeline=2"]
    whole = megaopd(*opd_arguments(student, teacher, tmp_path / "whole", *common))
    assert whole.returncode == 0, whole.stderr
    killed = opd_arguments(student, teacher, tmp_path / "killed", *common)
    end = megaopd(*killed, "--restarts=1", env={"MEGAOPD_KILL_AT": "optimizer:4:1"}, timeout=150)
    assert end.returncode == 0, end.stderr
    assert "restart: number 1, from step 2" in end.stderr
    names = ("step", "loss", "grad_norm", "kl", "reward")
    assert columns(tmp_path / "killed", *names) == columns(tmp_path / "whole", *names)


def test_a_run_with_adapters_is_resumed_and_exported(tmp_path):
    """Only adapters are saved; convert gives the merged model, rollouts saw it all along."""
    student, teacher = make_models(tmp_path)
    common = ["run.steps=4", "checkpoint.every=2", "parallel.tensor=2", "lora.rank=4"]
    whole = megaopd(*opd_arguments(student, teacher, tmp_path / "whole", *common))
    assert whole.returncode == 0, whole.stderr
    killed = opd_arguments(student, teacher, tmp_path / "killed", *common)
    assert megaopd(*killed, env={"MEGAOPD_KILL_AT": "optimizer:4"}).returncode == 1
    end = megaopd(*killed)
    assert end.returncode == 0, end.stderr
    # A merge that rollouts did not see would show between engine and trainer.
    names = ("step", "loss", "grad_norm", "kl", "reward", "rollout_log_prob_diff")
    rows = columns(tmp_path / "killed", *names)
    assert rows == columns(tmp_path / "whole", *names)
    assert all(float(row[-1]) < 1e-5 for row in rows)

    saved = tmp_path / "killed" / "checkpoints" / "step_00000004"
    done = megaopd("convert", "megatron-to-hf", "--megatron", saved, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    base, merged = HfReader(student), HfReader(tmp_path / "out")
    assert base.shapes() == merged.shapes()
    same = [
        n for n in base.files if base.read(n, None, 0, 0, 0).equal(merged.read(n, None, 0, 0, 0))
    ]
    assert not [n for n in same if "_proj" in n] and len(same) > 2
    (student / "model.safetensors").unlink()
    student.rename(tmp_path / "gone")
    lost = megaopd("convert", "megatron-to-hf", "--megatron", saved, "--out", tmp_path / "no")
    assert lost.returncode == 2 and "holds LoRA adapters on" in lost.stderr
