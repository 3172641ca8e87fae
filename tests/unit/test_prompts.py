"""The prompt stream: resumable, independent of batch size, strict about its input."""

import json
from dataclasses import replace

import pytest

from megaopd.config import build
from megaopd.data.config import DataConfig
from megaopd.data.prompts import PromptStream, fixed_set
from megaopd.data.tokenizer import char_tokenizer
from megaopd.errors import UserError

TOKENIZER = char_tokenizer()
CHAT = char_tokenizer("0123456789+-=, .?<>:abcdefghijklmnopqrstuvwxyz")
CHAT.chat_template = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def jsonl(tmp_path):
    def write(*records) -> str:
        path = tmp_path / "prompts.jsonl"
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


@pytest.fixture
def ten(jsonl):
    return jsonl(*[{"prompt": f"{i}+{i}=", "answer": f"{2 * i}."} for i in range(10)])


def ids(prompts) -> list[str]:
    return [prompt.id for prompt in prompts]


@pytest.mark.parametrize("source", ["file", "task:addition3", "task:addition2"])
@pytest.mark.parametrize("num_prompts", [0, 7])
def test_order_is_independent_of_batch_size_and_resumes(source, num_prompts, ten):
    config = DataConfig(ten if source == "file" else source, num_prompts=num_prompts, seed=3)
    whole = PromptStream(config, TOKENIZER).next_batch(40)
    stream = PromptStream(config, TOKENIZER)
    pieces = [p for n in (1, 2, 3, 5, 8) for p in stream.next_batch(n)]
    assert pieces == whole[:19]

    resumed = PromptStream(config, TOKENIZER)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert resumed.next_batch(21) == whole[19:] == stream.next_batch(21)
    assert resumed.state_dict() == stream.state_dict()


def test_every_epoch_is_another_permutation(ten):
    stream = PromptStream(DataConfig(ten), TOKENIZER)
    epochs = [ids(stream.next_batch(10)) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(epoch) for epoch in epochs}) == 1
    other = PromptStream(DataConfig(ten, seed=1), TOKENIZER)
    assert ids(other.next_batch(10)) != epochs[0]
    plain = PromptStream(DataConfig(ten, shuffle=False), TOKENIZER)
    assert ids(plain.next_batch(20)) == [f"prompts.jsonl:{i}" for i in range(1, 11)] * 2


def test_tasks_give_tokens_answers_and_unique_ids():
    prompts = PromptStream(DataConfig("task:addition3"), TOKENIZER).next_batch(100)
    assert len(set(ids(prompts))) == 100
    for prompt in prompts:
        a, b = prompt.text.removesuffix("=").split("+")
        assert prompt.answer == f"{int(a) + int(b)}."
        assert prompt.task == "addition3"
        assert TOKENIZER.decode(prompt.token_ids) == prompt.text


def test_resume_is_refused_on_a_changed_file_or_seed(ten, jsonl):
    config = DataConfig(ten)
    state = PromptStream(config, TOKENIZER).state_dict()
    with pytest.raises(UserError, match="seed 1 differs") as caught:
        PromptStream(replace(config, seed=1), TOKENIZER).load_state_dict(state)
    assert caught.value.expected == "seed 0"
    jsonl(*[{"prompt": f"{i}+1=", "answer": "1."} for i in range(10)])
    with pytest.raises(UserError, match=r"fingerprint .* differs") as caught:
        PromptStream(config, TOKENIZER).load_state_dict(state)
    assert state["fingerprint"] in caught.value.expected
    assert "restore the file" in caught.value.fix


def test_fixed_set(ten):
    config = DataConfig(ten)
    assert ids(fixed_set(config, TOKENIZER, 3)) == [f"prompts.jsonl:{i}" for i in (1, 2, 3)]
    assert len(fixed_set(config, TOKENIZER, 50)) == 10
    test = replace(DataConfig("task:addition3"), split="test")
    held_out = fixed_set(test, TOKENIZER, 30)
    assert held_out == fixed_set(test, TOKENIZER, 60)[:30]
    train = PromptStream(DataConfig("task:addition3"), TOKENIZER).next_batch(500)
    assert not {p.text for p in held_out} & {p.text for p in train}
    with pytest.raises(UserError, match="at least 1"):
        fixed_set(config, TOKENIZER, 0)


