"""The bank of skills: what comes in, what it gives, that it is bounded and survives a restart."""

import json
from dataclasses import replace

import pytest

from megaopd.data.config import DataConfig
from megaopd.data.privileged import SKILL
from megaopd.data.prompts import PromptStream, fixed_set
from megaopd.data.skills import SUMMARIZERS, SkillBank
from megaopd.data.tokenizer import char_tokenizer
from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.schema import load_config

TOKENIZER = char_tokenizer()
CONFIG = DataConfig(
    source="task:addition3", teacher_sees="skill", teacher_text="{pi}?{prompt}", skill_bank=3
)


def ids(text):
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def bank(**changes):
    config = replace(CONFIG, **changes)
    return SkillBank(config, TOKENIZER, lambda s: TOKENIZER.decode(list(s.response_ids)))


def prompt(text, name=None):
    (one,) = fixed_set(CONFIG, TOKENIZER, 1)
    told = one.teacher_text.replace(one.text, text)
    return replace(one, id=name or text, text=text, token_ids=ids(text), teacher_text=told)


def sample(text, answer, reward=1.0, **values):
    return Sample(prompt(text), ids(answer), None, "stop", 0, reward=reward, **values)


def told(skills, text):
    (one,) = skills.fill([sample(text, "0")])
    given = one.prompt.teacher_prompt_ids
    return None if given is None else TOKENIZER.decode(list(given))


def test_prompts_wait_for_their_skill():
    (one,) = PromptStream(CONFIG, TOKENIZER).next_batch(1)
    assert one.teacher_prompt_ids is None and one.teacher_text == f"{SKILL}?{one.text}"
    assert one.token_ids == ids(one.text)


def test_the_first_step_has_none_and_the_next_reads_what_it_left():
    skills = bank()
    first = [sample("1+2=", "3"), sample("4+4=", "9", reward=0.0)]
    assert skills.fill(first) == first
    skills.add(first)
    assert told(skills, "1+3=") == "1+2=3?1+3="
    assert told(skills, "4+4=") == "1+2=3?4+4="  # failures leave nothing


def test_only_verified_finished_rollouts_come_in_one_a_prompt():
    skills = bank()
    skills.add(
        [
            sample("1+1=", "2", reward=None),
            replace(sample("1+2=", "3"), finish_reason="length"),
            sample("1+3=", "4", kind="sft"),
            sample("1+4=", "5"),
            sample("1+4=", "05", index=1),
        ]
    )
    assert skills.state() == [["1+4=", "addition3", list(ids("1+4=")), "1+4=5"]]


def test_the_nearest_prompt_of_the_task_and_the_newest_of_equals():
    skills = bank()
    skills.add([sample("12+34=", "46"), sample("77+88=", "165")])
    assert told(skills, "12+35=") == "12+34=46?12+35="
    assert told(skills, "78+88=") == "77+88=165?78+88="
    assert told(skills, "9") == "77+88=165?9"  # nothing in common with either
    other = replace(prompt("12+34=", "x"), task="chain4")
    (one,) = skills.fill([replace(sample("5", "5"), prompt=other)])
    assert one.prompt.teacher_prompt_ids is None


def test_bounded_and_the_newest_stay():
    skills = bank()
    for n in range(6):
        skills.add([sample(f"{n}+1=", str(n + 1))])
    skills.add([sample("3+1=", "4")])  # again: the newest now
    assert [entry[0] for entry in skills.state()] == ["4+1=", "5+1=", "3+1="]
    short = bank(skill_chars=4)
    short.add([sample("1+2=", "3")])
    assert short.state()[0][3] == "1+2="


def test_it_survives_a_restart():
    skills, again = bank(), bank()
    skills.add([sample("12+34=", "46"), sample("77+88=", "165")])
    again.load_state(json.loads(json.dumps(skills.state())))
    assert again.state() == skills.state()
    assert told(again, "12+35=") == told(skills, "12+35=")
    again.add([sample("1+1=", "2")])
    again.add([sample("1+2=", "3")])
    assert len(again) == 3 and again.state()[0][0] == "77+88="


def test_the_student_and_samples_of_others_are_told_nothing():
    skills = bank()
    skills.add([sample("1+2=", "3")])
    mine, other = skills.fill([sample("1+3=", "4"), sample("1+3=", "4", kind="sft")])
    assert mine.prompt.token_ids == ids("1+3=") and mine.privileged
    assert not other.privileged


def test_summarizers(monkeypatch):
    monkeypatch.setitem(SUMMARIZERS, "last", lambda prompt, response: response[-1:])
    skills = bank(summarizer="last")
    skills.add([sample("77+88=", "165"), sample("1+1=", "")])
    assert [entry[3] for entry in skills.state()] == ["5"]
    with pytest.raises(UserError, match=r"data\.summarizer = 'none'"):
        bank(summarizer="none")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.skill_bank=0"], "at least 1"),
        (["data.template=chat"], "set data.summarizer=response"),
        (["data.teacher_text=x"], "{prompt} and {pi}"),
        (["teacher.kind=frozen", "remote_teacher.addresses=[\"http://h:1\"]"], "in this job"),
    ],
)  # fmt: skip
def test_refused(overrides, said):
    run = [
        "student.path=s", "data.source=task:addition3", "data.teacher_sees=skill",
        "objective.loss=k2", "teacher.kind=periodic", "teacher.sync_every=1",
    ]  # fmt: skip
    load_config(None, run)
    with pytest.raises(UserError) as caught:
        load_config(None, [*run, *overrides])
    assert said in str(caught.value)
