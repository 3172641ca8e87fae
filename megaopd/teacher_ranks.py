"""Ranks of the teacher's own: the job split in two, and what the teacher's part of it does."""

from pathlib import Path

from megaopd.errors import RunStopped
from megaopd.inputs import frozen_teachers, student_tokenizer
from megaopd.schema import Config
from megaopd.trainer.teachers.ranks import serve
from megaopd.watchdog import Watchdog
from megaopd.worlds import Bridge, join_worlds


def teacher_ranks(config: Config) -> Bridge | None:
    """Split the job where the teacher has ranks of its own; None where it has not. A collective.

    Every rank calls it first; one of the teacher's then calls `serve_teachers` and nothing else.
    """
    count = config.teacher_parallel.ranks
    if not count:
        return None
    frozen_teachers(config, student_tokenizer(config))  # refused here, while all ranks are one job
    return join_worlds(count, timeout_minutes=config.parallel.timeout_minutes)


def serve_teachers(config: Config, bridge: Bridge, *, training: bool = True) -> None:
    """What one of the teacher's ranks does: score until the student's ranks are done.

    Args:
        training: whether the student's ranks have a watchdog; then this one has, too.

    Raises:
        RunStopped: the run was asked to end, and the student's ranks have saved it.
    """
    frozen = frozen_teachers(config, student_tokenizer(config))
    world = bridge.students + bridge.teachers
    service = serve(
        frozen,
        config.teacher_parallel,
        bridge,
        offload=config.teacher.offload,
        watch=make_watchdog(config, bridge.rank, world) if training else None,
    )
    if service.stopped:
        raise RunStopped


def make_watchdog(config: Config, rank: int, world: int) -> Watchdog:
    """Of one rank of the whole job, the teacher's among them."""
    # Before the collective's own end, which names no rank.
    minutes = min(config.run.stall_minutes, 0.8 * config.parallel.timeout_minutes)
    return Watchdog(Path(config.run.dir), rank, world, stall_s=60 * minutes)
