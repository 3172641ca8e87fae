"""Batches of requests under way, handed out whole and in order to every rank.

The batch of step s may be submitted as soon as weights of version s - staleness are served, and
is trained on by step s: no token is older than `rollout.staleness` steps by construction, and a
step trains on the prompts that it drew, whichever finish first (no bias towards short responses).
Requests that are still running at a sync go on under the new weights; their spans say so.

What is not handed out yet is not saved: a resumed run draws the same prompts again, from the cursor
of the oldest batch, so that every prompt is trained on once.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megaopd import watchdog
from megaopd.data.prompts import PromptStream
from megaopd.data.types import Prompt, Sample
from megaopd.parallel import Grid, broadcast_object, gather_objects
from megaopd.rollout.base import NeedsWeights, Request, RolloutEngine, SamplingParams, Session
from megaopd.rollout.config import RolloutConfig

Reward = Callable[[Sample], float | None]

# Other ranks wait for rank 0 in a collective, which has a time limit: it calls this often.
HEARTBEAT_S = 60.0
WAITING, NEEDS_WEIGHTS = "waiting", "needs weights"


@dataclass
class Batch:
    """Requests that are handed out together, prompt after prompt."""

    requests: list[Request]
    params: SamplingParams
    per_prompt: int
    samples: list[Sample | None]  # by request
    cursor: dict[str, Any] | None = None  # of the stream before its prompts; None: not a step's
    reward: Reward | None = None  # judges groups, where not all of them are to be handed out
    tickets: set[int] = field(default_factory=set)  # rank 0: not finished
    informative: dict[int, bool] = field(default_factory=dict)  # finished group -> rewards differ

    def put(self, place: int, sample: Sample) -> None:
        """Take the sample of request `place`; judge its group where that was the last of it."""
        self.samples[place] = sample
        group = place // self.per_prompt
        members = self.group(group)
        if self.reward is not None and len(members) == self.per_prompt:
            rewards = {self.reward(member) for member in members} - {None}
            self.informative[group] = len(rewards) > 1

    def group(self, number: int) -> list[Sample]:
        """The finished samples of one prompt."""
        start = number * self.per_prompt
        return [s for s in self.samples[start : start + self.per_prompt] if s is not None]

    def chosen(self, wanted: int) -> list[Sample]:
        """The samples of `wanted` finished groups, informative ones first; in order."""
        ranked = sorted(self.informative, key=lambda group: not self.informative[group])
        return [s for group in sorted(ranked[:wanted]) for s in self.group(group)]


def request_seed(run_seed: int, step: int, prompt: Prompt, index: int) -> int:
    """The seed of one sample: a function of run, step, prompt and index, the same on any layout."""
    key = f"{run_seed}/{step}/{prompt.id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")


class RolloutBuffer:
    """Samples of an engine, one step's batch after the other. Its methods are collectives.

    Args:
        reward: of one sample; called on rank 0 for dynamic sampling.
        resync: gives the engine the student's current weights, on every rank; called while a batch
            waits and all servers have lost theirs.
        finished: told of a batch's samples on rank 0 as they come; not with dynamic sampling, which
            leaves some of them out.
        top_ids: how many of the student's most probable ids the samples are to carry.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: PromptStream,
        config: RolloutConfig,
        grid: Grid,
        *,
        run_seed: int,
        total_steps: int,
        reward: Reward,
        resync: Callable[[], None],
        finished: Callable[[Sequence[Sample]], None] | None = None,
        top_ids: int = 0,
    ) -> None:
        self.engine, self.prompts, self.config, self.grid = engine, prompts, config, grid
        self.run_seed, self.total_steps = run_seed, total_steps
        self.reward, self.resync = reward, resync
        self.dynamic = config.oversample > 1
        self.finished = None if self.dynamic else finished
        self.params = replace(SamplingParams.from_config(config), top_ids=top_ids)
        self.batches: dict[int, Batch] = {}  # by step, oldest first
        self._session: Session | None = None
        self._owner: dict[int, tuple[Batch, int]] = {}  # ticket -> its place
        self._counts: dict[str, float] = {}

    def sample(self, step: int) -> list[Sample]:
        """The samples of step number `step` (from 0), in the order of their prompts.

        Submits every batch that may be under way meanwhile. The engine serves version `step`.
        """
        last = min(step + self.config.staleness, self.total_steps - 1)
        for ahead in range(step, last + 1):
            if ahead not in self.batches:
                self.batches[ahead] = self._draw(ahead)
        batch = self.batches.pop(step)
        samples = self._finish(batch)
        ages = [step - s.weight_version for s in samples]
        assert max(ages) <= self.config.staleness, (step, max(ages), "older than staleness")
        self._counts["rollout/staleness"] = sum(ages) / len(ages)
        self._counts["rollout/spans"] = sum(max(len(s.spans), 1) for s in samples) / len(samples)
        return samples

    def generate(
        self, prompts: Sequence[Prompt], key: int, per_prompt: int, params: SamplingParams
    ) -> list[Sample]:
        """`per_prompt` samples of each prompt; `key` takes the step's place in their seeds."""
        batch = self._batch(prompts, key, per_prompt, params)
        self._submit(batch)
        return self._finish(batch)

    @property
    def cursor(self) -> dict[str, Any]:
        """Where the prompts of the next batch to be handed out begin."""
        if self.batches:
            cursor = self.batches[min(self.batches)].cursor
            assert cursor is not None
            return cursor
        return self.prompts.state_dict()

    def metrics(self) -> dict[str, float]:
        """Of the last step."""
        counts, self._counts = self._counts, {}
        return counts

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def _draw(self, step: int) -> Batch:
        cursor = self.prompts.state_dict()
        count = round(self.config.prompts_per_step * self.config.oversample)
        prompts = self.prompts.next_batch(count)
        batch = self._batch(prompts, step, self.config.samples_per_prompt, self.params)
        batch.cursor, batch.reward = cursor, self.reward if self.dynamic else None
        self._submit(batch)
        return batch

    def _batch(
        self, prompts: Sequence[Prompt], key: int, per_prompt: int, params: SamplingParams
    ) -> Batch:
        requests = [
            Request(prompt, request_seed(self.run_seed, key, prompt, i), i)
            for prompt in prompts
            for i in range(per_prompt)
        ]
        return Batch(requests, params, per_prompt, [None] * len(requests))

    def _submit(self, batch: Batch) -> None:
        """Send the batch's requests on their way, where an engine works in the background."""
        if not self.engine.shared or self.grid.rank != 0:
            return
        if self._session is None:
            self._session = self.engine.session()
        for place, request in enumerate(batch.requests):
            ticket = self._session.submit(request, batch.params)
            self._owner[ticket] = batch, place
            batch.tickets.add(ticket)

    def _finish(self, batch: Batch) -> list[Sample]:
        """Wait for a batch; its samples on every rank."""
        if not self.engine.shared:
            self._sample_here(batch)
            return self._chosen(batch)
        while True:
            watchdog.beat()  # servers have time limits of their own
            news: Any = self._advance(batch) if self.grid.rank == 0 else None
            news = broadcast_object(news)
            if isinstance(news, list):
                return news
            if news == NEEDS_WEIGHTS:
                self.resync()

    def _sample_here(self, batch: Batch) -> None:
        """Each rank's engine samples its share."""
        world, rank = self.grid.world_size, self.grid.rank
        mine = batch.requests[rank::world]
        made = gather_objects(self.engine.generate(mine, batch.params) if mine else [])
        for other, part in enumerate(made):
            for i, sample in enumerate(part):
                batch.put(other + i * world, sample)

    def _advance(self, batch: Batch) -> list[Sample] | str:
        """Rank 0: the batch's samples when they are there, or why there are none yet."""
        session = self._session
        assert session is not None
        while batch.tickets:
            try:
                finished = session.wait(HEARTBEAT_S)
            except NeedsWeights:
                return NEEDS_WEIGHTS
            if not finished:
                return WAITING
            for ticket, sample in finished:
                owner, place = self._owner.pop(ticket)
                if ticket in owner.tickets:  # else it was aborted, and its batch has gone
                    owner.tickets.discard(ticket)
                    owner.put(place, sample)
                    if self.finished is not None and owner.cursor is not None:
                        self.finished([sample])
            enough = sum(batch.informative.values()) >= self.config.prompts_per_step
            if batch.reward is not None and enough:
                session.abort(batch.tickets)
                batch.tickets = set()
        return self._chosen(batch)

    def _chosen(self, batch: Batch) -> list[Sample]:
        """All samples; with dynamic sampling those of as many groups as a step takes."""
        if batch.reward is not None:
            share = sum(batch.informative.values()) / len(batch.informative)
            self._counts["rollout/informative_groups"] = share
            return batch.chosen(self.config.prompts_per_step)
        samples = [s for s in batch.samples if s is not None]
        assert len(samples) == len(batch.requests), "a request was lost"
        return samples
