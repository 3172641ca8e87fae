"""A frozen teacher on the student's ranks under a layout of its own.

Each of the teacher's data-parallel replicas scores its share of the micro-batches; then the wanted
hidden rows go from the replicas' last stages to the student's, H numbers a row, and never logits.

Shapes: R rows of one receiver, T rows of a micro-batch, Ht the teacher's hidden size.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from megaopd import platform
from megaopd.models.arch import Architecture
from megaopd.models.build import build_model
from megaopd.models.config import ModelConfig
from megaopd.models.convert import load_weights
from megaopd.parallel import Grid, as_chunks, gather_objects
from megaopd.trainer.batch import MicroBatch
from megaopd.trainer.offload import Shelf
from megaopd.trainer.teachers.base import BaseTeacher, load_output_layer
from megaopd.trainer.teachers.scoring import run_jobs, sender_of
from megaopd.trainer.teachers.wants import (
    Job,
    assemble,
    local_wants,
    make_jobs,
    share_of_replica,
    teacher_sequences,
)
from megaopd.worlds import Layout

Pieces = dict[tuple[int, int], Any]  # (job index, student rank) -> [R, Ht]


class Exchange:
    """Hidden rows between ranks of one world. Making it is a collective.

    Args:
        student: whose last stages receive.
        teacher: whose last stages send.
    """

    def __init__(self, student: Grid, teacher: Grid) -> None:
        self.student, self.teacher = student, teacher
        place = (teacher.dp_rank, teacher.tp_rank) if teacher.is_last_stage else None
        places = gather_objects(place)
        self.senders = {where: rank for rank, where in enumerate(places) if where is not None}
        self.sent_bytes = 0  # by this rank to others, since the run began

    def __call__(self, jobs: Sequence[Job], pieces: Pieces, width: int, dtype: Any) -> Pieces:
        """Send what is here and wanted elsewhere, get what is wanted here. A collective.

        Args:
            jobs: all of the step.
            pieces: what this rank scored; emptied.
        """
        import torch
        import torch.distributed as dist

        me, calls, found = self.student.rank, [], {}
        kept = []  # alive until it has been sent
        for job in jobs:
            replica = job.replica(self.teacher.dp_size)
            for receiver, rows in job.receivers:
                sender = self.senders[replica, sender_of(receiver, self.teacher.tp_size)]
                key = (job.index, receiver)
                if me == sender == receiver:
                    found[key] = pieces.pop(key)
                elif me == sender:
                    piece = pieces.pop(key).contiguous()
                    self.sent_bytes += piece.numel() * piece.element_size()
                    kept.append(piece)
                    calls.append(dist.P2POp(dist.isend, piece, receiver))
                elif me == receiver:
                    piece = torch.empty(len(rows), width, dtype=dtype, device=platform.device())
                    found[key] = piece
                    calls.append(dist.P2POp(dist.irecv, piece, sender))
        for call in dist.batch_isend_irecv(calls) if calls else ():
            call.wait()
        return found


def score_and_exchange(
    model: Any,
    layout: Layout,
    micro_batches: Sequence[MicroBatch],
    exchange: Exchange,
    *,
    max_positions: int,
) -> list[Any]:
    """Hidden rows of the student's micro-batches, scored by `model` under `layout`; a collective.

    Args:
        model: this rank's stage, or its chunks.

    Returns:
        What BaseTeacher.hidden_states does.
    """
    student, pieces = exchange.student, {}
    wants = gather_objects(local_wants(micro_batches, student))
    jobs = make_jobs(wants)
    sequences = teacher_sequences(micro_batches[0].samples, max_positions)

    def deliver(job: Job, mine: list[tuple[int, Any]]) -> None:
        for rank, rows in mine:
            pieces[job.index, rank] = rows

    grid = layout.grid
    with layout.active():
        run_jobs(
            model, grid, share_of_replica(jobs, grid.dp_rank, grid.dp_size), sequences, deliver
        )
    config = as_chunks(model)[0].config
    width, dtype = config.hidden_size, config.params_dtype
    found = exchange(jobs, pieces, width, dtype)
    if not student.is_last_stage:
        return [None] * len(micro_batches)
    by_micro = {(job.micro, r): job.index for job in jobs for r, _ in job.receivers}
    made = []
    for number, micro in enumerate(micro_batches):
        index = by_micro.get((number, student.rank))
        part = found.pop((index, student.rank), None) if index is not None else None
        made.append(part_or_empty(part, micro, width, dtype, student))
    return made


def part_or_empty(part: Any, micro: MicroBatch, width: int, dtype: Any, grid: Grid) -> Any:
    """[T, Ht] on every tensor rank from this one's part, which may be no rows at all."""
    import torch

    if part is None:
        part = torch.empty(0, width, dtype=dtype, device=platform.device())
    return assemble(part, len(micro.sources_T), grid)


class RegroupedTeacher(BaseTeacher):
    """On the student's ranks, laid out in its own way. Making it is a collective.

    Args:
        grid: the student's.
        layout: the teacher's, over the same ranks.
        vocab_rows: the student's padded vocabulary.
        offload: keep the weights on the host between its turns.
    """

    def __init__(
        self,
        config: ModelConfig,
        arch: Architecture,
        grid: Grid,
        layout: Layout,
        *,
        vocab_rows: int,
        offload: bool = False,
    ) -> None:
        self.arch, self.grid, self.layout = arch, grid, layout
        self.model = build_scorer(config, arch, layout)
        self.head = load_output_layer(config, arch, grid, vocab_rows=vocab_rows)
        self.exchange = Exchange(grid, layout.grid)
        self.turn = Turn(self.model.parameters, enabled=offload)
        self._seen = 0

    def hidden_states(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        with self.turn:
            return score_and_exchange(
                self.model,
                self.layout,
                micro_batches,
                self.exchange,
                max_positions=self.arch.max_positions,
            )

    def output_weight(self, micro: MicroBatch | None = None) -> Any:
        return self.head

    def parameters(self) -> Iterable[Any]:
        yield from self.model.parameters()
        if self.head is not None:
            yield self.head

    def metrics(self) -> dict[str, float]:
        sent, self._seen = self.exchange.sent_bytes - self._seen, self.exchange.sent_bytes
        return {"teacher/sent_bytes": float(sum(gather_objects(sent)))}


def build_scorer(config: ModelConfig, arch: Architecture, layout: Layout) -> Any:
    """A frozen model in a layout of its own, without the output layer; a collective."""
    with layout.active():
        model = build_model(arch, config, layout.grid).to(platform.device())
        load_weights(model, config, arch, layout.grid)
    # The loss applies the output layer where the student's last stage is.
    if hasattr(model, "output_layer") and model.output_layer.weight is not None:
        model.output_layer.weight = None
    return model.eval().requires_grad_(False)


class Turn:
    """Weights that are on the device only inside `with`; nothing happens unless enabled."""

    def __init__(self, parameters: Any, *, enabled: bool) -> None:
        self._parameters, self.enabled, self._shelf = parameters, enabled, Shelf()
        self.away_bytes = 0
        self._put_away()

    def _put_away(self) -> None:
        if self.enabled:
            self.away_bytes = self._shelf.put_away(self._parameters())

    def __enter__(self) -> None:
        self._shelf.bring_back()

    def __exit__(self, *_: object) -> None:
        self._put_away()
