"""`megaopd eval`: what a checkpoint can do, with intervals, and what it has forgotten.

Greedy accuracy; accuracy and pass@k of sampled responses; their length, repetition and entropy; the
distance to the teacher where one is given; greedy accuracy on a control task that was not trained.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError
from megaopd.inputs import control_set, scorable_rewards
from megaopd.parts import Parts
from megaopd.report.statistics import (
    Figure,
    by_prompt,
    figure,
    pass_at_k,
    repetition,
    reward_columns,
)
from megaopd.schema import Config
from megaopd.trainer.checkpoint import holds_teacher, load_teacher

SOLVED = 1.0  # a reward of this and more counts as solved


def check(config: Config) -> None:
    """Refuse a teacher that would be the evaluated student again."""
    kind = config.teacher.kind
    if kind in ("frozen", "live"):  # live: it differs by what it sees
        return
    if kind != "initial" and holds_teacher(Path(config.student.path)):
        return
    raise UserError(
        f"teacher.kind = {kind} in an evaluation of {config.student.path}",
        expected="a teacher other than the student: a checkpoint of a run (checkpoints/step_...) "
        "has a copy that followed it (ema, periodic, previous_epoch), but not the initial weights",
        fix="set teacher.kind=frozen teacher.path=CHECKPOINT, or leave the teacher out: "
        "teacher.kind=frozen objective.loss=sft",
    )


def evaluate(parts: Parts) -> dict[str, Figure | float]:
    """Every figure by name; a collective.

    Figures are means over prompts. Token means (`kl`, `entropy`, ...: Parts.score_samples) are
    plain numbers: they are means over all tokens of the sampled responses.
    """
    found: dict[str, Figure | float] = {}
    settings = parts.config.eval
    if parts.teacher is not None and parts.teacher.sharded_state():
        load_teacher(Path(parts.config.student.path), parts.teacher)
    parts.sync_weights(version=0)
    found |= _accuracy(parts.greedy_answers(parts.held_out, -1))
    control = control_set(parts.config, parts.tokenizer)
    if control:
        found |= _accuracy(parts.greedy_answers(control, -3), "control_")
    if settings.samples:
        found |= _sampled(parts, parts.held_out)
    parts.sampler.take_turn()
    return found


def _accuracy(samples: Sequence[Sample], prefix: str = "", n: int = 1) -> dict[str, Figure]:
    """Of n samples a prompt, where one can be scored; {} where none can."""
    columns = reward_columns(scorable_rewards(samples))
    return {f"{prefix}{name}": figure(by_prompt(values, n)) for name, values in columns.items()}


def _sampled(parts: Parts, prompts: list[Prompt]) -> dict[str, Any]:
    """Of eval.samples responses a prompt, by the student's law under [rollout]."""
    n, params = parts.config.eval.samples, parts.sampler.buffer.params.own()
    samples = parts.verify(parts.sampler.generate(prompts, -2, n, params))
    found: dict[str, Any] = _accuracy(samples, "sampled_", n)
    if found:
        solved = [r is not None and r >= SOLVED for r in scorable_rewards(samples)]
        counts = [sum(solved[i : i + n]) for i in range(0, len(solved), n)]
        for k in parts.config.eval.pass_k:
            found[f"pass@{k}"] = figure([pass_at_k(n, c, k) for c in counts])
    ends = set(parts.eos_ids)
    responses = [[i for i in s.response_ids if i not in ends] for s in samples]
    columns = {
        "response_length": [float(len(s.response_ids)) for s in samples],
        "truncated": [float(s.finish_reason == "length") for s in samples],
        "repetition": [repetition(ids) for ids in responses],
    }
    found |= {name: figure(by_prompt(values, n)) for name, values in columns.items()}
    parts.sampler.take_turn()
    distances = parts.score_samples(samples)
    return found | distances | parts.pi_gap(samples, distances)


def write(found: dict[str, Figure | float], parts: Parts) -> None:
    """evaluation.json in run.dir, and a table on the console; on the main rank."""
    if not parts.is_main:
        return
    from rich.console import Console
    from rich.table import Table

    directory = Path(parts.config.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    teacher_kind = parts.config.teacher.kind if parts.config.teacher.follows else ""
    record = {
        "student": parts.config.student.path,
        "teacher": parts.config.teacher.path or teacher_kind,
        "data": parts.config.eval.source or parts.config.data.source,
        "samples": parts.config.eval.samples,
        "figures": {
            name: asdict(value) if isinstance(value, Figure) else value
            for name, value in found.items()
        },
    }
    (directory / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    table = Table("figure", "value", "95% interval", "prompts", box=None)
    for name, value in found.items():
        if isinstance(value, Figure):
            interval = f"{value.low:.4f} .. {value.high:.4f}"
            table.add_row(name, f"{value.value:.4f}", interval, str(value.prompts))
        else:
            table.add_row(name, f"{value:.4f}")
    Console().print(table)
