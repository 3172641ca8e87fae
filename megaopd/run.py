"""The loop: sync weights -> sample -> verify -> score -> update -> log -> checkpoint.

Every rank runs it; `build` makes what the loop uses. Supervised fine-tuning is the same loop with
the data's answers in place of the student's samples.
"""

from pathlib import Path
from typing import Any

from megaopd import evaluation, faults, sampling, watchdog
from megaopd.build import build_parts
from megaopd.errors import RunStopped
from megaopd.launch import restart_count
from megaopd.parts import Parts
from megaopd.report.progress import progress
from megaopd.schema import Config
from megaopd.teacher_ranks import make_watchdog, serve_teachers, teacher_ranks
from megaopd.worlds import Bridge


def train(config: Config) -> dict[str, Any]:
    """Run `config` to its last step, from the last good checkpoint if there is one.

    A collective over all ranks of the job.

    Returns:
        The summary that is also written to run.dir/summary.json; {} on ranks of the teacher's own.

    Raises:
        UserError: the input does not fit together; nothing has been trained yet.
        RunStopped: it was asked to end early (stop.py), and has saved what it did.
    """
    bridge = teacher_ranks(config)
    if bridge is not None and bridge.is_teacher:
        serve_teachers(config, bridge)
        return {}
    with build_parts(config, bridge=bridge) as parts, _watchdog(config, parts, bridge):
        if restart_count():
            parts.warn("restart", f"number {restart_count()}, from step {parts.first_step}")
        steps = range(parts.first_step, config.run.steps)
        parts.evaluate_at(parts.first_step)
        with progress("steps", len(steps), enabled=parts.is_main and len(steps) > 0) as advance:
            for step in steps:
                if parts.done or parts.asked_to_stop(step):
                    break
                faults.set_step(step + 1)
                watchdog.enter("step", step + 1)
                one_step(parts, step)
                advance(1)
        if not parts.stopped:
            return parts.finish()
    parts.grid.barrier()  # an agent ends the other ranks when the first one has gone
    if parts.teacher is not None:
        parts.teacher.close(stopped=True)
    raise RunStopped


def one_step(parts: Parts, step: int) -> None:
    """Step number `step` (from 0), which makes the weights of version step + 1."""
    if parts.config.on_policy:
        parts.sync_weights(version=step)
        samples = parts.sample(step)
        samples = parts.hooked("verified", parts.verify(samples), step)
    else:
        samples = parts.examples(step)
    metrics = parts.update(samples, step)  # the teacher scores inside, before the student
    every = parts.config.report.rank_times_every
    if every and (step + 1) % every == 0:
        metrics |= parts.student.pace.slowest()
    parts.log(step + 1, metrics, samples)
    parts.evaluate_at(step + 1)
    parts.checkpoint(step + 1)


def _watchdog(config: Config, parts: Parts, bridge: Bridge | None) -> watchdog.Watchdog:
    teachers = bridge.teachers if bridge is not None else 0
    return make_watchdog(config, parts.grid.rank, parts.grid.world_size + teachers)


def evaluate(config: Config) -> None:
    """Evaluate config.student on held-out prompts (evaluation.py): a table, evaluation.json."""
    evaluation.check(config)
    bridge = teacher_ranks(config)
    if bridge is not None and bridge.is_teacher:
        serve_teachers(config, bridge, training=False)
        return
    with build_parts(config, training=False, bridge=bridge) as parts:
        evaluation.write(evaluation.evaluate(parts), parts)


def sample(config: Config, out: Path, *, prompts: int, greedy: bool = False) -> None:
    """Write responses of config.student to a file (sampling.py)."""
    with build_parts(config, training=False) as parts:
        sampling.sample(parts, out, prompts=prompts, greedy=greedy)
