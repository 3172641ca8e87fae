"""What every rollout engine does: token ids in, token ids out, with the law that sampled them.

A contract for the embedded engine and for servers alike; tests/serving/conformance.py holds both to
it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError
from megaopd.rollout.config import RolloutConfig


@dataclass(frozen=True)
class SamplingParams:
    """The law that a response is drawn from.

    The reported log-prob of a token is that of this law: after temperature, after top-k and top-p.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy; log-probs are then those of temperature 1
    top_p: float = 1.0
    top_k: int = 0  # 0: off

    @classmethod
    def from_config(cls, config: RolloutConfig) -> "SamplingParams":
        return cls(config.max_new_tokens, config.temperature, config.top_p, config.top_k)

    def greedy(self) -> "SamplingParams":
        return SamplingParams(self.max_new_tokens, temperature=0.0)


@dataclass(frozen=True)
class Request:
    """One response to sample. `seed` alone decides its draws, whatever it is batched with."""

    prompt: Prompt
    seed: int
    index: int = 0  # which of the prompt's samples


class RolloutEngine(Protocol):
    """Holds one version of the student's weights and samples from them."""

    weight_version: int

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Take new weights from a stream of (Hugging Face name, full tensor).

        Raises:
            UserError: a tensor missing, left over or of another shape; the old version stays named.
        """
        ...

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        """One sample per request, in order, each with its log-probs and the weight version.

        Raises:
            UserError: an id outside the vocabulary, or a prompt too long.
        """
        ...


def check_requests(
    requests: Sequence[Request], params: SamplingParams, *, vocab: int, max_positions: int
) -> None:
    """Refuse what would fail or kill an engine, before it is sent."""
    for request in requests:
        ids = request.prompt.token_ids
        who = f"prompt {request.prompt.id!r}"
        bad = next((i for i in ids if not 0 <= i < vocab), None)
        if bad is not None:
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
