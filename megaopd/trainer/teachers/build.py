"""The teacher that a configuration asks for, on the student's ranks; and the service on its own."""

from collections.abc import Mapping
from typing import Any

from megaopd.models.arch import Architecture
from megaopd.models.config import ModelConfig
from megaopd.parallel import Grid
from megaopd.trainer.config import RoutedTeacherConfig, TeacherConfig, TeacherParallelConfig
from megaopd.trainer.student import Student
from megaopd.trainer.teacher import Teacher
from megaopd.trainer.teachers.base import BaseTeacher
from megaopd.trainer.teachers.exchange import RegroupedTeacher
from megaopd.trainer.teachers.ranks import SeparateTeacher
from megaopd.trainer.teachers.routed import RoutedTeachers, Router
from megaopd.trainer.teachers.selves import CopiedTeacher, InitialTeacher, LiveTeacher
from megaopd.worlds import Bridge, second_layout

Frozen = Mapping[str, tuple[ModelConfig, Architecture]]  # by name


def make_teacher(
    config: TeacherConfig,
    layout: TeacherParallelConfig,
    frozen: Frozen,
    grid: Grid,
    student: Student,
    student_config: ModelConfig,
    bridge: Bridge | None,
) -> BaseTeacher | None:
    """Build it; a collective over the student's ranks. None where the run has no local teacher.

    Args:
        frozen: teachers with a checkpoint of their own; "" names a single one.
        bridge: to the teacher's ranks, where it has some.
    """
    if config.kind == "live":
        return LiveTeacher(student)
    if config.kind == "initial":
        return InitialTeacher(student)
    if config.follows:
        return CopiedTeacher(
            student,
            student_config,
            config.kind,
            decay=config.ema_decay,
            every=config.sync_every,
            offload=config.offload,
        )
    if not frozen:
        return None
    rows: dict[str, Any] = {"vocab_rows": student.vocab_rows}
    own = second_layout(layout) if config.placement == "regrouped" else None
    made: dict[str, BaseTeacher] = {}
    for name, (model, arch) in frozen.items():
        if bridge is not None:
            made[name] = SeparateTeacher(
                model, arch, grid, bridge, window=config.window, name=name, **rows
            )
        elif own is not None:
            made[name] = RegroupedTeacher(model, arch, grid, own, offload=config.offload, **rows)
        else:
            made[name] = Teacher(model, arch, grid, offload=config.offload, **rows)
    return made[""] if "" in made else RoutedTeachers(made)


def make_router(teachers: Mapping[str, RoutedTeacherConfig]) -> Router | None:
    """Who scores what, where there are several teachers."""
    return Router({name: one.routes for name, one in teachers.items()}) if teachers else None
