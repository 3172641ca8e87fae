"""Who wants which rows of which sequences, and who scores them.

The student's ranks on the last stage say row by row what their micro-batches look at; so whatever
cuts a micro-batch (sequence, context or data parallel, packing) is the student's affair alone. A
teacher may run other sequences than the student: the same responses behind another prompt.

Shapes: R rows of one receiver, T rows of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megaopd.data.packing import split_source
from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.parallel import Grid
from megaopd.trainer.batch import MicroBatch

NONE = -1  # a row that stands for nothing in the teacher's sequence


@dataclass(frozen=True)
class Wants:
    """What one student rank on the last stage wants, micro-batch by micro-batch."""

    dp_rank: int
    rows: list[Any]  # [R] int64 each: packing.source of the teacher's sequences, or NONE


@dataclass(frozen=True)
class Job:
    """One micro-batch of one of the student's data-parallel ranks, to be scored by one replica."""

    index: int  # its place in the order of the step
    micro: int
    samples: tuple[int, ...]  # sorted; at least one
    receivers: tuple[tuple[int, Any], ...]  # (student rank, its rows), by rank; some rows for each

    def replica(self, replicas: int) -> int:
        """Which of the teacher's data-parallel replicas scores it.

        With as many replicas as the student has, each one scores its own rank's micro-batches.
        """
        return self.index % replicas


def local_wants(micro_batches: Sequence[MicroBatch], grid: Grid) -> Wants | None:
    """This rank's wants; None where it is not on the last stage.

    Each tensor rank asks for its part of the rows: with sequence parallel those that it holds, else
    one of TP equal runs of rows, which `assemble` puts together again.
    """
    if not grid.is_last_stage:
        return None
    wanted = []
    for micro in micro_batches:
        rows = in_teacher_sequence(micro.sources_T, micro.samples)
        part = -(-len(rows) // grid.tp_size)
        wanted.append(rows[grid.tp_rank * part : (grid.tp_rank + 1) * part])
    return Wants(grid.dp_rank, wanted)


def in_teacher_sequence(sources: Any, samples: Sequence[Sample]) -> Any:
    """[T] rows of student sequences -> rows of the teacher's, aligned by response offset.

    A row before the last token of a prompt that the teacher does not share has no counterpart.
    """
    import torch

    if not any(sample.privileged for sample in samples):
        return sources
    starts = torch.tensor([len(s.prompt.token_ids) for s in samples])
    shifts = torch.tensor([len(s.teacher_prompt) for s in samples]) - starts
    sample, row = split_source(sources)
    sample = sample.clamp_min(0)
    alone = torch.tensor([s.privileged for s in samples])[sample] & (row < starts[sample] - 1)
    return torch.where((sources < 0) | alone, NONE, sources + shifts[sample])


def assemble(part: Any, rows: int, grid: Grid) -> Any:
    """The receiver's part -> [T, Ht] on every tensor rank; [T/TP, Ht] under sequence parallel."""
    import torch.distributed as dist

    if grid.tp_size == 1 or grid.config.sequence or not rows:
        return part
    size = -(-rows // grid.tp_size)
    padded = part.new_zeros(size, part.shape[1])
    padded[: len(part)] = part
    whole = part.new_empty(size * grid.tp_size, part.shape[1])
    dist.all_gather_into_tensor(whole, padded, group=grid.groups.tp)
    return whole[:rows]


def make_jobs(wants: Sequence[Wants | None]) -> list[Job]:
    """Every micro-batch of the step in one order: first micro-batch of every rank first.

    Args:
        wants: of every student rank, by rank.
    """
    ranks = {rank: want for rank, want in enumerate(wants) if want is not None}
    count = len(next(iter(ranks.values())).rows)
    replicas = sorted({want.dp_rank for want in ranks.values()})
    jobs = []
    for micro in range(count):
        for dp_rank in replicas:
            rows = {r: w.rows[micro] for r, w in ranks.items() if w.dp_rank == dp_rank}
            rows = {r: x for r, x in rows.items() if len(x)}
            samples = {int(i) for x in rows.values() for i in split_source(x[x >= 0])[0].unique()}
            index = micro * len(replicas) + dp_rank
            jobs.append(Job(index, micro, tuple(sorted(samples or {0})), tuple(rows.items())))
    return jobs


def share_of_replica(jobs: Sequence[Job], replica: int, replicas: int) -> list[Job]:
    """The jobs of one of the teacher's data-parallel replicas."""
    return [job for job in jobs if job.replica(replicas) == replica]


def teacher_sequences(samples: Sequence[Sample], max_positions: int) -> list[tuple[int, ...]]:
    """Token ids that the teacher reads of each sample.

    Raises:
        UserError: a sequence is longer than the teacher's context.
    """
    made = [sample.teacher_prompt + sample.response_ids for sample in samples]
    longest = max(map(len, made))
    if longest > max_positions:
        raise UserError(
            f"a sequence of {longest} tokens for a teacher of {max_positions} positions",
            expected="teacher prompts and responses that fit",
            fix="shorten teacher_prompt, or lower rollout.max_new_tokens",
        )
    return made
