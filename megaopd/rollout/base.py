"""What every rollout engine does: token ids in, token ids out, with the law that sampled them.

A contract for the embedded engine and for servers alike; tests/serving/conformance.py holds both to
it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError
from megaopd.rollout.config import RolloutConfig


@dataclass(frozen=True)
class SamplingParams:
    """The law that a response is drawn from.

    The reported log-prob of a token is that of this law: after temperature, top-k, top-p and min-p,
    in that order.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy; log-probs are then those of temperature 1
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # tokens below min_p x the largest probability are cut; 0: off
    stop_ids: tuple[int, ...] = ()  # more ids that end a response, beside the engine's end tokens
    top_ids: int = 0  # also report this many most probable ids (at temperature 1) of each position
    teacher_mix: float = 0.0  # share of the teacher's law, cut in the same way (embedded engine)

    @classmethod
    def from_config(cls, config: RolloutConfig) -> "SamplingParams":
        return cls(
            config.max_new_tokens,
            config.temperature,
            config.top_p,
            config.top_k,
            config.min_p,
            teacher_mix=config.teacher_mix,
        )

    def greedy(self) -> "SamplingParams":
        return replace(self.own(), temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)

    def own(self) -> "SamplingParams":
        """The student's law alone."""
        return replace(self, teacher_mix=0.0)

    @property
    def truncated(self) -> bool:
        """Whether the law is cut to a part of the vocabulary."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


@dataclass(frozen=True)
class Request:
    """One response to sample.

    `seed` alone decides its draws, whatever it is batched with, where the engine can promise that
    (the embedded one does; SGLang on a CPU does not).
    """

    prompt: Prompt
    seed: int
    index: int = 0  # which of the prompt's samples


@dataclass(frozen=True)
class Probe:
    """What an engine must reproduce after a sync: the trainer's own log-probs of a fixed text."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]  # of token_ids[1:], each given what stands before it


class NeedsWeights(Exception):
    """No server holds verified weights any more (all were restarted): sync, then go on waiting."""


class Session(Protocol):
    """Requests under way on one engine. Not thread-safe; several sessions may be open at once."""

    @property
    def pending(self) -> int:
        """Requests submitted and not handed out by `wait` yet."""
        ...

    def submit(self, request: Request, params: SamplingParams) -> int:
        """Queue a request without waiting; its ticket.

        Raises:
            UserError: an id outside the vocabulary, or too many tokens. Nothing was sent.
        """
        ...

    def wait(self, timeout: float | None = None) -> list[tuple[int, Sample]]:
        """Block until at least one request has finished: (ticket, sample) of all that have.

        An empty list where nothing is pending or `timeout` seconds have passed.

        Raises:
            NeedsWeights: nothing can finish before the next sync; requests stay queued.
        """
        ...

    def abort(self, tickets: Iterable[int] | None = None) -> None:
        """Stop these (all: None). They come out of `wait` with finish_reason "abort", with the
        tokens, log-probs and spans that they have; no token of them is lost.
        """
        ...

    def close(self) -> None:
        """Abort what is under way and forget it."""
        ...


class RolloutEngine(Protocol):
    """Holds one version of the student's weights and samples from them.

    `shared`: False where each rank has an engine of its own and gives it its part of the requests;
    True where rank 0 speaks for all ranks: sessions are then opened on rank 0 alone, and
    `update_weights` is a collective that every rank joins.
    """

    @property
    def weight_version(self) -> int:
        """Of the last successful sync; -1: none yet."""
        ...

    @property
    def shared(self) -> bool:
        """Whether rank 0 speaks for all ranks; else each rank has an engine of its own."""
        ...

    def update_weights(
        self, weights: Iterable[tuple[str, Any]], version: int, *, probe: Probe | None = None
    ) -> dict[str, float]:
        """Take new weights from a stream of (Hugging Face name, full tensor).

        Args:
            probe: compared with the engine's log-probs afterwards, where an engine can.

        Returns:
            Measurements to log (bytes, seconds by phase); may be empty.

        Raises:
            UserError: a tensor missing, left over or of another shape; the old version stays named.
        """
        ...

    def session(self) -> Session:
        """Somewhere to submit requests."""
        ...

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        """One sample per request, in order, each with its log-probs and the weight version.

        Raises:
            UserError: an id outside the vocabulary, or a prompt too long.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Counters to log of what happened since the last call; on rank 0, elsewhere empty."""
        ...

    def release(self) -> None:
        """Give the GPU's memory up (weights and KV cache), for a trainer on the same GPUs."""
        ...

    def resume(self, what: Literal["weights", "kv_cache"]) -> None:
        """Take a part of the memory back; weights have no contents until the next sync."""
        ...

    def close(self) -> None:
        """Stop what was started."""
        ...


def check_requests(
    requests: Sequence[Request], params: SamplingParams, *, vocab: int, max_positions: int
) -> None:
    """Refuse what would fail or kill an engine, before it is sent."""
    for request in requests:
        ids = request.prompt.token_ids
        who = f"prompt {request.prompt.id!r}"
        if min(ids) < 0 or max(ids) >= vocab:  # in C: this stands before every request
            bad = next(i for i in ids if not 0 <= i < vocab)
            raise UserError(
                f"{who} holds token id {bad}",
                expected=f"ids from 0 to {vocab - 1}",
                fix="use the tokenizer of the student's checkpoint",
            )
        if len(ids) + params.max_new_tokens > max_positions:
            raise UserError(
                f"{who}: {len(ids)} tokens + {params.max_new_tokens} new ones",
                expected=f"at most {max_positions} positions",
                fix="lower rollout.max_new_tokens or data.max_prompt_tokens",
            )
