"""Requests on their way to servers: which server, when again, and whose weights are believed.

Everything here runs on one event loop. A job stays in the queue until a server that holds verified
weights has room. What a server answers is believed only if the request was sent and answered within
one unbroken life of the server's weights, and every token names weights verified in that life; else
it is sampled again. While weights are pushed, nothing is sent and no answer is judged.
"""

import asyncio
import secrets
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from megaopd.data.types import FinishReason, Sample
from megaopd.errors import UserError
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.http import BadAnswer, ServerError, backoff
from megaopd.rollout.jobs import Attempt, Job, Life
from megaopd.rollout.records import (
    Leg,
    Limits,
    UnknownWeights,
    generate_body,
    read_leg,
)

if TYPE_CHECKING:
    from megaopd.rollout.server import Server

ABORT_AGAIN_S = 1.0  # an abort that overtakes its request is not heard
ABORT_GRACE_S = 15.0  # an aborted request that has not answered by then is given up
# The server that knows a prompt is taken unless it has more outstanding tokens than this.
IMBALANCE, SLACK_REQUESTS = 1.25, 2


class GivenUp(Exception):
    """The server is lost, or its weights are: the request goes elsewhere."""


class Dispatcher:
    """Sends jobs to servers and delivers their samples.

    Args:
        tag: the name on a server of a version of the weights.
        lost: told of a server that did not answer as it should.
    """

    def __init__(
        self,
        config: ServerConfig,
        servers: Sequence["Server"],
        limits: Limits,
        *,
        tag: Callable[[int], str],
        lost: Callable[["Server", str], None],
    ) -> None:
        self.config, self.servers, self.limits = config, servers, limits
        self.version = -1  # of the engine
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.listeners: set[Callable[[], None]] = set()  # called when a server's state changed
        self._tag, self._lost = tag, lost
        self._queue: deque[Job] = deque()
        self._lives = {s.name: Life(s.incarnation) for s in servers}
        self._tasks: set[asyncio.Task[None]] = set()
        self._run_id, self._sent, self._syncs = secrets.token_hex(6), 0, 0
        self._sync_over = asyncio.Event()
        self._sync_over.set()

    # What sessions ask for.

    def submit(self, job: Job) -> None:
        self.counts["requests"] += 1
        self._queue.append(job)
        self._pump()

    def abort(self, job: Job) -> None:
        """Finish with what there is: at once where it is not on a server."""
        if job.over or job.aborted:
            return
        job.aborted = True
        self.counts["aborted"] += 1
        if job.attempt is None:
            self._finish(job, "abort")
        else:
            self._spawn(self._abort(job.attempt))

    # What the engine tells.

    def hold(self) -> None:
        """A sync begins."""
        self._sync_over.clear()
        self._syncs += 1

    @property
    def held(self) -> bool:
        """Whether a sync is under way. From any thread."""
        return not self._sync_over.is_set()

    def release(self) -> None:
        """The sync is over, and every server's state told by `changed`."""
        self._sync_over.set()
        self._pump()

    def changed(self, server: "Server") -> None:
        """Look at a server's state, version and incarnation, some of which changed."""
        life = self._lives[server.name]
        restarted = server.incarnation != life.incarnation
        if restarted or server.state not in ("serving", "syncing"):
            self._lives[server.name] = Life(server.incarnation)
            for attempt in life.attempts:
                if server.state == "unsynced" and not restarted:  # it would go on sampling
                    self._spawn(self._abort(attempt))
                attempt.give_up()
        if server.state == "serving":
            self._lives[server.name].versions[self._tag(server.version)] = server.version
        self._pump()
        self.wake()

    def wake(self) -> None:
        """Let the sessions look at the servers."""
        for listener in tuple(self.listeners):
            listener()

    # The queue.

    def _pump(self) -> None:
        """Send from the head of the queue while there is room."""
        while self._queue and not self.held:
            job = self._queue[0]
            server = None if job.over else self._choose(job)
            if server is None and not job.over:
                return
            self._queue.popleft()
            if server is not None:
                self._send(job, server)

    def _choose(self, job: Job) -> "Server | None":
        """A server with verified weights and room.

        The same prompt goes to the same server (rendezvous hashing of its tokens), whose radix
        cache holds it already, unless that one is clearly busier than the least busy.
        """
        free = [
            server
            for server in self.servers
            if server.state == "serving"
            and len(self._lives[server.name].attempts) < self.config.under_way
        ]
        if len(free) > 1 and job.avoid:
            free = [server for server in free if server.name != job.avoid]
        if len(free) < 2:
            return free[0] if free else None
        key = hash(job.request.prompt.token_ids)
        knows = max(free, key=lambda server: hash((key, server.name)))
        least = min(free, key=lambda server: self._lives[server.name].tokens)
        most = IMBALANCE * self._lives[least.name].tokens + SLACK_REQUESTS * job.cost
        return knows if self._lives[knows.name].tokens <= most else least

    def _send(self, job: Job, server: "Server") -> None:
        if not job.sent:
            job.sent = True
            self.counts["started"] += 1
            self.counts["queue_s"] += monotonic() - job.submitted
        self._sent += 1
        # Ids of one length: SGLang aborts every request whose id begins with the given one.
        rid = f"{self._run_id}-{self._sent:012x}"
        body = generate_body(
            job.request, job.params, job.draft, rid=rid, ends=job.ends, limits=self.limits
        )
        loop = asyncio.get_running_loop()
        answer = loop.create_task(server.client.post("/generate", body))
        answer.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen
        job.attempt = attempt = Attempt(
            job=job,
            server=server,
            life=self._lives[server.name],
            rid=rid,
            version=server.version,
            syncs=self._syncs,
            answer=answer,
            given_up=loop.create_future(),
        )
        attempt.life.add(attempt)
        self._spawn(self._run(attempt))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background; the loop itself keeps no reference to a task."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # One request.

    async def _run(self, attempt: Attempt) -> None:
        """Wait for the answer, and decide what becomes of the job."""
        job = attempt.job
        outcome: Leg | Exception
        try:
            outcome = await self._leg(attempt)
        except (ServerError, BadAnswer, UnknownWeights, GivenUp) as err:
            outcome = err
        finally:
            attempt.answer.cancel()
            attempt.life.discard(attempt)
            job.attempt = None
        if isinstance(outcome, Leg):
            self._take(attempt, outcome)
        elif job.aborted:
            self._finish(job, "abort")
        elif isinstance(outcome, (ServerError, BadAnswer)):
            self._failed(attempt, outcome)
        else:
            self._resample(attempt, outcome)
        self._pump()

    async def _leg(self, attempt: Attempt) -> Leg:
        """What the server sampled, if it can be believed."""
        limit = self.config.request_timeout_s
        either = {attempt.answer, attempt.given_up}
        await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not attempt.answer.done() and not attempt.given_up.done():
            attempt.overdue = True
            await self._abort(attempt)
            if not attempt.answer.done():
                message = f"no answer within {limit:g} s, nor to an abort"
                raise ServerError(attempt.server.url, "/generate", 0, message)
        if not attempt.answer.done():
            raise GivenUp
        answer = attempt.answer.result()
        await self._sync_over.wait()
        if attempt.given_up.done() or attempt.server.incarnation != attempt.life.incarnation:
            raise GivenUp
        unbroken = attempt.version if attempt.syncs == self._syncs else None
        return read_leg(answer, attempt.job.params, attempt.life.versions, unbroken=unbroken)

    async def _abort(self, attempt: Attempt) -> None:
        """Tell the server to stop, until it has answered; give the attempt up when time is up.

        A paused server hears no abort of a request that it has not begun, so a sync is waited for.
        """
        await self._sync_over.wait()
        end = monotonic() + ABORT_GRACE_S
        while True:
            try:
                await attempt.server.client.post(
                    "/abort_request", {"rid": attempt.rid}, timeout=ABORT_GRACE_S
                )
            except ServerError as err:
                self._lost(attempt.server, str(err))
            either = {attempt.answer, attempt.given_up}
            if not any(future.done() for future in either):
                await asyncio.wait(
                    either, timeout=ABORT_AGAIN_S, return_when=asyncio.FIRST_COMPLETED
                )
            if any(future.done() for future in either):
                return
            if monotonic() > end:
                return attempt.give_up()

    # What becomes of a job.

    def _take(self, attempt: Attempt, leg: Leg) -> None:
        """Join a leg; deliver the response, or go on with it."""
        job = attempt.job
        job.draft.extend(leg)
        self.counts["tokens"] += len(leg.tokens)
        if leg.end == "stop" and leg.tokens[-1] in job.ends:
            self._finish(job, "stop")
        elif len(job.draft.tokens) >= job.params.max_new_tokens:
            self._finish(job, "length")
        elif job.aborted:
            self._finish(job, "abort")
        else:
            # Stopped at a sync or by the server, or at an end token that is none of ours.
            self.counts["resumed"] += 1
            if attempt.overdue:
                limit = self.config.request_timeout_s
                slow = BadAnswer(f"no whole response within {limit:g} s")
                self._failed(attempt, slow, pause=not leg.tokens)
            elif not leg.tokens:
                self._failed(attempt, BadAnswer("it ended a response before its first token"))
            else:
                self._again(job)

    def _resample(self, attempt: Attempt, why: Exception) -> None:
        """Drop what came; a server that holds unknown weights gets no more requests."""
        self.counts["resampled"] += 1
        server = attempt.server
        current = isinstance(why, UnknownWeights) and why.current
        if current and server.state == "serving" and attempt.syncs == self._syncs:
            server.state, server.version = "unsynced", -1
            self.changed(server)
        self._again(attempt.job)

    def _failed(
        self, attempt: Attempt, why: ServerError | BadAnswer, *, pause: bool = True
    ) -> None:
        """Send the job again, after a while, or give it up."""
        job, server = attempt.job, attempt.server
        if isinstance(why, ServerError):
            if why.refused:
                return self._deliver(job, _refusal(server, why))
            self._lost(server, str(why))
        self.counts["retries"] += 1
        job.avoid = server.name
        loop = asyncio.get_running_loop()
        loop.call_later(backoff(job.tries) if pause else 0.0, self._retry, attempt, why)

    def _retry(self, attempt: Attempt, why: ServerError | BadAnswer) -> None:
        """After the pause: a server that has gone meanwhile, or was synced, excuses its failure."""
        job, server = attempt.job, attempt.server
        excused = self._lives[server.name] is not attempt.life or attempt.syncs != self._syncs
        if isinstance(why, ServerError) and why.unreachable and server.why:
            excused = True  # the fleet doubts it too, and will say that it is lost, or well
        job.tries += 0 if excused else 1
        if job.tries > self.config.retries and not job.over:
            error = UserError(
                f"prompt {job.request.prompt.id!r} failed {job.tries} times; {server.name}: {why}",
                expected="a response",
                fix="look at the server's log, or raise server.retries or server.request_timeout_s",
            )
            self._deliver(job, error)
        else:
            self._again(job)

    def _again(self, job: Job) -> None:
        """Back to the head of the queue."""
        if job.aborted and not job.over:
            self._finish(job, "abort")
        elif not job.over:
            self._queue.appendleft(job)
            self._pump()

    def _finish(self, job: Job, reason: FinishReason) -> None:
        sample = job.draft.sample(job.request, job.params, reason, version=self.version)
        self._deliver(job, sample)

    def _deliver(self, job: Job, outcome: Sample | UserError) -> None:
        job.over = True
        job.deliver(job, outcome)


def _refusal(server: "Server", why: ServerError) -> UserError:
    """The request was at fault."""
    fix = ""
    if why.status in (401, 403):
        fix = "set server.api_key_env to the name of a variable that holds the server's key"
    return UserError(f"{server.name} refused a request: {why.message}", fix=fix)
