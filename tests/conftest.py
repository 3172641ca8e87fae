"""Fixtures for every test."""

from collections.abc import Iterator

import pytest

from tests.dist.pool import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Up to four processes with torch.distributed, started by the first test that runs on them."""
    pool = Ranks(4)
    yield pool
    pool.close()
