"""A session on SGLang servers: submits from the trainer's thread, waits for what has finished."""

import itertools
import queue
from collections.abc import Callable, Iterable, Sequence
from time import monotonic

from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.rollout.base import Request, SamplingParams, check_requests
from megaopd.rollout.dispatch import Dispatcher
from megaopd.rollout.jobs import Job
from megaopd.rollout.loop import LoopThread
from megaopd.rollout.records import check_law


class SGLangSession:
    """Requests under way on one engine; see base.Session.

    A request that is aborted before a server has begun it comes out as a sample without tokens,
    of the engine's weight version.

    Args:
        eos_ids: end every response, beside the stop ids of its law.
        ready: raises NeedsWeights or UserError where no server will answer before a sync, or ever.
    """

    def __init__(
        self,
        loop: LoopThread,
        dispatcher: Dispatcher,
        *,
        eos_ids: frozenset[int],
        ready: Callable[[], None],
    ) -> None:
        self._loop, self._dispatcher, self._eos_ids = loop, dispatcher, eos_ids
        self._ready = ready
        self._jobs: dict[int, Job] = {}
        self._tickets = itertools.count()
        # From the loop: what has finished, or None: look at the servers again.
        self._news: queue.SimpleQueue[tuple[int, Sample | UserError] | None] = queue.SimpleQueue()
        self._errors: list[UserError] = []  # to be raised when the samples before are handed out
        loop.call(dispatcher.listeners.add, self._look)

    @property
    def pending(self) -> int:
        """Requests submitted and not handed out by `wait` yet."""
        return len(self._jobs) + len(self._errors)

    def check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        """Refuse what `submit` would refuse."""
        limits = self._dispatcher.limits
        check_requests(requests, params, vocab=limits.vocab, max_positions=limits.max_positions)
        check_law(params, limits)

    def submit(self, request: Request, params: SamplingParams) -> int:
        """Queue a request without waiting; its ticket.

        Raises:
            UserError: an id outside the vocabulary, too many tokens, or a law that the servers
                cannot sample from. Nothing was sent.
        """
        self.check([request], params)
        ends = self._eos_ids.union(params.stop_ids) if params.stop_ids else self._eos_ids
        job = Job(request, params, ends, next(self._tickets), self._deliver)
        self._jobs[job.ticket] = job
        self._loop.call(self._dispatcher.submit, job)
        return job.ticket

    def wait(self, timeout: float | None = None) -> list[tuple[int, Sample]]:
        """Block until at least one request has finished: (ticket, sample) of all that have.

        An empty list where nothing is pending or `timeout` seconds have passed.

        Raises:
            NeedsWeights: nothing can finish before the next sync; requests stay queued.
            UserError: a request that no server could answer, which is then forgotten; or no server
                is left.
        """
        end = None if timeout is None else monotonic() + timeout
        found = self._collect(block_s=0.0)
        while not found and self.pending:
            if self._errors:
                raise self._errors.pop(0)
            self._ready()
            left = None if end is None else end - monotonic()
            if left is not None and left <= 0:
                break
            found = self._collect(block_s=left)
        return found

    def abort(self, tickets: Iterable[int] | None = None) -> None:
        """Stop these (all: None). They come out of `wait` with finish_reason "abort", with the
        tokens, log-probs and spans that they have; one that has just finished, as it finished.
        """
        for ticket in list(self._jobs) if tickets is None else tickets:
            job = self._jobs.get(ticket)
            if job is not None:
                self._loop.call(self._dispatcher.abort, job)

    def close(self) -> None:
        """Abort what is under way and forget it."""
        self._loop.call(self._dispatcher.listeners.discard, self._look)
        self.abort()
        self._jobs.clear()
        self._errors.clear()

    def _collect(self, block_s: float | None) -> list[tuple[int, Sample]]:
        """All that has finished; waits for the first news, at most `block_s` seconds."""
        found = []
        try:
            news = self._news.get(timeout=block_s) if block_s != 0.0 else self._news.get_nowait()
            while True:
                if news is not None and self._jobs.pop(news[0], None) is not None:
                    ticket, outcome = news
                    if isinstance(outcome, UserError):
                        self._errors.append(outcome)
                    else:
                        found.append((ticket, outcome))
                news = self._news.get_nowait()
        except queue.Empty:
            return found

    def _deliver(self, job: Job, outcome: Sample | UserError) -> None:
        """On the loop's thread."""
        self._news.put((job.ticket, outcome))

    def _look(self) -> None:
        """On the loop's thread: a server's state changed."""
        self._news.put(None)
