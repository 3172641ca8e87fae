"""Teachers that are the student itself: its current weights, or a copy of older ones.

A teacher of the student's own size moves the student only where it knows more (a prompt with
privileged information) or where it is older (a past self, an average of past selves).

    live            the current weights: no second copy
    initial         the weights under the student's LoRA adapters: no second copy
    ema             theta_T <- decay theta_T + (1 - decay) theta after every optimizer step
    periodic        theta_T <- theta after every n-th step
    previous_epoch  theta_T <- theta where an epoch of the prompts ends

A copy lies exactly as the student does, shard by shard: keeping it up to date moves nothing between
ranks. A frozen copy of the initial student is an ordinary Teacher on the student's path.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from megaopd import platform
from megaopd.models.chunks import build_chunks
from megaopd.models.config import ModelConfig
from megaopd.models.lora import adapters_off
from megaopd.models.stream import values_of
from megaopd.trainer.batch import MicroBatch
from megaopd.trainer.student import Student
from megaopd.trainer.teacher import HeldTeacher, InPlace
from megaopd.trainer.teachers.base import BaseTeacher
from megaopd.trainer.teachers.exchange import Turn
from megaopd.trainer.teachers.scoring import inference

PREFIX = "self_teacher."  # of its tensors in a checkpoint, beside the student's


class LiveTeacher(BaseTeacher):
    """The student's current weights: scoring is one more forward pass of its own model."""

    def __init__(self, student: Student) -> None:
        self.student, self.arch = student, student.arch
        self.scorer = InPlace(student.wrapped, student.arch, student.grid)

    def hidden_states(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        with inference(self.student.wrapped):
            return self.scorer(micro_batches)

    def output_weight(self, micro: MicroBatch | None = None) -> Any:
        # A view without history: the loss has no gradient for the teacher's side.
        return self.student.output_weight().detach()


class InitialTeacher(LiveTeacher):
    """The student without its adapters, as it was before training."""

    def hidden_states(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        with adapters_off(self.student.chunks):
            return super().hidden_states(micro_batches)


class CopiedTeacher(HeldTeacher):
    """A copy of the student on the student's ranks. Making it is a collective.

    Args:
        config: the student's.
        kind: "ema", "periodic" or "previous_epoch".
        decay: of the average.
        every: steps between copies.
        offload: keep it on the host between its turns (scoring, and being brought up to date).
    """

    def __init__(
        self,
        student: Student,
        config: ModelConfig,
        kind: str,
        *,
        decay: float = 0.999,
        every: int = 1,
        offload: bool = False,
    ) -> None:
        self.student, self.arch, self.grid = student, student.arch, student.grid
        self.kind, self.decay, self.every = kind, decay, every
        self.updates, self.epoch = 0, 0
        self.chunks = self._build(config)
        # A step of an average is a small fraction of a weight: bf16 would round most of it away.
        averages = kind == "ema" and config.dtype != "float32"
        high = replace(config.without_fp8(), dtype="float32")
        self.master = self._build(high) if averages else []
        self._copy()
        self.scorer = InPlace(self.chunks, student.arch, student.grid)
        self.turn = Turn(self.between_turns, enabled=offload)

    def _build(self, config: ModelConfig) -> list[Any]:
        student = self.student
        chunks = build_chunks(student.arch, config, student.grid, vocab_rows=student.vocab_rows)
        return [chunk.to(platform.device()).eval().requires_grad_(False) for chunk in chunks]

    def after_update(self, *, epoch: int = 0) -> None:
        self.updates += 1
        if self.kind == "ema":
            with self.turn:
                self._average()
        elif self.kind == "periodic":
            if self.updates % self.every == 0:
                with self.turn:
                    self._copy()
        elif epoch != self.epoch:
            with self.turn:
                self._copy()
        self.epoch = epoch

    def _copy(self) -> None:
        for chunks in (self.chunks, self.master):
            for mine, theirs in self._pairs(chunks):
                mine.copy_(theirs)

    def _average(self) -> None:
        for mine, theirs in self._pairs(self.master or self.chunks):
            mine.lerp_(theirs.to(mine.dtype), 1.0 - self.decay)
        self._take_from_master()

    def _take_from_master(self) -> None:
        for chunk, master in zip(self.chunks, self.master, strict=False):  # none in fp32
            exact = dict(master.named_parameters())
            for name, mine in chunk.named_parameters():
                mine.copy_(exact[name])

    def _pairs(self, chunks: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
        for chunk, student in zip(chunks, self.student.chunks, strict=False):
            theirs = dict(student.named_parameters())
            for name, mine in chunk.named_parameters():
                yield mine, values_of(theirs[name])  # with its adapter, which the copy has not

    def sharded_state(self) -> dict[str, Any]:
        saved: dict[str, Any] = {"updates": self.updates, "epoch": self.epoch}
        with self.turn:
            for i, chunk in enumerate(self.master or self.chunks):
                sharded = chunk.sharded_state_dict(prefix=PREFIX)
                # The writer comes after this turn.
                saved[f"model{i}"] = _detached_copy(sharded) if self.turn.enabled else sharded
        return saved

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        self.updates, self.epoch = int(state["updates"]), int(state["epoch"])
        with self.turn:
            for i, chunk in enumerate(self.master or self.chunks):
                saved = state[f"model{i}"].items()
                chunk.load_state_dict({k.removeprefix(PREFIX): v for k, v in saved})
            self._take_from_master()

    def parameters(self) -> Iterable[Any]:
        for chunk in (*self.chunks, *self.master):
            yield from chunk.parameters()


def _detached_copy(sharded: dict[str, Any]) -> dict[str, Any]:
    """The same sharded tensors with data of their own."""
    for value in sharded.values():
        if hasattr(value, "data") and value.data is not None:
            value.data = value.data.clone()
    return sharded
