"""What stands between two turns of the student, as token ids.

What was sampled is never tokenised again: the next turn's context is the last one's, its response,
and the ids of the environment's answer with whatever the chat template puts around it.
"""

from collections.abc import Sequence
from typing import Any, Literal

from megaopd.errors import UserError

# Stands for the student's turn in a rendering; no tokenizer sees it.
MARK = "The student's turn."


class TurnFormat:
    """Reads the student's turns and writes the environment's.

    Args:
        tokenizer: a transformers tokenizer.
        template: "chat": the tokenizer's chat template, in which the environment speaks as the
            user; "raw": its words alone, between line breaks.

    Raises:
        UserError: a chat template is wanted, and there is none or it leaves turns out.
    """

    def __init__(self, tokenizer: Any, template: Literal["raw", "chat"]) -> None:
        self._tokenizer, self._chat = tokenizer, template == "chat"
        if self._chat and not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template", fix='data.template="raw"')
        self._special = [
            str(token)
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and str(token)
        ]
        if self._chat:
            self._render("An answer.")  # refused now rather than in the middle of an episode

    def text(self, ids: Sequence[int]) -> str:
        """A turn of the student as the environment reads it: without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def answer(self, turn: Sequence[int], observation: str) -> list[int]:
        """The ids from the end of the student's turn to where its next one begins.

        Args:
            turn: what the student sampled, with the token that ended it if one did.
        """
        text = self._render(observation) if self._chat else f"\n{observation}\n"
        try:
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as err:  # bare Exception from the tokenizers library: a character it lacks
            raise UserError(f"an observation has no tokens: {text[:80]!r} ({err})") from err
        # The template closes the turn with the token that the student itself has ended it with.
        return ids[1:] if self._chat and turn and ids[:1] == [turn[-1]] else ids

    def _render(self, observation: str) -> str:
        """What the chat template writes after the student's turn, up to the next one's start."""
        for token in self._special:  # an observation cannot end its own turn, nor begin another
            observation = observation.replace(token, "")
        messages = [
            {"role": "user", "content": "Begin."},
            {"role": "assistant", "content": MARK},
            {"role": "user", "content": observation},
        ]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as err:  # a template raises what its author chose
            raise UserError(f"the chat template refuses several turns: {err}") from err
        _, mark, after = text.rpartition(MARK)
        if not mark:
            raise UserError("the chat template leaves out what the assistant said")
        return after