def test_chat_template(jsonl):
    messages = [{"role": "system", "content": "sum"}, {"role": "user", "content": "1+1"}]
    path = jsonl({"prompt": "1+1", "solution": "two"}, {"prompt": messages})
    config = DataConfig(path, template="chat", system="be brief", shuffle=False)
    first, second = PromptStream(config, CHAT).next_batch(2)
    assert first.text == "<system>be brief<user>1+1<assistant>"
    assert second.text == "<system>sum<user>1+1<assistant>"
    assert CHAT.decode(first.token_ids) == first.text
    assert (first.answer, first.task, first.meta) == (None, "", {"solution": "two"})
    direct = CHAT.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(second.token_ids) == direct
    with pytest.raises(UserError, match="no chat template"):
        PromptStream(config, TOKENIZER)
    with pytest.raises(UserError, match=r"prompts.jsonl:2: chat messages"):
        PromptStream(replace(config, template="raw", system=""), CHAT)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"prompts\.jsonl:2: not JSON"),
        ("[1]", r"prompts\.jsonl:2: no prompt"),
        ({"text": "1"}, r"prompts\.jsonl:2: no prompt"),
        ({"prompt": ""}, r"prompts\.jsonl:2: prompt = ''"),
        ({"prompt": 3}, r"prompts\.jsonl:2: prompt = '3'"),
        ({"prompt": [{"role": "user"}]}, r"prompts\.jsonl:2: prompt = "),
        ({"prompt": "1", "answer": 2}, r"prompts\.jsonl:2: answer = 2\n.*a string"),
        ({"prompt": "1", "answer": "2", "task": "sums"}, r"prompts\.jsonl:2: no task 'sums'"),
        ({"prompt": "1", "id": "a"}, r"id 'a' occurs twice"),
        ({"prompt": "1#2"}, r"prompts\.jsonl:2: '1#2' has no tokens"),
    ],
)
def test_malformed_lines_are_named(jsonl, line, message):
    path = jsonl({"prompt": "1+1=", "id": "a"}, line)
    with pytest.raises(UserError, match=message):
        PromptStream(DataConfig(path), TOKENIZER)


def test_missing_and_empty_files(tmp_path, jsonl):
    with pytest.raises(UserError, match="no prompt file"):
        PromptStream(DataConfig(str(tmp_path / "absent.jsonl")), TOKENIZER)
    with pytest.raises(UserError, match="is empty"):
        PromptStream(DataConfig(jsonl("", "  ")), TOKENIZER)
    (tmp_path / "prompts.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        PromptStream(DataConfig(str(tmp_path / "prompts.jsonl")), TOKENIZER)


def test_long_prompts_are_refused_or_skipped(jsonl):
    path = jsonl(*[{"prompt": "1" * n} for n in (3, 8, 4, 9)])
    config = DataConfig(path, max_prompt_tokens=5, shuffle=False)
    with pytest.raises(UserError, match=r"2 prompts .* first is prompts\.jsonl:2 with 8") as caught:
        PromptStream(config, TOKENIZER)
    assert "max_prompt_tokens=9" in caught.value.fix
    stream = PromptStream(replace(config, too_long="skip"), TOKENIZER)
    assert (stream.skipped, stream.size) == (2, 2)
    assert [p.text for p in stream.next_batch(4)] == ["111", "1111"] * 2
    with pytest.raises(UserError, match="too long"):
        PromptStream(replace(config, too_long="skip", max_prompt_tokens=2), TOKENIZER)


def test_long_generated_prompts_are_skipped():
    config = DataConfig("task:addition3", max_prompt_tokens=5)
    with pytest.raises(UserError, match="addition3/train/0/0 with 8 tokens"):
        PromptStream(config, TOKENIZER).next_batch(1)
    with pytest.raises(UserError, match="in a row"):
        PromptStream(replace(config, too_long="skip"), TOKENIZER).next_batch(1)
    assert fixed_set(replace(config, too_long="skip"), TOKENIZER, 2) == []


@pytest.mark.parametrize(
    "values",
    [
        {"source": ""},
        {"source": "task:"},
        {"source": "x", "num_prompts": -1},
        {"source": "x", "max_prompt_tokens": 0},
        {"source": "x", "system": "be brief"},
        {"source": "x", "split": "dev"},
        {"source": "x", "shufle": True},
        {},
    ],
)
def test_bad_config(values):
    with pytest.raises(UserError):
        build(DataConfig, values)


def test_unknown_task_is_refused_at_once():
    with pytest.raises(UserError, match="did you mean addition"):
        PromptStream(DataConfig("task:adition3"), TOKENIZER)


def test_a_prompt_that_the_teacher_alone_reads(jsonl):
    path = jsonl(
        {"prompt": "1+1=", "teacher_prompt": "2. 1+1=", "answer": "2."},
        {"prompt": "2+2=", "answer": "4.", "source": "x"},
    )
    told, bare = fixed_set(DataConfig(path), TOKENIZER, 2)
    assert TOKENIZER.decode(told.teacher_prompt_ids) == "2. 1+1=" and told.text == "1+1="
    assert told.meta == {} and bare.teacher_prompt_ids is None and bare.meta == {"source": "x"}
    messages = [{"role": "user", "content": "1+1"}]
    secret = [{"role": "system", "content": "2"}, *messages]
    path = jsonl({"prompt": messages, "teacher_prompt": secret})
    (prompt,) = fixed_set(DataConfig(path, template="chat"), CHAT, 1)
    assert CHAT.decode(prompt.teacher_prompt_ids) == "<system>2<user>1+1<assistant>"
    with pytest.raises(UserError, match="teacher_prompt = "):
        fixed_set(DataConfig(jsonl({"prompt": "1", "teacher_prompt": 3})), TOKENIZER, 1)
