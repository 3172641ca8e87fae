"""What the teacher alone reads: privileged information, put into its prompt (data.teacher_sees).

    solution     the whole solution (data.solution_key of the prompt's other keys)
    answer       the final answer alone
    masked       the solution with a share of its words or characters replaced
    instruction  data.teacher_text, the same for every prompt, behind the question
    system       data.teacher_text as the system message in place of data.system
    skill        what a summariser made of the student's own earlier successes (data/skills.py)
    think        the solution as the model's own thoughts, already written when it answers

An instance's own solution and a rule that all prompts share behave differently: the student learns
the geometric mean over what it cannot see ("The Many Faces of OPD", self-distillation).
"""

import random
from collections.abc import Mapping
from typing import Any

from megaopd.data.config import DataConfig
from megaopd.errors import UserError

Messages = list[dict[str, str]]

AROUND = {"raw": "{pi}\n{prompt}", "chat": "{prompt}\n\nA reference solution:\n{pi}"}
# Where a skill comes to stand, once there is one; in no text of a prompt.
SKILL = "\N{OBJECT REPLACEMENT CHARACTER}"
AROUND_SKILL = {**AROUND, "chat": "{prompt}\n\nWhat has worked before:\n{pi}"}
THOUGHTS = "<think>\n{pi}\n</think>\n\n"


def teacher_version(
    prompt: str | Messages,
    answer: str | None,
    meta: Mapping[str, Any],
    config: DataConfig,
    name: str,
) -> tuple[str | Messages, str]:
    """The prompt that the teacher reads, not rendered yet, and text to stand behind it rendered.

    Raises:
        UserError: the prompt lacks what the teacher is to see.
    """
    kind = config.teacher_sees
    if kind == "system":
        rest = prompt if isinstance(prompt, str) else [m for m in prompt if m["role"] != "system"]
        messages = [{"role": "user", "content": rest}] if isinstance(rest, str) else rest
        return [{"role": "system", "content": config.teacher_text}, *messages], ""
    if kind == "instruction":
        return _around(prompt, _instruction(config), ""), ""
    if kind == "skill":
        return _around(prompt, config.teacher_text or AROUND_SKILL[config.template], SKILL), ""
    told = _information(answer, meta, config, name)
    if kind == "think":
        return prompt, (config.teacher_text or THOUGHTS).replace("{pi}", told)
    return _around(prompt, config.teacher_text or AROUND[config.template], told), ""


def _instruction(config: DataConfig) -> str:
    """The instruction with {prompt} in it: in front of plain text, behind a chat's question."""
    text = config.teacher_text
    if "{prompt}" in text:
        return text
    return f"{text}\n{{prompt}}" if config.template == "raw" else f"{{prompt}}\n\n{text}"


def _information(answer: str | None, meta: Mapping[str, Any], config: DataConfig, name: str) -> str:
    kind, key = config.teacher_sees, config.solution_key
    found = answer if kind == "answer" else meta.get(key)
    if not isinstance(found, str) or not found:
        lacks = "answer" if kind == "answer" else key
        raise UserError(
            f"{name} has no {lacks!r}, and data.teacher_sees = {kind}",
            expected="a text that the teacher can be shown",
            fix="set data.solution_key, or data.teacher_sees=answer",
        )
    if kind != "masked":
        return found
    return masked(found, random.Random(f"mask/{config.seed}/{name}"), config)


def masked(text: str, rng: random.Random, config: DataConfig) -> str:
    """`text` with data.mask_share of its words or characters replaced."""
    gap = " " if config.mask_unit == "word" else ""
    parts = text.split(gap) if gap else text
    return gap.join(config.mask_text if rng.random() < config.mask_share else x for x in parts)


def _around(prompt: str | Messages, shape: str, told: str) -> str | Messages:
    """The question inside `shape`; of chat messages the last one is the question."""

    def put(question: str) -> str:
        # Not str.format: braces in a question or a solution are text.
        before, _, after = shape.partition("{prompt}")
        return before.replace("{pi}", told) + question + after.replace("{pi}", told)

    if isinstance(prompt, str):
        return put(prompt)
    return [*prompt[:-1], {**prompt[-1], "content": put(prompt[-1]["content"])}]
