"""One episode of several turns, and the Sample that it becomes. See agent.py for the record."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from megaopd.data.tasks import Environment
from megaopd.data.types import FinishReason, Sample, Span
from megaopd.report.statistics import repetition
from megaopd.rollout.base import Request, SamplingParams
from megaopd.rollout.steps import Call

End = Literal["done", "turns", "tokens", "episode_time", "step_time", "error", "abort"]
# Why an episode ended, and the finish reason that says so to those who know no episodes.
ENDS: dict[End, FinishReason] = {
    "done": "stop",  # the environment said so
    "turns": "length",  # agent.max_turns
    "tokens": "length",  # agent.max_tokens, or the context
    "episode_time": "abort",  # agent.episode_timeout_s
    "step_time": "abort",  # agent.step_timeout_s
    "error": "abort",  # the environment raised
    "abort": "abort",  # the caller, or the engine, aborted it
}


@dataclass(eq=False)
class Episode:
    """One under way. The lists run over the tokens of the response so far."""

    ticket: int
    request: Request
    params: SamplingParams
    environment: Environment
    deadline: float  # on the session's clock
    call: Call | None = None  # of the environment, where it is its turn
    turn: int | None = None  # ticket of the engine's session, where it is the student's
    stopping: End | None = None  # what the student's turn was aborted for
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    top_ids: list[tuple[int, ...]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    turns: list[list[int]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    @property
    def context(self) -> tuple[int, ...]:
        return (*self.request.prompt.token_ids, *self.ids)

    @property
    def last_turn(self) -> list[int]:
        """Ids that the student sampled last."""
        start, end = self.turns[-1]
        return self.ids[start:end]

    def add_turn(self, sample: Sample) -> None:
        """The student's: spans and all move to where it stands in the episode."""
        start, count = len(self.ids), len(sample.response_ids)
        self.ids += sample.response_ids
        self.log_probs += sample.log_probs or ()
        self.mask += [1] * count
        self.top_ids += sample.top_ids or ()
        spans = sample.spans or (Span(sample.weight_version, 0, count),)
        self.spans += [Span(s.version, s.start + start, s.end + start) for s in spans if count]
        self.turns.append([start, start + count])

    def add_answer(self, ids: Sequence[int]) -> None:
        """The environment's."""
        self.ids += ids
        self.log_probs += [0.0] * len(ids)
        self.mask += [0] * len(ids)
        self.top_ids += [()] * len(ids)

    def sample(
        self, end: End, how: Literal["sum", "last"], version: int, error: str = ""
    ) -> Sample:
        """The record of it all.

        Args:
            how: AgentConfig.reward.
            version: of the engine's weights; named where the student sampled nothing.
        """
        rewards = self.rewards + [0.0] * (len(self.turns) - len(self.rewards))
        total = sum(rewards) if how == "sum" else (rewards or [0.0])[-1]
        meta = {"end": end, "turns": self.turns, "turn_rewards": rewards}
        return Sample(
            prompt=self.request.prompt,
            response_ids=tuple(self.ids),
            log_probs=tuple(self.log_probs),
            finish_reason=ENDS[end],
            weight_version=min((s.version for s in self.spans), default=version),
            index=self.request.index,
            reward=None if end in ("error", "abort") else min(max(total, 0.0), 1.0),
            loss_mask=tuple(self.mask),
            spans=tuple(self.spans),
            top_ids=tuple(self.top_ids) if self.params.top_ids else None,
            meta=meta | ({"error": error} if error else {}),
        )


def turn_seed(seed: int, turn: int) -> int:
    """The seed of an episode's turn. The first one's is the episode's, as for a plain request."""
    if turn == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/turn {turn}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def sample_metrics(samples: Sequence[Sample], ends: Sequence[int]) -> dict[str, float]:
    """Means over the samples of a step: length, the share that the limit cut, repetition (ids of
    `ends` left out); of those that have one, the reward and the probability of the token that ended
    them."""
    found = {
        "response_length": fmean(len(s.response_ids) for s in samples),
        "truncated": fmean(s.finish_reason == "length" for s in samples),
        "repetition": fmean(
            repetition([i for i in s.response_ids if i not in ends]) for s in samples
        ),
    }
    rewards = [s.reward for s in samples if s.reward is not None]
    sampled = [s for s in samples if s.log_probs and (s.loss_mask is None or s.loss_mask[-1])]
    ended = [s for s in sampled if s.response_ids[-1] in ends]
    if ended:
        found["eos_prob"] = fmean(math.exp(s.log_probs[-1]) for s in ended if s.log_probs)
    return found | ({"reward": fmean(rewards)} if rewards else {})


def episode_metrics(samples: Iterable[Sample]) -> dict[str, float]:
    """Means over the episodes among `samples`; empty where there are none."""
    episodes = [s for s in samples if "turn_rewards" in s.meta]
    if not episodes:
        return {}
    count = len(episodes)
    metrics = {
        "agent/turns": sum(len(s.meta["turns"]) for s in episodes) / count,
        "agent/sampled_tokens": sum(sum(s.loss_mask or ()) for s in episodes) / count,
        "agent/tokens": sum(len(s.response_ids) for s in episodes) / count,
    }
    ends = Counter(s.meta["end"] for s in episodes)
    return metrics | {f"agent/end_{end}": ends[end] / count for end in ENDS}
