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
    teacher_sees: Literal[
        "", "solution", "answer", "masked", "instruction", "system", "think", "skill"
    ] = ""
    solution_key: str = "solution"  # of a prompt's other keys: solution, masked and think read it
    # What supervised fine-tuning and [mix] take as the data's response to a prompt: its answer, or
    # the worked solution (solution_key) where the answer is only what a verifier compares with.
    example: Literal["answer", "solution"] = "answer"
    # instruction, system: the text ({prompt} in an instruction: where the question stands in it).
    # solution, answer, masked, skill: where {prompt} and {pi} stand. think: the thoughts with {pi}.
    teacher_text: str = ""
    mask_share: float = 0.5  # of the solution's words or characters, with teacher_sees = masked
    mask_text: str = "___"  # what stands for a masked one
    mask_unit: Literal["word", "character"] = "word"  # character: where no spaces part words
    # What makes a skill of a verified response: worked (question and response), response, or the
    # name that a plugin gave.
    summarizer: str = "worked"
    skill_bank: int = 256  # the newest skills that are kept, with teacher_sees = skill
    skill_chars: int = 1024  # longest skill; the rest is cut off

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
        no_place = kind == "system" or (kind == "think" and not text)
        if no_place and self.template == "raw":
            raise UserError(
                f"data.teacher_sees = {kind} with data.template = raw",
                expected="a chat template, which has a place for it",
                fix='set data.template="chat"; for think, data.teacher_text does too',
            )
        if kind in ("instruction", "system") and not text:
            raise UserError(
                f"data.teacher_sees = {kind} without data.teacher_text",
                expected="the text that the teacher is given",
            )
        around = kind in ("solution", "answer", "masked", "skill") and text
        if around and not ("{prompt}" in text and "{pi}" in text):
            raise UserError(
                f"data.teacher_text = {text!r}", expected="a text with {prompt} and {pi} in it"
            )
        if kind == "think" and text and ("{pi}" not in text or "{prompt}" in text):
            raise UserError(
                f"data.teacher_text = {text!r}",
                expected="thoughts with {pi} in them, and without {prompt}: they stand behind it",
            )
        if text and not kind:
            raise UserError(
                "data.teacher_text is set without data.teacher_sees", expected="what it is for"
            )
        if self.skill_bank < 1 or self.skill_chars < 1:
            raise UserError(
                f"data.skill_bank = {self.skill_bank}, data.skill_chars = {self.skill_chars}",
                expected="at least 1",
            )
        if kind == "skill" and self.summarizer == "worked" and self.template == "chat":
            raise UserError(
                "data.summarizer = worked with data.template = chat",
                expected="response, or a plugin's: a rendered chat cannot stand inside of another",
                fix="set data.summarizer=response",
            )
        if not 0 <= self.mask_share <= 1:
            raise UserError(f"data.mask_share = {self.mask_share}", expected="from 0 to 1")

    @property
    def task(self) -> str | None:
        """Name of the generating task; None for a file."""
        return self.source.removeprefix("task:") if self.source.startswith("task:") else None


@dataclass(frozen=True)
class MixConfig:
    """Responses that the student did not sample, in every step beside its own."""

    # "answers": the data's answers to prompts of the step; or a file of `megaopd sample`. "": none
    source: str = ""
    # sft: to imitate (objective.sft_coef). replay: not to forget (objective.replay); they were
    # sampled by the teacher's own law.
    kind: Literal["sft", "replay"] = "sft"
    per_step: int = 0  # of them; 0 with "answers": one for each prompt
    least_reward: float = 0.0  # of a file's responses that are taken
    least_pass_rate: float = 0.0  # and of their prompts, over all that were sampled
    # Share of the step's prompts whose response the student samples (GKD's lambda). The loss itself
    # is taken on the data's answers to the others. 0: on answers alone, and nothing is sampled.
    student_share: float = 1.0

    def __post_init__(self) -> None:
        if self.per_step < 0:
            raise UserError(f"mix.per_step = {self.per_step}", expected="0 or more")
        for name in ("least_reward", "least_pass_rate", "student_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"mix.{name} = {getattr(self, name)}", expected="from 0 to 1")
        file = self.source not in ("", "answers")
        if self.source == "answers" and self.kind == "replay":
            raise UserError(
                "mix.source = answers with mix.kind = replay",
                expected="samples of the teacher's own law: the data's answers are nobody's",
                fix="sample them first (megaopd sample), or set mix.kind=sft",
            )
        if not file and (self.least_reward or self.least_pass_rate):
            raise UserError(
                "mix.least_reward or mix.least_pass_rate without a file in mix.source",
                expected="responses with rewards, of `megaopd sample`",
                fix="remove them",
            )
        if not self.source and self.per_step:
            raise UserError(
                f"mix.per_step = {self.per_step} without mix.source", expected="where they are from"
            )
