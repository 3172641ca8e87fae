"""Privileged information in the teacher's prompt."""

import json
from dataclasses import replace

import pytest

from megaopd.data.config import DataConfig
from megaopd.data.privileged import teacher_version
from megaopd.data.prompts import PromptStream, fixed_set
from megaopd.data.tokenizer import char_tokenizer
from megaopd.errors import UserError

META = {"solution": "one two three four five six seven eight"}
MASK = DataConfig(source="task:addition3").mask_text
CHAT = [{"role": "system", "content": "old"}, {"role": "user", "content": "why {pi}?"}]


def config(sees, **values):
    return DataConfig(**{"source": "task:addition3", "teacher_sees": sees, **values})


def version(sees, prompt="why {pi}?", **values):
    return teacher_version(prompt, "42", META, config(sees, **values), "file:1")


def test_every_kind_as_text():
    assert version("answer") == ("42\nwhy {pi}?", "")
    assert version("solution", solution_key="solution")[0] == f"{META['solution']}\nwhy {{pi}}?"
    assert version("answer", teacher_text="{prompt} ({pi})")[0] == "why {pi}? (42)"
    assert version("instruction", teacher_text="Be brief.")[0] == "Be brief.\nwhy {pi}?"
    assert version("instruction", teacher_text="!{prompt}")[0] == "!why {pi}?"
    behind = version("think", teacher_text="[{pi}]")
    assert behind == ("why {pi}?", f"[{META['solution']}]")


def test_every_kind_as_chat():
    chat = {"template": "chat"}
    said, behind = version("answer", CHAT, **chat)
    assert said[0] == CHAT[0] and behind == ""
    assert said[1] == {"role": "user", "content": "why {pi}?\n\nA reference solution:\n42"}
    said, _ = version("system", CHAT, teacher_text="Rule.", **chat)
    assert said == [{"role": "system", "content": "Rule."}, CHAT[1]]
    assert version("system", "why?", teacher_text="Rule.", **chat)[0][0]["content"] == "Rule."
    said, behind = version("think", CHAT, **chat)
    assert said == CHAT and behind == f"<think>\n{META['solution']}\n</think>\n\n"


def test_masking_is_a_function_of_seed_and_prompt():
    shape = {"teacher_text": "{pi}|{prompt}"}
    first = version("masked", **shape)[0]
    words = first.split("|")[0].split(" ")
    assert len(words) == 8 and 0 < words.count(MASK) < 8
    assert all(w in (MASK, o) for w, o in zip(words, META["solution"].split(" "), strict=True))
    assert version("masked", **shape)[0] == first
    assert version("masked", seed=5, **shape)[0] != first
    assert version("masked", mask_share=1.0, **shape)[0].startswith(" ".join([MASK] * 8))
    letters = version("masked", mask_text="#", mask_unit="character", **shape)[0].split("|")[0]
    assert len(letters) == len(META["solution"]) and 0 < letters.count("#") < len(letters)
    assert all(a in ("#", b) for a, b in zip(letters, META["solution"], strict=True))


def test_prompts_of_a_task_and_of_a_file(tmp_path):
    tokenizer = char_tokenizer()
    seen = config("answer", teacher_text="{pi}?{prompt}")
    (prompt,) = fixed_set(seen, tokenizer, 1)
    (plain,) = fixed_set(config(""), tokenizer, 1)
    assert prompt.token_ids == plain.token_ids and plain.teacher_prompt_ids is None
    assert tokenizer.decode(prompt.teacher_prompt_ids) == f"{prompt.answer}?{prompt.text}"
    lines = [
        {"prompt": "1+1=", "answer": "2", "why": "1,1"},
        {"prompt": "1+2=", "answer": "3", "why": "1,2", "teacher_prompt": "9="},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = replace(seen, source=str(path), teacher_sees="solution", solution_key="why")
    batch = PromptStream(replace(own, shuffle=False), tokenizer).next_batch(2)
    assert [tokenizer.decode(p.teacher_prompt_ids) for p in batch] == ["1,1?1+1=", "9="]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"teacher_sees": "think"}, "data.template = raw"),
        ({"teacher_sees": "system", "template": "chat"}, "without data.teacher_text"),
        ({"teacher_sees": "answer", "teacher_text": "{pi}"}, "with {prompt} and {pi}"),
        ({"teacher_text": "x"}, "without data.teacher_sees"),
        ({"teacher_sees": "think", "teacher_text": "x"}, "thoughts with {pi}"),
        ({"teacher_sees": "think", "teacher_text": "{pi}{prompt}"}, "without {prompt}"),
        ({"teacher_sees": "masked", "mask_share": 1.5}, "from 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, said):
    with pytest.raises(UserError) as caught:
        config(values.pop("teacher_sees", ""), **values)
    assert said in str(caught.value)


def test_a_prompt_without_a_solution_is_refused_by_name():
    with pytest.raises(UserError, match=r"file:1 has no 'why'"):
        teacher_version("p", "42", META, config("solution", solution_key="why"), "file:1")
