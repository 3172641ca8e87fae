"""Disks that fail and servers that die or hang in the middle of a weight sync.

The tests run in order: each takes the two servers as the one before has left them.
"""

import os
import resource
import signal
import time

import pytest

from megaopd.errors import UserError
from megaopd.rollout import push, transfer
from tests.serving.syncing import (
    NOISE,
    OFTEN,
    base,
    fleet,
    holds,
    loop,
    make_sync,
    model,
    named,
    root,
    weights_of,
)

__all__ = ["base", "fleet", "loop", "make_sync", "root"]  # fixtures


def test_disk_that_cannot_be_written(loop, fleet, make_sync, tmp_path):
    """A file where the directory should be; a limit on the size of files."""
    old, new = model(28), model(29)
    blocked = tmp_path / "file"
    blocked.write_text("")
    sync = make_sync("disk", work_dir=blocked)
    assert make_sync("disk").push(fleet.servers, weights_of(old), 12).failed == {}
    with pytest.raises(UserError, match=f"cannot write weights to {blocked}"):
        sync.push(fleet.servers, weights_of(new), 13)
    sync, limits = make_sync("disk", work_dir=tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write weights to"):
            sync.push(fleet.servers, weights_of(new), 13)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p for p in tmp_path.iterdir() if p != blocked] == []
    for server in fleet.servers:
        assert (server.state, server.version) == ("serving", 12)
        assert holds(loop, server, old) < NOISE


def test_disk_that_a_server_cannot_see(loop, fleet, make_sync, monkeypatch):
    """The server keeps its old weights, and goes on with them."""
    sync, old = make_sync("disk"), model(30)
    assert sync.push(fleet.servers, weights_of(old), 14).failed == {}
    monkeypatch.setattr(push, "export", lambda weights, out, **_: [None for _ in weights])
    report = sync.push(fleet.servers, weights_of(model(31)), 15)
    assert report.failed.keys() == {"server 0", "server 1"}
    for server in fleet.servers:
        assert (server.state, server.version) == ("serving", 14)
        assert named(loop, server) == sync.tag(14)
        assert holds(loop, server, old) < NOISE


def killing(weights, at, action):
    """A stream that does something to a server on its way."""
    for i, item in enumerate(weights):
        if i == at:
            action()
        yield item


def restart(loop, fleet, server):
    loop.run(fleet.bring_up(server))
    assert (server.state, server.version) == ("unsynced", -1)


@pytest.mark.parametrize("method", OFTEN)
def test_a_server_killed_half_way(loop, fleet, make_sync, method):
    """The other one gets its weights, and the one that comes back is given them anew."""
    sync, new = make_sync(method), model(40)
    victim, other = fleet.servers
    assert sync.push(fleet.servers, weights_of(model(41)), 18).failed == {}

    def kill():
        os.killpg(victim.process.group, signal.SIGKILL)

    stream, started = killing(weights_of(new), 30, kill), time.monotonic()
    report = sync.push(fleet.servers, stream, 19)
    assert time.monotonic() - started < 30
    assert next(stream, None) is None  # to its end
    assert report.failed.keys() == {victim.name}
    assert (victim.state, victim.version) == ("unsynced", -1)
    assert (other.state, other.version) == ("serving", 19)
    assert holds(loop, other, new) < NOISE
    restart(loop, fleet, victim)
    assert sync.push(fleet.servers, weights_of(new), 19).failed == {}
    assert (victim.state, victim.version) == ("serving", 19)
    assert holds(loop, victim, new) < NOISE


@pytest.mark.parametrize("method", OFTEN[:2])
def test_a_server_that_hangs_half_way(loop, fleet, make_sync, method, monkeypatch):
    """Rank 0 waits no longer than it said; the stuck group is left, and the next sync makes one."""
    monkeypatch.setattr(transfer, "patience", lambda nbytes: 4.0)
    monkeypatch.setattr(push, "GIVE_UP_S", 1.0)
    sync, new = make_sync(method), model(42)
    if method == "broadcast":
        sync.transport.timeout = 3.0
    victim, other = fleet.servers
    assert sync.push(fleet.servers, weights_of(model(43)), 20).failed == {}

    def stop():
        os.killpg(victim.process.group, signal.SIGSTOP)

    started = time.monotonic()
    report = sync.push(fleet.servers, killing(weights_of(new), 30, stop), 21)
    assert time.monotonic() - started < 30
    assert report.failed.keys() == {victim.name}
    assert (other.state, other.version) == ("serving", 21)
    os.killpg(victim.process.group, signal.SIGKILL)
    restart(loop, fleet, victim)
    monkeypatch.undo()
    assert sync.push(fleet.servers, weights_of(new), 21).failed == {}
    assert holds(loop, victim, new) < NOISE


def test_all_servers_killed(loop, fleet, make_sync):
    """The stream is brought to its end all the same."""
    sync = make_sync("broadcast")
    assert sync.push(fleet.servers, weights_of(model(44)), 22).failed == {}

    def kill():
        for server in fleet.servers:
            os.killpg(server.process.group, signal.SIGKILL)

    stream = killing(weights_of(model(45)), 20, kill)
    report = sync.push(fleet.servers, stream, 23)
    assert next(stream, None) is None
    assert report.failed.keys() == {"server 0", "server 1"}
    assert {server.state for server in fleet.servers} == {"unsynced"}
