"""Tokenizers: the character-level one of the toy tasks, loading, and the teacher check."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaopd.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

TOY_SYMBOLS = "0123456789+-=, .?"


def char_tokenizer(
    symbols: str = TOY_SYMBOLS, eos: str = ".", pad: str = "<pad>"
) -> "PreTrainedTokenizerFast":
    """A tokenizer whose tokens are single characters, the space included; ids follow `symbols`.

    `pad` takes the last id (17 of 18 with the defaults). A character outside `symbols` is an error
    of the tokenizers library, not an unknown token.

    Raises:
        UserError: a symbol occurs twice, or `eos` is none of them.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if len(set(symbols)) != len(symbols) or pad in symbols:
        raise UserError(f"symbols {symbols!r}, pad {pad!r}", expected="each symbol once")
    if eos not in symbols:
        raise UserError(f"eos {eos!r}", expected=f"one of {symbols!r}")
    vocab = {token: index for index, token in enumerate([*symbols, pad])}
    # Without an unknown token, WordLevel raises on a character that it does not know.
    core = Tokenizer(models.WordLevel(vocab, unk_token=None))  # pyright: ignore[reportArgumentType]
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=pad, clean_up_tokenization_spaces=False
    )


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in a local folder; nothing is downloaded and no code of the folder runs.

    Raises:
        UserError: no such folder, no tokenizer in it, or one that transformers cannot read.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no folder {path}", expected="the local folder of a model or tokenizer")
    if not (path / "tokenizer.json").is_file():
        raise UserError(
            f"{path} has no tokenizer.json", fix="copy the model's tokenizer files into it"
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as err:  # the tokenizers library raises bare Exception on a malformed file
        raise UserError(f"the tokenizer in {path} cannot be read: {err}") from err


def check_same_tokenizer(student: Any, teacher: Any) -> None:
    """Refuse a teacher whose token ids mean something else than the student's.

    The teacher scores the student's token ids, so the two vocabularies must agree id by id.

    Raises:
        UserError: the lowest id at which they differ.
    """
    mine: dict[str, int] = student.get_vocab()
    theirs: dict[str, int] = teacher.get_vocab()
    if mine == theirs:
        return
    by_id = [{index: token for token, index in vocab.items()} for vocab in (mine, theirs)]
    first = min(set(by_id[0].items()) ^ set(by_id[1].items()))[0]
    names = [repr(vocab[first]) if first in vocab else "nothing" for vocab in by_id]
    raise UserError(
        f"id {first} is {names[0]} to the student ({len(mine)} tokens) "
        f"and {names[1]} to the teacher ({len(theirs)} tokens)",
        expected="the same tokenizer for both",
        fix="take a teacher of the student's model family",
    )


def spread_ids(tokenizer: Any, count: int) -> list[int]:
    """At most `count` of the tokenizer's ids, evenly spread, and its special ones."""
    known = sorted(tokenizer.get_vocab().values())
    return sorted({*known[:: max(1, len(known) // count)], *tokenizer.all_special_ids})


def check_same_texts(student: Any, ids: Sequence[int], texts: Sequence[str]) -> None:
    """Refuse a teacher of which only the texts of some ids are known.

    Args:
        ids: of the student, in order; the teacher may know only the first of them.
        texts: what the teacher's tokenizer decodes each to.

    Raises:
        UserError: the lowest of the ids whose texts differ.
    """
    for index, theirs in zip(ids, texts, strict=False):
        mine = student.decode([index], skip_special_tokens=False)
        if mine != theirs:
            raise UserError(
                f"id {index} is {mine!r} to the student and {theirs!r} to the teacher's servers",
                expected="the same tokenizer for both",
                fix="take a teacher of the student's model family",
            )
