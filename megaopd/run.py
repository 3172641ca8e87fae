"""The loop: sync weights -> sample -> verify -> score -> update -> log -> checkpoint.

Every rank runs it; `parts` builds what the loop uses. Supervised fine-tuning is the same loop with
the data's answers in place of the student's samples.
"""

from typing import Any

from megaopd import faults
from megaopd.parts import Parts, build_parts
from megaopd.report.progress import progress
from megaopd.schema import Config
from megaopd.teacher_ranks import serve_teachers, teacher_ranks


def train(config: Config) -> dict[str, Any]:
    """Run `config` to its last step, from the last good checkpoint if there is one.

    A collective over all ranks of the job.

    Returns:
        The summary that is also written to run.dir/summary.json; {} on ranks of the teacher's own.

    Raises:
        UserError: the input does not fit together; nothing has been trained yet.
    """
    bridge = teacher_ranks(config)
    if bridge is not None and bridge.is_teacher:
        serve_teachers(config, bridge)
        return {}
    with build_parts(config, bridge=bridge) as parts:
        steps = range(parts.first_step, config.run.steps)
        parts.evaluate_at(parts.first_step)
        with progress("steps", len(steps), enabled=parts.is_main and len(steps) > 0) as advance:
            for step in steps:
                if parts.done:
                    break
                faults.set_step(step + 1)
                one_step(parts, step)
                advance(1)
        return parts.finish()


def one_step(parts: Parts, step: int) -> None:
    """Step number `step` (from 0), which makes the weights of version step + 1."""
    if parts.config.on_policy:
        parts.sync_weights(version=step)
        samples = parts.sample(step)
        samples = parts.verify(samples)
    else:
        samples = parts.examples()
    metrics = parts.update(samples)  # the teacher scores inside, before the student
    parts.log(step + 1, metrics, samples)
    parts.evaluate_at(step + 1)
    parts.checkpoint(step + 1)


def evaluate(config: Config) -> dict[str, float]:
    """Evaluate config.student on the held-out prompts, printing and returning the figures."""
    bridge = teacher_ranks(config)
    if bridge is not None and bridge.is_teacher:
        serve_teachers(config, bridge)
        return {}
    with build_parts(config, training=False, bridge=bridge) as parts:
        result = parts.evaluate(step=0)
        if parts.is_main:
            for name, value in result.items():
                print(f"{name:>16} {value:.4f}")
        return result
