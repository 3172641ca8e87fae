"""Several teachers: every sample is scored by exactly one, which its prompt decides.

A micro-batch holds samples of one teacher. Denominators are those of the whole step, so that the
loss is the sum over teachers of the losses of their samples, however these are mixed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError
from megaopd.trainer.batch import MicroBatch, StepCounts
from megaopd.trainer.teachers.base import BaseTeacher


class Router:
    """Says which teacher scores a prompt.

    Args:
        routes: by teacher, "task=NAME" or "KEY=VALUE" of the prompt's metadata, any of which
            suffices; (): every prompt that no other teacher takes.
    """

    def __init__(self, routes: Mapping[str, Sequence[str]]) -> None:
        self.routes = {name: [_parse(route) for route in some] for name, some in routes.items()}
        rest = [name for name, some in self.routes.items() if not some]
        if len(rest) > 1:
            raise UserError(
                f"teachers {rest[0]} and {rest[1]} both have no routes",
                expected="at most one teacher for everything else",
                fix=f"set teachers.{rest[1]}.routes",
            )
        self.rest = rest[0] if rest else None

    def __call__(self, prompt: Prompt) -> str:
        """The name of the prompt's teacher.

        Raises:
            UserError: no teacher takes it, or several do.
        """
        takers = [
            name
            for name, routes in self.routes.items()
            if any(_value(prompt, key) == value for key, value in routes)
        ]
        if not takers and self.rest is not None:
            return self.rest
        if len(takers) != 1:
            raise UserError(
                f"prompt {prompt.id!r} (task {prompt.task!r}) is taken by "
                f"{' and '.join(takers) or 'no teacher'}",
                expected="exactly one teacher for every prompt",
                fix="change the routes, or give one teacher none: it takes what is left",
            )
        return takers[0]


def _parse(route: str) -> tuple[str, str]:
    key, sep, value = route.partition("=")
    if not sep or not key or not value:
        raise UserError(f"route {route!r}", expected='"task=NAME", or "KEY=VALUE" of the metadata')
    return key, value


def _value(prompt: Prompt, key: str) -> str | None:
    value = prompt.task if key == "task" else prompt.meta.get(key)
    return None if value is None else str(value)


def routed_micro_batches(
    samples: Sequence[Sample],
    router: Router,
    make: Callable[[Sequence[Sample], StepCounts], list[MicroBatch]],
) -> list[MicroBatch]:
    """The step's micro-batches, teacher by teacher in the order of the configuration.

    make: the micro-batches of a part of the step's samples; each part is filled up with masked
        copies on its own.
    """
    counts = StepCounts.of(samples)
    parts: dict[str, list[Sample]] = {name: [] for name in router.routes}
    for sample in samples:
        parts[router(sample.prompt)].append(sample)
    return [
        replace(micro, teacher=name)
        for name, part in parts.items()
        if part
        for micro in make(part, counts)
    ]


class RoutedTeachers(BaseTeacher):
    """Several teachers behind one face."""

    def __init__(self, teachers: Mapping[str, BaseTeacher]) -> None:
        self.teachers = teachers

    def hidden_states(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        found: list[Any] = [None] * len(micro_batches)
        for name, teacher in self.teachers.items():
            which = [i for i, micro in enumerate(micro_batches) if micro.teacher == name]
            if not which:
                continue
            made = teacher.hidden_states([micro_batches[i] for i in which])
            for i, hidden in zip(which, made, strict=True):
                found[i] = hidden
        return found

    def output_weight(self, micro: MicroBatch | None = None) -> Any:
        assert micro is not None, "which of several teachers?"
        return self.teachers[micro.teacher].output_weight(micro)

    def softcap(self, micro: MicroBatch | None = None) -> float | None:
        assert micro is not None, "which of several teachers?"
        return self.teachers[micro.teacher].softcap(micro)

    def parameters(self) -> Iterable[Any]:
        for teacher in self.teachers.values():
            yield from teacher.parameters()

    def metrics(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for teacher in self.teachers.values():
            for name, value in teacher.metrics().items():
                total[name] = total.get(name, 0.0) + value
        return total

    def asked_to_stop(self) -> bool:
        return any(teacher.asked_to_stop() for teacher in self.teachers.values())

    def close(self, *, stopped: bool = False) -> None:
        for teacher in self.teachers.values():
            teacher.close(stopped=stopped)
