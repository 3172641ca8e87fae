"""Skills: short texts from the student's own successes, which the teacher alone reads (Skill-SD).

A summariser makes a text of a response that its verifier took. The bank keeps the newest ones; for
a prompt it gives that of the same prompt, else that of the nearest prompt of its task. A step reads
what earlier steps have left: it fills in first, and its own successes come in after its update. The
same samples make the same bank, so that every rank has it without communication.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from megaopd.data.config import DataConfig
from megaopd.data.privileged import SKILL
from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError

# (prompt, text of its verified response) -> skill; "": none.
Summarizer = Callable[[Prompt, str], str]

SUMMARIZERS: dict[str, Summarizer] = {
    "worked": lambda prompt, response: prompt.text + response,  # the question and its answer
    "response": lambda prompt, response: response,
}


class SkillBank:
    """The newest data.skill_bank skills, one a prompt.

    Args:
        tokenizer: for the teacher's prompts.
        text: a response as text.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, text: Callable[[Sample], str]) -> None:
        self.config, self.tokenizer, self.text = config, tokenizer, text
        self.enabled = config.teacher_sees == "skill"
        if self.enabled and config.summarizer not in SUMMARIZERS:
            raise UserError(
                f"data.summarizer = {config.summarizer!r}",
                expected="one of " + ", ".join(map(repr, SUMMARIZERS)) + ", or of a plugin",
            )
        # Prompt id -> [task, ids of the prompt, skill]; oldest first. Lists: it goes into JSON.
        self.entries: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def fill(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with a skill in their teacher's prompt, where the bank has one for them."""
        if not self.entries:
            return list(samples)
        prompts = {s.prompt.id: s.prompt for s in samples if s.kind == "rollout"}
        told = {name: self._told(prompt) for name, prompt in prompts.items()}
        return [replace(s, prompt=told[s.prompt.id]) if s.kind == "rollout" else s for s in samples]

    def add(self, samples: Sequence[Sample]) -> None:
        """Take the first success of each prompt of a step whose update is done."""
        if not self.enabled:
            return
        seen = set()
        for sample in samples:
            prompt = sample.prompt
            solved = sample.kind == "rollout" and (sample.reward or 0.0) >= 1.0
            if not solved or sample.finish_reason != "stop" or prompt.id in seen:
                continue
            seen.add(prompt.id)
            skill = SUMMARIZERS[self.config.summarizer](prompt, self.text(sample))
            skill = skill[: self.config.skill_chars]
            if skill:
                self.entries.pop(prompt.id, None)
                self.entries[prompt.id] = [prompt.task, list(prompt.token_ids), skill]
        for old in list(self.entries)[: -self.config.skill_bank]:
            del self.entries[old]

    def skill(self, prompt: Prompt) -> str:
        """That of the prompt, else of the nearest one of its task: most pairs of neighbouring
        tokens in common over all that the two have, the newest of equals; "" without any."""
        own = self.entries.get(prompt.id)
        if own is not None:
            return own[2]
        mine = _pairs(prompt.token_ids)
        best, found = -1.0, ""
        for task, ids, skill in self.entries.values():
            if task == prompt.task:
                theirs = _pairs(ids)
                near = len(mine & theirs) / max(len(mine | theirs), 1)
                if near >= best:
                    best, found = near, skill
        return found

    def state(self) -> list[list[Any]]:
        """For a checkpoint."""
        return [[name, *entry] for name, entry in self.entries.items()]

    def load_state(self, state: Sequence[Sequence[Any]]) -> None:
        self.entries = {name: [task, list(ids), skill] for name, task, ids, skill in state}

    def _told(self, prompt: Prompt) -> Prompt:
        skill = self.skill(prompt)
        if not skill or SKILL not in prompt.teacher_text:
            return prompt
        text = prompt.teacher_text.replace(SKILL, skill)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return replace(prompt, teacher_prompt_ids=tuple(ids))


def _pairs(ids: Sequence[int]) -> set[tuple[int, int]]:
    return set(pairwise(ids))
