"""The character tokenizer, loading from disk, and the student/teacher check."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaopd.data.tokenizer import (
    TOY_SYMBOLS,
    char_tokenizer,
    check_same_tokenizer,
    load_tokenizer,
)
from megaopd.errors import UserError

TOKENIZER = char_tokenizer()


def test_vocabulary_is_the_symbols_in_order_and_pad():
    assert len(TOKENIZER) == 18
    assert TOKENIZER.convert_ids_to_tokens(list(range(18))) == [*TOY_SYMBOLS, "<pad>"]
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (TOY_SYMBOLS.index("."), 17)


@given(st.text(alphabet=TOY_SYMBOLS, max_size=40))
@settings(max_examples=100, deadline=None)
def test_round_trip_is_exact(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert ids == [TOY_SYMBOLS.index(symbol) for symbol in text]
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_can_be_left_out():
    ids = [*TOKENIZER.encode("12. "), TOKENIZER.pad_token_id]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "12 "


def test_unknown_character_is_an_error():
    with pytest.raises(Exception, match="UNK"):
        TOKENIZER("1x")


@pytest.mark.parametrize(("symbols", "eos"), [("1123.", "."), ("123", ".")])
def test_bad_symbols(symbols, eos):
    with pytest.raises(UserError):
        char_tokenizer(symbols, eos)


def test_save_and_load(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    check_same_tokenizer(TOKENIZER, loaded)
    text = " 12+  7=19.?, "
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (15, 17)


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_other_vocabulary_is_refused_at_the_first_difference():
    with pytest.raises(UserError, match=r"id 10 is '\+' to the student .* and '\*' to the teacher"):
        check_same_tokenizer(TOKENIZER, char_tokenizer("0123456789*-=, .?"))
    with pytest.raises(UserError, match=r"id 17 is '<pad>' .* and '!' to the teacher \(19 tokens"):
        check_same_tokenizer(TOKENIZER, char_tokenizer(TOY_SYMBOLS + "!"))
