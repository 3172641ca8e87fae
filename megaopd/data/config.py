"""Where prompts come from."""

from dataclasses import dataclass
from typing import Literal

from megaopd.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """The prompts of a run: a JSONL file, or a task that generates them."""

    source: str  # path of a prompts .jsonl, or "task:NAME", e.g. "task:addition3"
    template: Literal["raw", "chat"] = "raw"  # chat: the tokenizer's own chat template
    system: str = ""  # system message, put first where a prompt brings none (template "chat")
    split: Literal["train", "test"] = "train"  # of a generated task; a file is one split
    num_prompts: int = 0  # keep this many; 0: the whole file, or an endless generated stream
    seed: int = 0  # of the generator and of the order
    shuffle: bool = True  # new order each epoch; an endless stream is random as it is
    max_prompt_tokens: int = 1024  # longest prompt
    too_long: Literal["refuse", "skip"] = "refuse"  # a longer prompt stops the run, or is left out
    verifier: str = "math"  # task of file lines that have an answer but name no task
    # What the teacher's prompt holds beside the student's (data/privileged.py); "": nothing. A file
    # line's own teacher_prompt goes before it.
    teacher_sees: Literal["", "solution", "answer", "masked", "instruction", "system", "think"] = ""
    solution_key: str = "solution"  # of a prompt's other keys: solution, masked and think read it
    # instruction, system: the text. solution, answer, masked: where {prompt} and {pi} stand.
    teacher_text: str = ""
    mask_share: float = 0.5  # of the solution's words, with teacher_sees = masked

    def __post_init__(self) -> None:
        if not self.source or self.source == "task:":
            raise UserError(
                f"data.source = {self.source!r}",
                expected='the path of a .jsonl file, or "task:NAME"',
            )
        if self.num_prompts < 0:
            raise UserError(f"data.num_prompts = {self.num_prompts}", expected="0 (all) or more")
        if self.max_prompt_tokens < 1:
            raise UserError(
                f"data.max_prompt_tokens = {self.max_prompt_tokens}", expected="at least 1"
            )
        if self.system and self.template == "raw":
            raise UserError(
                "data.system is set, but data.template = 'raw' has no place for it",
                fix='data.template="chat"',
            )

        self._check_privileged()

    def _check_privileged(self) -> None:
        kind, text = self.teacher_sees, self.teacher_text
        if kind in ("system", "think") and self.template == "raw":
            raise UserError(
                f"data.teacher_sees = {kind} with data.template = raw",
                expected="a chat template, which has a place for it",
                fix='set data.template="chat", or data.teacher_sees=instruction',
            )
        if kind in ("instruction", "system") and not text:
            raise UserError(
                f"data.teacher_sees = {kind} without data.teacher_text",
                expected="the text that the teacher is given",
            )
        around = kind in ("solution", "answer", "masked") and text
        if around and not ("{prompt}" in text and "{pi}" in text):
            raise UserError(
                f"data.teacher_text = {text!r}", expected="a text with {prompt} and {pi} in it"
            )
        if text and kind in ("", "think"):
            raise UserError(
                f"data.teacher_text is set with data.teacher_sees = {kind!r}",
                expected="one of solution, answer, masked, instruction, system, which read it",
            )
        if not 0 <= self.mask_share <= 1:
            raise UserError(f"data.mask_share = {self.mask_share}", expected="from 0 to 1")

    @property
    def task(self) -> str | None:
        """Name of the generating task; None for a file."""
        return self.source.removeprefix("task:") if self.source.startswith("task:") else None
