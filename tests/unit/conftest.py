"""Fixtures of several files."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def make_rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """make_rig(count, **server settings): a dispatcher on fake servers."""
    from tests.unit import fake_servers

    yield from fake_servers.rigs(monkeypatch)
