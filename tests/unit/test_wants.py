"""Which rows of which sequences are wanted of a teacher, and who scores them."""

import pytest
import torch

from megaopd.data.packing import pad_batch, source
from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError
from megaopd.trainer.teachers.wants import (
    NONE,
    Wants,
    in_teacher_sequence,
    make_jobs,
    share_of_replica,
    teacher_sequences,
)


def sample(prompt, response, told=None):
    one = Prompt("p", tuple(prompt), "", None, "", {}, None if told is None else tuple(told))
    return Sample(one, tuple(response), None, "stop", 0)


def made():
    return [
        sample([1, 2], [3, 4, 5]),
        sample([6, 7], [8], told=[9, 9, 9, 6, 7]),
        sample([1, 2, 3, 4], [5, 6], told=[9]),
    ]


def test_rows_are_aligned_by_response_offset():
    samples = made()
    sources = pad_batch(samples, pad_id=0).sources
    assert sources[0].tolist() == [0, 1, 2, 3, 4, NONE]
    moved = in_teacher_sequence(sources, samples)
    assert moved[0].tolist() == sources[0].tolist()  # the prompt is shared: every row is
    # The row that predicts the first response token stands at the end of either prompt.
    assert moved[1].tolist() == [NONE, source(1, 4), source(1, 5), NONE, NONE, NONE]
    assert moved[2].tolist() == [NONE] * 3 + [source(2, row) for row in (0, 1, 2)]
    sequences = teacher_sequences(samples, 8)
    for number, one in enumerate(samples):
        start, told = len(one.prompt.token_ids) - 1, len(one.teacher_prompt) - 1
        for offset, token in enumerate(one.response_ids):
            assert moved[number, start + offset] == source(number, told + offset)
            assert sequences[number][told + offset + 1] == token


def test_a_sequence_beyond_the_teachers_context_is_refused():
    with pytest.raises(UserError, match="6 tokens for a teacher of 5 positions"):
        teacher_sequences(made(), 5)


def test_jobs_hold_every_wanted_row_once():
    def rows(*numbers):
        return torch.tensor([NONE if n < 0 else source(n, 1) for n in numbers], dtype=torch.int64)

    # Ranks 1 and 2 share data-parallel rank 0, rank 3 is 1; rank 0 is on an earlier stage.
    wants = [
        None,
        Wants(0, [rows(0, 2), rows(4)]),
        Wants(0, [rows(2), rows()]),
        Wants(1, [rows(1), rows(-1)]),
    ]
    jobs = make_jobs(wants)
    assert [(job.index, job.micro, job.samples) for job in jobs] == [
        (0, 0, (0, 2)),
        (1, 0, (1,)),
        (2, 1, (4,)),
        (3, 1, (0,)),  # only padding is wanted: some sequence must stand for it
    ]
    assert [[rank for rank, _ in job.receivers] for job in jobs] == [[1, 2], [3], [1], [3]]
    for replicas in (1, 2, 3):
        shares = [share_of_replica(jobs, r, replicas) for r in range(replicas)]
        assert sorted(job.index for share in shares for job in share) == [0, 1, 2, 3]
    # As many replicas as the student has: each scores its own rank's.
    assert [job.receivers[0][0] for job in share_of_replica(jobs, 1, 2)] == [3, 3]
