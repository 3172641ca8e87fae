"""What joins a step's own samples, or stands in their place, as [mix] says.

A function of the step's number and its samples alone: a resumed run mixes what it would have mixed.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaopd.data.responses import load_responses, pick
from megaopd.data.types import Prompt, Sample
from megaopd.inputs import example
from megaopd.schema import Config


class Mixture:
    """The responses of others that a run trains on.

    Raises:
        UserError: a file of responses that does not fit.
    """

    def __init__(self, config: Config, tokenizer: Any, vocab: int, *, training: bool) -> None:
        self.mix, self.seed, self.data = config.mix, config.run.seed, config.data
        self.tokenizer = tokenizer
        self.stored: list[Sample] = []
        if training and self.mix.source not in ("", "answers"):
            self.stored = load_responses(
                Path(self.mix.source),
                kind=self.mix.kind,
                vocab=vocab,
                least_reward=self.mix.least_reward,
                least_pass_rate=self.mix.least_pass_rate,
            )

    def examples(self, step: int, count: int) -> list[Sample]:
        """The file's responses that supervised fine-tuning trains on; [] without a file."""
        if not self.stored:
            return []
        return pick(self.stored, step, self.mix.per_step or count, self.seed)

    def example(self, prompt: Prompt) -> Sample:
        """The data's own response to it."""
        return example(prompt, self.tokenizer, self.data)

    def __call__(self, samples: Sequence[Sample], step: int) -> list[Sample]:
        """The samples of step number `step`, the same on every rank."""
        found = list(samples)
        if self.mix.student_share < 1:
            found = self._partly_answers(samples, step)
        if self.mix.source == "answers":
            prompts = list({s.prompt.id: s.prompt for s in samples}.values())
            chosen = prompts[: self.mix.per_step or len(prompts)]
            return [*found, *(replace(self.example(p), kind="sft") for p in chosen)]
        if self.mix.source:
            found += pick(self.stored, step, self.mix.per_step, self.seed)
        return found

    def _partly_answers(self, samples: Sequence[Sample], step: int) -> list[Sample]:
        """Some prompts with the data's answer in place of each of the student's (GKD)."""
        draw = random.Random(f"{self.seed}/{step}")
        ids = dict.fromkeys(s.prompt.id for s in samples)
        own = {i for i in ids if draw.random() < self.mix.student_share}
        return [
            s if s.prompt.id in own else replace(self.example(s.prompt), index=s.index)
            for s in samples
        ]
