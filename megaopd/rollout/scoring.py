"""A teacher on SGLang servers: sequences go out, log-probs of given tokens come back.

Nothing is sampled. Every sample is one request for its sampled tokens and, if wanted, the teacher's
own top-k lists; a support of the student costs more requests (score_tables.py says what is asked
and how answers are read). Requests are sent in calls of a bounded number of tokens, a bounded
number of calls at once to each server; a call that breaks goes to another server, after a pause.

Scores are at temperature 1, whatever the sampling parameters say: SGLang scales only the log-probs
of tokens that it samples. A temperature other than 1 is refused before it gets here
(objectives/remote.py).

A sequence that does not fit is refused before it is sent: an id outside the vocabulary kills a
server, and one that takes too long sequences may cut them silently (--allow-auto-truncate).
"""

import asyncio
import contextlib
import re
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from megaopd.errors import UserError
from megaopd.rollout.http import BadAnswer, ServerClient, ServerError, backoff
from megaopd.rollout.score_tables import (
    Job,
    ScoreRequest,
    TokenScores,
    fill_lists,
    piece_job,
    plan_pieces,
    read_piece,
    read_whole,
    whole_job,
)

PROBE_TIMEOUT_S = 30.0
CHECKS_IDS = (0, 5, 23)  # a release that refuses token_ids_logprob outside its vocabulary


@dataclass(frozen=True)
class ScoringLimits:
    """How much is under way at once, and for how long; see trainer.config.RemoteTeacherConfig."""

    batch_tokens: int = 16384  # of the sequences of one call
    calls: int = 4  # under way on one server
    timeout_s: float = 600.0  # of one call
    retries: int = 8  # of one sequence, on any server; 90 s with the pauses between them
    max_union: int = 4096  # ids of one request about a student's support
    max_entries: int = 2_000_000  # log-probs of one sample's support that a server has to send


class _Counting(ServerClient):
    """Counts the bytes of answers."""

    received = 0

    def _open(self) -> aiohttp.ClientSession:
        before = self._session
        session = super()._open()
        if session is not before:
            trace = aiohttp.TraceConfig()
            trace.on_response_chunk_received.append(self._count)
            trace.freeze()
            session.trace_configs.append(trace)
        return session

    async def _count(self, _session: Any, _context: Any, params: Any) -> None:
        self.received += len(params.chunk)


@dataclass
class _Server:
    """One server, and what waits for it."""

    client: _Counting
    max_tokens: int = 0  # of a sequence, exclusive; 0: it does not say
    model: str = ""
    release: tuple[int, ...] = ()
    flat: bool = False  # whether it sends tables as base64
    outstanding: int = 0  # tokens that were given to it and not answered
    resting_until: float = 0.0  # after a failure
    waiting: deque[tuple[Job, asyncio.Future[Any]]] = field(default_factory=deque)
    work: asyncio.Condition = field(default_factory=asyncio.Condition)


