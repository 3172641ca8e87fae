"""The pool itself: order of results, isolation of cases, and what a failure looks like."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist.pool import Ranks


def total(x, scale=1):
    value = torch.tensor([x * (dist.get_rank() + 1.0)])
    dist.all_reduce(value)
    assert os.environ["WORLD_SIZE"] == str(dist.get_world_size())
    return dist.get_rank(), value * scale


def fails_on_one(rank):
    if dist.get_rank() == rank:
        raise ValueError("this rank is broken")
    dist.all_reduce(torch.ones(1))


def sleeps():
    if dist.get_rank() == 1:
        time.sleep(60)


def test_results_by_rank_and_changing_worlds(ranks):
    for world, want in ((2, 3.0), (1, 1.0), (3, 6.0)):
        got = ranks.run(total, world, 1, scale=2)
        assert [rank for rank, _ in got] == list(range(world))
        assert all(value.item() == 2 * want for _, value in got)


@pytest.mark.slow
def test_failures_name_the_rank_and_the_pool_recovers():
    pool = Ranks(2)
    try:
        with pytest.raises(AssertionError, match=r"rank 1 of 2 failed(.|\n)*this rank is broken"):
            pool.run(fails_on_one, 2, 1)
        with pytest.raises(AssertionError, match=r"no answer from ranks \[0, 1\](.|\n)*in sleeps"):
            pool.run(sleeps, 2, timeout=2)
        assert len(pool.run(total, 2, 1)) == 2
    finally:
        pool.close()
