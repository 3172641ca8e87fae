"""Real SGLang servers: started, killed, hung, restarted, attached to, and never left behind.

The tests of one fleet run in order: each takes the server as the one before has left it.
"""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from megaopd.errors import UserError
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.loop import LoopThread
from megaopd.rollout.server import Fleet
from tests.dist.models import save_tiny

pytest.importorskip("sglang", reason="SGLang is not installed: want=sglang bash launch/env.sh")

KEY_NAME, KEY = "MEGAOPD_TEST_KEY", "a-key-that-nobody-reads"
INTERVAL_S, MISSES, TIMEOUT_S = 1.0, 3, 2.0
START_S = 240.0  # 10 to 20 s on an idle machine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen3", tied=False)


@pytest.fixture(scope="module")
def loop():
    thread = LoopThread()
    yield thread
    thread.close()


class Watched:
    """A fleet of one server that is looked after, and what it told of it."""

    def __init__(self, loop, config, model, log_dir):
        self.loop, self.changes, self.supervisor = loop, [], None
        self.fleet = Fleet(config, model, device="cpu", dtype="float32", log_dir=log_dir)
        self.server = self.fleet.servers[0]

    def start(self):
        self.loop.run(self.fleet.start())
        self.supervisor = self.loop.run(self._supervise())
        return self

    async def _supervise(self):
        return asyncio.ensure_future(self.fleet.supervise(self._changed))

    def _changed(self, server):
        self.changes.append(server.state)

    def serve(self, version):
        """What a sync does in the end."""
        self.server.state, self.server.version = "serving", version
        self.changes.clear()

    def stop(self):
        self.loop.run(self.fleet.stop())


@pytest.fixture(scope="module")
def own(loop, model, tmp_path_factory):
    os.environ[KEY_NAME] = KEY
    config = ServerConfig(api_key_env=KEY_NAME, health_interval_s=INTERVAL_S, restarts=2)
    watched = Watched(loop, config, model, tmp_path_factory.mktemp("logs")).start()
    yield watched
    watched.stop()
    assert not psutil.pid_exists(watched.server.process.group)
    del os.environ[KEY_NAME]


@pytest.fixture(scope="module")
def attached(loop, own, model, tmp_path_factory):
    config = ServerConfig(
        addresses=(own.server.url,), api_key_env=KEY_NAME, health_interval_s=INTERVAL_S
    )
    watched = Watched(loop, config, model, tmp_path_factory.mktemp("none")).start()
    yield watched
    watched.stop()