class Scorer:
    """Scores sequences on one or more servers of the same teacher. Use from one event loop.

    Args:
        urls: such as http://10.0.0.7:30000.
        vocab_size: the teacher's ids; 0: ask the server.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str = "",
        vocab_size: int = 0,
        limits: ScoringLimits | None = None,
    ) -> None:
        assert urls, "a scorer without a server"
        self.limits = limits or ScoringLimits()
        self.vocab = vocab_size
        self.max_tokens = 0  # of a sequence, exclusive; 0: no server says
        self._servers = [_Server(_Counting(url, api_key=api_key)) for url in urls]
        self._workers: list[asyncio.Task[None]] = []
        self.counts = dict.fromkeys(
            ("samples", "requests", "calls", "failed_calls", "prompt_tokens", "cached_tokens"), 0
        )

    async def open(self) -> None:
        """Ask every server what it is, and start.

        Raises:
            UserError: one does not answer, or they serve different models.
        """
        await asyncio.gather(*map(self._probe, self._servers))
        models = {server.model for server in self._servers}
        if len(models) > 1:
            raise UserError(
                "the teacher's servers serve different models: " + ", ".join(sorted(models)),
                expected="one teacher",
                fix="correct remote_teacher.addresses",
            )
        limits = [server.max_tokens for server in self._servers if server.max_tokens]
        self.max_tokens = min(limits, default=0)
        if not self.vocab:
            self.vocab = await _ask_vocab(self._servers[0])
        self._workers = [
            asyncio.create_task(self._work(server))
            for server in self._servers
            for _ in range(self.limits.calls)
        ]

    async def _probe(self, server: _Server) -> None:
        client = server.client
        try:
            routes = await client.get("/openapi.json", timeout=PROBE_TIMEOUT_S)
            info = await client.server_info(timeout=PROBE_TIMEOUT_S)
        except ServerError as err:
            raise UserError(
                f"the teacher's server {client.url} does not answer: {err}",
                expected="a running SGLang server",
                fix="start it, or correct remote_teacher.addresses",
            ) from err
        schema = routes.get("components", {}).get("schemas", {}).get("GenerateReqInput", {})
        server.flat = "return_flat_raw_top_logprobs_b64" in schema.get("properties", {})
        server.max_tokens = int(info.get("max_req_input_len") or 0)
        server.model = str(info.get("model_path", ""))
        server.release = tuple(map(int, re.findall(r"\d+", str(info.get("version", "")))[:3]))

    async def texts(self, ids: Sequence[int]) -> list[str] | None:
        """What the teacher's tokenizer makes of each id; None where its servers hold none."""
        body = {"tokens": [[i] for i in ids], "skip_special_tokens": False}
        try:
            answer = await self._servers[0].client.post(
                "/detokenize", body, timeout=PROBE_TIMEOUT_S
            )
        except ServerError:
            return None
        found = answer.get("text") if isinstance(answer, dict) else None
        return found if isinstance(found, list) and len(found) == len(ids) else None

    @property
    def bytes_received(self) -> int:
        return sum(server.client.received for server in self._servers)

    def check(self, request: ScoreRequest) -> None:
        """Refuse what a server would not survive, or would cut.

        Raises:
            UserError: no prompt, an id outside the vocabulary, or a sequence that is too long.
        """
        if not request.prompt_ids:
            raise UserError(f"{request.name}: no prompt", expected="at least one token before it")
        asked = (request.prompt_ids, request.response_ids, *(request.top_ids or ()))
        bad = next((i for ids in asked for i in ids if not 0 <= i < self.vocab), None)
        if bad is not None:
            raise UserError(
                f"{request.name} holds token id {bad}",
                expected=f"ids from 0 to {self.vocab - 1}, the teacher's",
                fix="student and teacher must share a tokenizer; see remote_teacher.vocab_size",
            )
        if request.k > self.vocab:
            raise UserError(
                f"k = {request.k} of {self.vocab} ids", expected="a shorter list", fix="lower k"
            )
        if self.max_tokens and request.tokens >= self.max_tokens:
            raise UserError(
                f"{request.name}: {len(request.prompt_ids)} prompt + {len(request.response_ids)} "
                "response tokens",
                expected=f"fewer than {self.max_tokens} in all: SGLang keeps some positions of the "
                "context free when it scores",
                fix="start the teacher's servers with a larger --context-length, or lower "
                "rollout.max_new_tokens",
            )

    async def score(self, request: ScoreRequest) -> TokenScores:
        """The response's log-probs under the teacher.

        Raises:
            UserError: see `check`; or no server answered after all retries.
        """
        self.check(request)
        pieces = []
        if request.top_ids is not None:
            pieces = plan_pieces(
                request, max_union=self.limits.max_union, max_entries=self.limits.max_entries
            )
        self.counts["samples"] += 1
        if not request.response_ids:
            return read_whole({"input_token_logprobs": [None]}, request, self.vocab)
        server = self._choose()
        scores = await self._ask(
            server, whole_job(request), lambda meta: read_whole(meta, request, self.vocab)
        )
        if request.top_ids is not None:
            # After the whole sequence, so that each piece finds its prefix in that server's cache.
            tables = await asyncio.gather(
                *(
                    self._ask(server, piece_job(request, p), lambda meta, p=p: read_piece(meta, p))
                    for p in pieces
                )
            )
            scores.ids, scores.list_log_q = fill_lists(
                request, list(zip(pieces, tables, strict=True))
            )
        return scores

    async def _ask(self, server: _Server, job: Job, read: Any) -> Any:
        """What `read` makes of the answer to one job, from `server` or, if it fails, another."""
        for attempt in range(self.limits.retries + 1):
            try:
                return read(await self._put(server, job))
            except (ServerError, BadAnswer) as err:
                if isinstance(err, ServerError) and err.refused:
                    raise _refused(job, err) from err
                if attempt == self.limits.retries:
                    raise UserError(
                        f"the teacher did not score {job.name} in {attempt + 1} tries; "
                        f"{server.client.url} last: {err}",
                        expected="servers that answer",
                        fix="look at the server's log; remote_teacher.retries and timeout_s",
                    ) from err
                server.resting_until = time.monotonic() + backoff(attempt)
                server = self._choose()
                await asyncio.sleep(max(0.0, server.resting_until - time.monotonic()))
        raise AssertionError("unreachable")

    def _choose(self) -> _Server:
        """A server that did not just fail, with the least work."""
        now = time.monotonic()
        return min(self._servers, key=lambda s: (max(0.0, s.resting_until - now), s.outstanding))

    async def _put(self, server: _Server, job: Job) -> Any:
        """Queue a job; its meta_info."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        server.outstanding += len(job.input_ids)
        try:
            async with server.work:
                server.waiting.append((job, future))
                server.work.notify()
            return await future
        finally:
            server.outstanding -= len(job.input_ids)

    async def _work(self, server: _Server) -> None:
        """One of a server's callers: takes what waits, as many jobs as fit into a call."""
        while True:
            async with server.work:
                await server.work.wait_for(lambda: bool(server.waiting))
                batch = self._take(server.waiting)
            try:
                answers = await self._call(server, [job for job, _ in batch])
            except ServerError as err:
                self.counts["failed_calls"] += 1
                for _, future in batch:
                    if not future.done():
                        future.set_exception(err)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    def _take(self, waiting: deque[Any]) -> list[tuple[Job, asyncio.Future[Any]]]:
        batch = [waiting.popleft()]
        first: Job = batch[0][0]
        tokens = len(first.input_ids)
        while waiting and waiting[0][0].kind == first.kind:
            tokens += len(waiting[0][0].input_ids)
            if tokens > self.limits.batch_tokens:
                break
            batch.append(waiting.popleft())
        return batch

    async def _call(self, server: _Server, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """One POST /generate; the meta_info of each job. A call that timed out is aborted."""
        rids = [uuid.uuid4().hex for _ in jobs]
        body: dict[str, Any] = {
            "rid": rids,
            "input_ids": [job.input_ids for job in jobs],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": [job.start for job in jobs],
        }
        if jobs[0].k:
            body["top_logprobs_num"] = [job.k for job in jobs]
            if server.flat:
                body |= {
                    "return_flat_raw_top_logprobs": True,
                    "return_flat_raw_top_logprobs_b64": True,
                }
        if jobs[0].ids:
            body["token_ids_logprob"] = [job.ids for job in jobs]
        self.counts["calls"] += 1
        self.counts["requests"] += len(jobs)
        try:
            answers = await server.client.post("/generate", body, timeout=self.limits.timeout_s)
        except ServerError as err:
            if err.unreachable:
                await self._abort(server, rids)
            raise
        return self._metas(server, answers, len(jobs))

    def _metas(self, server: _Server, answers: Any, count: int) -> list[dict[str, Any]]:
        """meta_info of each answer; ServerError for an abort (a server answers those with 200)."""
        whole = isinstance(answers, list) and len(answers) == count
        metas = [answer.get("meta_info", {}) for answer in answers] if whole else []
        for meta in metas:
            self.counts["prompt_tokens"] += meta.get("prompt_tokens", 0)
            self.counts["cached_tokens"] += meta.get("cached_tokens", 0)
            reason = meta.get("finish_reason") or {}
            if reason.get("type") == "abort":
                text = str(reason.get("message", "aborted"))
                raise ServerError(server.client.url, "/generate", 503, text)
        if not whole:
            raise ServerError(server.client.url, "/generate", 502, f"not {count} answers")
        return metas

    async def _abort(self, server: _Server, rids: Sequence[str]) -> None:
        with contextlib.suppress(ServerError):
            for rid in rids:
                await server.client.post("/abort_request", {"rid": rid}, timeout=5.0)

    async def close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for server in self._servers:
            await server.client.close()


def _refused(job: Job, err: ServerError) -> UserError:
    return UserError(
        f"the teacher's server {err.url} refused a call with {job.name}: {err.message}",
        expected="sequences and options that this release takes",
        fix="the server's message says what; see docs/rollouts.md",
    )


async def _ask_vocab(server: _Server) -> int:
    """The number of ids of a server's model, from the words with which it refuses another one."""
    said = f"its release is {'.'.join(map(str, server.release)) or 'unknown'}"
    if server.release >= CHECKS_IDS:  # an older one might try, and die
        body = {
            "input_ids": [[0, 0]],
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": [0],
            "token_ids_logprob": [[2**31 - 1]],
        }
        try:
            await server.client.post("/generate", body, timeout=PROBE_TIMEOUT_S)
        except ServerError as err:
            said = err.message
            if found := re.search(r"\[0, (\d+)\)", said):
                return int(found.group(1))
    raise UserError(
        f"the teacher's server {server.client.url} does not say how many ids its model has: {said}",
        expected="its vocabulary size: an id outside it would kill the server",
        fix="set remote_teacher.vocab_size to vocab_size of the teacher's config.json",
    )
