"""What moves between the prompt stream, the rollout engine and the trainer. No torch here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]
# Who wrote the response: the student now, or somebody that it is to imitate or not to forget.
Kind = Literal["rollout", "sft", "replay"]

# A log-prob above 0 by more than rounding is a fault of the engine, not noise.
LOG_PROB_CEILING = 1e-4


@dataclass(frozen=True)
class Prompt:
    """One question, tokenised once; nothing downstream tokenises it again."""

    id: str  # unique in its source
    token_ids: tuple[int, ...]  # with the chat template applied, if there is one
    text: str  # what the token ids decode to
    answer: str | None  # what the verifier compares with; None: cannot be scored
    task: str  # name of the verifier (tasks.get_task); "" where there is none
    meta: dict[str, Any] = field(default_factory=dict, hash=False)  # for the verifier, and PI
    # The teacher's prompt, where it is told more than the student (privileged information).
    teacher_prompt_ids: tuple[int, ...] | None = None
    # The same as text with privileged.SKILL in it, where it is only known while training; else "".
    teacher_text: str = ""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"prompt {self.id}: no tokens, but a response needs a row to start at")


@dataclass(frozen=True)
class Span:
    """Response tokens [start, end) that one version of the weights sampled."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Sample:
    """One response of the student to one prompt, as token ids, never as text.

    `log_probs[t]` is the log-probability of `response_ids[t]` under the law it was sampled from.
    `loss_mask[t]` is 1 on tokens that the student sampled and 0 on injected ones; None: all 1.
    `spans` cut the sampled tokens by the weights that sampled them, in order; (): all by
    `weight_version`, which is the oldest of them.

    Raises:
        ValueError: lengths differ, a log-prob is not finite or above 0, or the spans do not cover
            the sampled tokens once: the engine is at fault.
    """

    prompt: Prompt
    response_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None
    finish_reason: FinishReason
    weight_version: int  # of the oldest weights that sampled it
    index: int = 0  # which sample of the prompt's group
    reward: float | None = None  # in [0, 1]; None: not scored
    loss_mask: tuple[int, ...] | None = None
    spans: tuple[Span, ...] = ()
    # The student's most probable ids at each position while sampling, where they were asked for.
    top_ids: tuple[tuple[int, ...], ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict, hash=False)  # of the episode, of the engine
    kind: Kind = "rollout"
    # Which terms of the objective look at it, and by what factor; None: all of them, by 1.
    weights: Mapping[str, float] | None = field(default=None, hash=False)
    advantage: float = 0.0  # of its reward, for policy-gradient terms

    def __post_init__(self) -> None:
        count = len(self.response_ids)
        if self.loss_mask is not None and len(self.loss_mask) != count:
            raise ValueError(
                f"sample of {self.prompt.id}: {len(self.loss_mask)} mask values for {count} tokens"
            )
        self._check_spans(count)
        if self.log_probs is None:
            return
        if len(self.log_probs) != count:
            raise ValueError(
                f"sample of {self.prompt.id}: {len(self.log_probs)} log-probs for {count} tokens"
            )
        for position, value in enumerate(self.log_probs):
            if not math.isfinite(value) or value > LOG_PROB_CEILING:
                raise ValueError(
                    f"sample of {self.prompt.id}: log-prob {value} at token {position}; "
                    "expected finite and at most 0"
                )

    def _check_spans(self, count: int) -> None:
        """In order, without overlap, over every token that the student sampled."""
        if not self.spans:
            return
        end, covered = 0, 0
        for span in self.spans:
            if not end <= span.start <= span.end <= count:
                raise ValueError(
                    f"sample of {self.prompt.id}: spans {self.spans} of {count} tokens"
                )
            covered, end = covered + span.end - span.start, span.end
        sampled = count if self.loss_mask is None else sum(self.loss_mask)
        if covered != sampled or min(s.version for s in self.spans) != self.weight_version:
            raise ValueError(
                f"sample of {self.prompt.id}: spans {self.spans} for {sampled} sampled tokens of "
                f"version {self.weight_version}"
            )

    @property
    def newest_version(self) -> int:
        """Of the weights that sampled its last tokens."""
        return self.spans[-1].version if self.spans else self.weight_version

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and response token ids."""
        return self.prompt.token_ids + self.response_ids

    @property
    def teacher_prompt(self) -> tuple[int, ...]:
        """What the response follows in the teacher's sequence."""
        return self.prompt.teacher_prompt_ids or self.prompt.token_ids

    @property
    def privileged(self) -> bool:
        """Whether the teacher's prompt is another one than the student's."""
        return self.teacher_prompt != self.prompt.token_ids