def until(condition, seconds, what):
    """Seconds until it held."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, what
        time.sleep(0.02)
    return time.monotonic() - begun


def command_lines(pids):
    lines = []
    for pid in pids:
        try:
            lines += psutil.Process(pid).cmdline()
        except psutil.NoSuchProcess:
            continue
    return lines


def test_starts(own):
    server = own.server
    assert (server.state, server.incarnation, server.version) == ("unsynced", 1, -1)
    assert server.alive() and server.capabilities.update_session and server.capabilities.version
    assert server.info["model_path"] == str(own.fleet.model_dir)
    assert server.url.startswith("http://127.0.0.1:")
    assert "fired up" in server.log_tail()


def test_the_key_is_asked_for_and_not_shown(own):
    server = own.server
    stranger = own.fleet.config.__class__(addresses=(server.url,), health_interval_s=INTERVAL_S)
    fleet = Fleet(
        stranger, own.fleet.model_dir, device="cpu", dtype="float32", log_dir=server.log.parent
    )
    with pytest.raises(UserError, match="refuses our key"):
        own.loop.run(fleet.start())
    group = [server.process.group, *server.process.workers()]
    assert KEY not in " ".join(command_lines(group))
    assert KEY not in str(server.info)
    assert server.log.stat().st_mode & 0o077 == 0  # SGLang writes its configuration there


def test_a_paused_server_is_not_lost(own):
    client, loop = own.server.client, own.loop
    own.serve(1)
    for mode in ("retract", "in_place"):
        loop.run(client.post("/pause_generation", {"mode": mode}))
        time.sleep((MISSES + 1) * INTERVAL_S)
        loop.run(client.post("/continue_generation", {}))
    assert own.server.state == "serving" and not own.changes


def test_an_attached_server_whose_weights_others_change(attached, own):
    assert attached.server.state == "unsynced" and attached.server.incarnation == 1
    attached.serve(1)
    time.sleep(2.5 * INTERVAL_S)
    assert attached.server.state == "serving"
    body = {"new_version": "of-another-run", "abort_all_requests": False}
    own.loop.run(own.server.client.control("/update_weight_version", body))
    until(lambda: attached.server.state == "unsynced", 3 * INTERVAL_S, "not noticed")
    assert attached.server.incarnation == 2 and attached.server.version == -1


def test_killed_and_restarted(own, attached):
    server, group = own.server, own.server.process.group
    own.serve(2)
    attached.serve(2)
    before = server.incarnation, attached.server.incarnation
    os.killpg(group, signal.SIGKILL)
    own.loop.run(told(own, "a request broke"))
    until(lambda: server.state == "lost", 2.0, "its death was not seen")
    until(lambda: server.state == "unsynced", START_S, "it was not started again")
    assert own.changes == ["lost", "starting", "unsynced"]
    assert (server.incarnation, server.version) == (before[0] + 1, -1)
    assert server.process.group != group
    assert server.log.read_text(errors="replace").count("=== server 0, start ") == 2
    # The other run, which only knows the address, has lost its weights too.
    until(lambda: attached.server.incarnation == before[1] + 1, 10.0, "a restart was not seen")
    assert attached.server.state == "unsynced" and attached.changes[-1] == "unsynced"


async def told(watched, why):
    watched.fleet.lost(watched.server, why)


def test_hung_and_restarted(own):
    server, group = own.server, own.server.process.group
    own.serve(3)
    os.killpg(group, signal.SIGSTOP)
    period = max(INTERVAL_S, TIMEOUT_S)
    took = until(lambda: server.state == "lost", 60, "the hang was not seen")
    assert took < period * MISSES + TIMEOUT_S + 1
    until(lambda: server.state == "unsynced", START_S, "it was not started again")
    assert server.incarnation == 3
    assert not psutil.pid_exists(group)


def test_a_hung_scheduler_and_no_restart_left(own):
    """Its front end goes on answering; and config.restarts = 2 are used up."""
    server = own.server
    own.serve(4)
    for pid in server.process.workers():
        os.kill(pid, signal.SIGSTOP)
    period = max(INTERVAL_S, TIMEOUT_S)
    took = until(lambda: server.state == "lost", 60, "the hang was not seen")
    assert took < period * MISSES + TIMEOUT_S + 1
    until(own.supervisor.done, 10.0, "the fleet did not give up")
    with pytest.raises(UserError, match="lost, after 2 restarts: its scheduler does not answer"):
        own.supervisor.result()
    assert server.gone and not server.alive()


def test_a_server_that_cannot_start(loop, model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    (broken / "model.safetensors").write_text("not a checkpoint")
    fleet = Fleet(ServerConfig(), broken, device="cpu", dtype="float32", log_dir=tmp_path)
    with pytest.raises(UserError) as caught:
        loop.run(fleet.start())
    text = str(caught.value)
    assert text.count("SafetensorError: ") == 1 and "server_0.log" in text
    assert len(text.splitlines()) <= 10
    assert not fleet.servers[0].alive()


def test_a_trainer_that_is_killed_leaves_nothing(model, tmp_path):
    script = f"""
        import asyncio
        from pathlib import Path
        from megaopd.rollout.config import ServerConfig
        from megaopd.rollout.server import Fleet

        async def main():
            where = Path({str(tmp_path)!r})
            fleet = Fleet(
                ServerConfig(), Path({str(model)!r}), device="cpu", dtype="float32", log_dir=where
            )
            await fleet.start()
            print(fleet.servers[0].process.group, flush=True)
            await asyncio.sleep(1000)

        asyncio.run(main())
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    group = int(trainer.stdout.readline())
    members = [p for p in psutil.pids() if psutil.pid_exists(p) and same_group(p, group)]
    assert len(members) > 2
    trainer.kill()
    trainer.wait()
    until(lambda: not any(psutil.pid_exists(p) for p in members), 15.0, "some of it survived")


def same_group(pid, group):
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False
