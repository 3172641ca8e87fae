"""The SGLang engine: servers that rank 0 talks to, for the whole job.

Rank 0 starts and supervises the servers (`Fleet`), pushes weights to them (`WeightSync`), and sends
requests (`Dispatcher`, through sessions), all on one event loop beside the trainer. The other ranks
only take part in the collectives: the weight stream, and learning what came of it.

A version of the weights has a name of its own on the servers, with a nonce of this engine in it:
what a restarted server, another run, or a failed sync serves is never taken for it.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, Literal, TypeVar

from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.models.stream import exhaust
from megaopd.parallel import broadcast_object
from megaopd.rollout.base import NeedsWeights, Probe, Request, SamplingParams
from megaopd.rollout.command import language_config
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.dispatch import Dispatcher
from megaopd.rollout.http import ServerError
from megaopd.rollout.loop import LoopThread
from megaopd.rollout.member import say
from megaopd.rollout.records import Limits
from megaopd.rollout.server import Fleet, Server
from megaopd.rollout.session import SGLangSession
from megaopd.rollout.sync import WeightSync

T = TypeVar("T")

OCCUPY_S = 120.0  # for memory to be given up or taken back
LOOK_S = 0.2  # between two looks at the servers, where a sync waits for one
COUNTERS = ("requests", "retries", "resampled", "aborted", "resumed", "tokens")


class SGLangEngine:
    """The student on SGLang servers; see base.RolloutEngine. Its construction is a collective.

    The servers are started (or attached to) and healthy when it returns, and hold no weights of
    ours. Close it, or use it as a context manager.

    Args:
        hf_dir: the checkpoint whose config defines the model.
        eos_ids: a response ends with any of these tokens, which is part of it.
        dtype: of the weights on the servers.
        device: what they run on.
        run_dir: logs go below it, and weights on their way by disk.
        gpus: that our servers may use; empty: the first ones.

    Raises:
        UserError: a server does not start, with the end of its log; on every rank.
    """

    shared = True

    def __init__(
        self,
        config: ServerConfig,
        hf_dir: str | Path,
        *,
        eos_ids: Sequence[int],
        dtype: str,
        device: Literal["cpu", "cuda"],
        run_dir: Path,
        rank: int,
        world_size: int,
        gpus: Sequence[int] = (),
    ) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.weight_version = -1
        self._tier: ServingTier | None = None

        def start() -> None:
            self._tier = ServingTier(
                config,
                Path(hf_dir),
                eos_ids=frozenset(eos_ids),
                dtype=dtype,
                device=device,
                run_dir=run_dir,
                gpus=gpus,
            )

        self._on_rank_0(start)

    def update_weights(
        self, weights: Iterable[tuple[str, Any]], version: int, *, probe: Probe | None = None
    ) -> dict[str, float]:
        """Push a stream of (Hugging Face name, full tensor) to every server. A collective.

        Requests under way are paused and go on under the new weights. A server that fails is taken
        out of rotation until the next sync; the others go on. If none is reached, a stream that can
        be read again is sent again once one is back, server.retries times.

        Returns:
            Bytes, and seconds by phase; on every rank.

        Raises:
            UserError: a tensor missing, left over or of another shape, or no server took the
                weights; on every rank. The old version stays named.
        """
        tries = 1 if iter(weights) is weights else 1 + self.config.retries
        metrics = None
        while metrics is None:
            tries -= 1
            if self.rank != 0:
                exhaust(weights)
            metrics = self._on_rank_0(
                lambda last=tries == 0: self._here().push(weights, version, probe, last)
            )
        self.weight_version = version
        return metrics

    def session(self) -> SGLangSession:
        """Somewhere to submit requests; on rank 0 alone."""
        return self._here().session()

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        """One sample per request, in order; on rank 0 alone.

        Raises:
            UserError: an id outside the vocabulary, a prompt too long (nothing was sent then), or a
                request that no server could answer.
            NeedsWeights: no server has verified weights (any more); the samples are forgotten.
        """
        session = self.session()
        done: dict[int, Sample] = {}
        try:
            session.check(requests, params)
            tickets = [session.submit(request, params) for request in requests]
            while session.pending:
                done.update(session.wait())
        finally:
            session.close()
        return [done[ticket] for ticket in tickets]

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, to log; on ranks other than 0 empty.

        requests; tokens sampled; retries after failures of a server; resampled: answers dropped
        because the server or its weights were lost; resumed: responses that came in another leg;
        aborted by sessions; queue_s: mean seconds until a request is sent; servers serving now.
        """
        return {} if self._tier is None else self._tier.metrics()

    def release(self) -> None:
        """Servers give their weights and KV cache up. On a CPU they say yes and keep them."""
        self._on_rank_0(lambda: self._here().release())

    def resume(self, what: Literal["weights", "kv_cache"]) -> None:
        """Servers take a part of their memory back."""
        self._on_rank_0(lambda: self._here().resume(what))

    def close(self) -> None:
        """Stop the servers that were started. Safe to call again."""
        tier, self._tier = self._tier, None
        if tier is not None:
            tier.close()

    def __enter__(self) -> "SGLangEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _here(self) -> "ServingTier":
        assert self.rank == 0, "rank 0 speaks for all ranks"
        assert self._tier is not None, "closed"
        return self._tier

    def _on_rank_0(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, or the UserError that it raises there, on every rank."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = action()
            except UserError as err:
                outcome = err
        if self.world_size > 1:
            outcome = broadcast_object(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return outcome


class ServingTier:
    """What rank 0 has: servers, the loop that speaks to them, and the way weights take."""

    def __init__(
        self,
        config: ServerConfig,
        model_dir: Path,
        *,
        eos_ids: frozenset[int],
        dtype: str,
        device: Literal["cpu", "cuda"],
        run_dir: Path,
        gpus: Sequence[int],
    ) -> None:
        self.config, self.eos_ids = config, eos_ids
        self._failure: UserError | None = None
        self._released: dict[str, int] = {}  # server name -> incarnation
        self.fleet = Fleet(
            config,
            model_dir,
            device=device,
            dtype=dtype,
            log_dir=run_dir / "servers",
            gpus=gpus,
        )
        self.loop = LoopThread()
        try:
            self.sync = WeightSync(
                config,
                model_dir=model_dir,
                work_dir=run_dir / "weights",
                nonce=secrets.token_hex(4),
                run=self.loop.run,
                device=device,
                dtype=dtype,
            )
            self.loop.run(self.fleet.start())
        except UserError:
            self.loop.run(self.fleet.stop())
            self.loop.close()
            raise
        self.dispatcher = Dispatcher(
            config,
            self.fleet.servers,
            limits_of(model_dir, self.fleet.servers),
            tag=self.sync.tag,
            lost=self.fleet.lost,
        )
        self.loop.start(self._watch())

    def session(self) -> SGLangSession:
        return SGLangSession(
            self.loop, self.dispatcher, eos_ids=self.eos_ids, ready=self.check_ready
        )

    def check_ready(self) -> None:
        """Whether requests can finish without the caller's doing. From any thread.

        Raises:
            NeedsWeights: servers run, and none of them holds verified weights or is getting them.
            UserError: the servers are lost for good.
        """
        if self._failure is not None:
            raise self._failure
        states = {server.state for server in self.fleet.servers}
        syncing = self.dispatcher.held or "syncing" in states
        if "unsynced" in states and "serving" not in states and not syncing:
            raise NeedsWeights

    def push(
        self, weights: Iterable[tuple[str, Any]], version: int, probe: Probe | None, last: bool
    ) -> dict[str, float] | None:
        """Weights to every server that is there; brings the stream to its end in any case.

        Returns:
            What was measured; None where no server was reached, unless this is the `last` try.
        """
        try:
            servers = self.loop.run(self._begin_sync())
        except UserError:
            exhaust(weights)
            raise
        try:
            report = self.sync.push(servers, weights, version, probe=probe)
        finally:
            self.loop.run(self._end_sync(servers, version))
        for server in servers:
            if server.name in report.unreachable:
                self.loop.call(self.fleet.lost, server, report.failed[server.name])
        if len(report.failed) == len(servers):
            failure = f"weights of version {version} reached no server by {self.config.method}: "
            failure += "; ".join(f"{name}: {why}" for name, why in report.failed.items())
            if len(report.unreachable) == len(servers) and not last:
                return say(f"{failure}; again when one is back")
            fix = "look at the servers' logs, or set server.sync to another method"
            raise UserError(failure, fix=fix)
        self.dispatcher.version = version
        return report.metrics()

    def metrics(self) -> dict[str, float]:
        """Counters since the last call."""
        counts = self.loop.run(self._take_counts())
        serving = sum(server.state == "serving" for server in self.fleet.servers)
        return {f"server/{name}": counts.get(name, 0.0) for name in COUNTERS} | {
            "server/queue_s": counts.get("queue_s", 0.0) / max(counts.get("started", 0.0), 1.0),
            "server/serving": float(serving),
        }

    def release(self) -> None:
        """Of servers that have nothing to do; their weights are gone then."""
        self._released = {s.name: s.incarnation for s in self.fleet.servers if s.state == "serving"}
        for server in self.fleet.servers:
            if server.name in self._released:
                server.state, server.version = "unsynced", -1
        self._occupy("release", ["kv_cache", "weights"])

    def resume(self, what: str) -> None:
        """On the servers that released it and were not restarted since."""
        self._occupy("resume", [what])

    def _occupy(self, verb: str, tags: list[str]) -> None:
        async def ask(server: Server) -> None:
            try:
                await server.client.post(
                    f"/{verb}_memory_occupation", {"tags": tags}, timeout=OCCUPY_S
                )
            except ServerError as err:
                self.fleet.lost(server, str(err))

        async def ask_all() -> None:
            servers = [s for s in self.fleet.servers if self._released.get(s.name) == s.incarnation]
            for server in servers:
                self.dispatcher.changed(server)
            await asyncio.gather(*(ask(server) for server in servers))

        self.loop.run(ask_all())

    def close(self) -> None:
        self.sync.close()
        self.loop.run(self.fleet.stop())
        self.loop.close()

    async def _watch(self) -> None:
        """Keep the servers alive; remember why that ended."""
        try:
            await self.fleet.supervise(self.dispatcher.changed)
        except UserError as err:
            self._failure = err
            self.dispatcher.wake()

    async def _begin_sync(self) -> list[Server]:
        """Hold requests back; the servers that can take weights, of which there is one at least."""
        end = monotonic() + self.config.start_timeout_s
        while True:
            there = [s for s in self.fleet.servers if s.state in ("unsynced", "serving")]
            if any(not server.why for server in there):  # the fleet does not doubt all of them
                self.dispatcher.hold()
                return there
            if self._failure is not None:
                raise self._failure
            if monotonic() > end:
                raise UserError(
                    f"no SGLang server came back within {self.config.start_timeout_s:g} s",
                    fix="look at the servers' logs, or raise server.start_timeout_s",
                )
            await asyncio.sleep(LOOK_S)

    async def _end_sync(self, servers: Sequence[Server], version: int) -> None:
        """The push has left a state and a version on every server: let requests go on."""
        serving = [server for server in servers if server.state == "serving"]
        newer = any(server.version == version for server in serving)
        for server in servers:
            # It was broken off; or it kept its old weights, while another one serves the new.
            behind = newer and server in serving and server.version != version
            if server.state == "syncing" or behind:
                server.state, server.version = "unsynced", -1
            self.dispatcher.changed(server)
        self.dispatcher.release()

    async def _take_counts(self) -> dict[str, float]:
        counts = dict(self.dispatcher.counts)
        self.dispatcher.counts.clear()
        return counts


def limits_of(model_dir: Path, servers: Sequence[Server]) -> Limits:
    """What a request may ask for: the strictest of the model's config and all servers'."""
    config = language_config(model_dir)
    positions = [int(config["max_position_embeddings"])]
    # A response that stops at a sync is resumed with all but its last token as the prompt.
    prompts = [server.info.get("max_req_input_len") for server in servers]
    positions += [int(longest) + 1 for longest in prompts if longest]
    masks = [
        int(s.info.get("sampling_mask_max_tokens") or 0) if s.capabilities.sampling_mask else 0
        for s in servers
    ]
    return Limits(
        vocab=int(config["vocab_size"]),
        max_positions=min(positions),
        mask_tokens=min(masks),
        seeded=any(s.info.get("enable_deterministic_inference") for s in servers),
    )
