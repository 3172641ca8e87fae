"""What a run reads besides its models: the data's own responses."""

import pytest

from megaopd.data.config import DataConfig
from megaopd.data.types import Prompt
from megaopd.errors import UserError
from megaopd.inputs import example


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    ("example_of", "key", "text"),
    [("answer", "solution", "5"), ("solution", "solution", "2+3=5"), ("solution", "steps", "a")],
)
def test_an_example_is_the_answer_or_the_worked_solution(example_of, key, text):
    data = DataConfig(source="x.jsonl", example=example_of, solution_key=key)
    prompt = Prompt("p", (1,), "2+3=", "5", "math", {"solution": "2+3=5", "steps": "a"})
    found = example(prompt, Letters(), data)
    assert found.response_ids == (*map(ord, text), 0)


@pytest.mark.parametrize(("example_of", "fix"), [("answer", "solution"), ("solution", "answer")])
def test_a_prompt_without_one_is_told_of(example_of, fix):
    data = DataConfig(source="x.jsonl", example=example_of)
    with pytest.raises(UserError, match=f"(?s)has no '{example_of}'.*data.example={fix}"):
        example(Prompt("p", (1,), "2+3=", None, "math", {"solution": ""}), Letters(), data)
