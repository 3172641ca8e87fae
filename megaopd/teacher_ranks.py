"""Ranks of the teacher's own: the job split in two, and what the teacher's part of it does."""

from megaopd.inputs import frozen_teachers, student_tokenizer
from megaopd.schema import Config
from megaopd.trainer.teachers.ranks import serve
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


def serve_teachers(config: Config, bridge: Bridge) -> None:
    """What one of the teacher's ranks does: score until the student's ranks are done."""
    frozen = frozen_teachers(config, student_tokenizer(config))
    serve(frozen, config.teacher_parallel, bridge, offload=config.teacher.offload)
