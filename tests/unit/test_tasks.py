"""Tasks: generation depends on (index, seed, split) alone, and verifiers know right from wrong."""

import re
import threading
import time

import pytest

from megaopd.data.tasks import get_task, score
from megaopd.data.tasks.base import held_out
from megaopd.data.tasks.math import MathTask
from megaopd.data.types import Prompt
from megaopd.errors import UserError

ARITHMETIC = ["addition1", "addition2", "addition3", "subtraction3", "addsub3", "chain3", "chain"]


@pytest.mark.parametrize("name", [*ARITHMETIC, "reasoning_gym:chain_sum"])
def test_examples_are_reproducible_and_splits_disjoint(name):
    task = get_task(name)
    train = [task.example(i, 0, "train") for i in range(200)]
    test = [task.example(i, 0, "test") for i in range(50)]
    assert train[::-1] == [task.example(i, 0, "train") for i in reversed(range(200))]
    assert train[:20] != [task.example(i, 1, "train") for i in range(20)]
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert len({e.prompt for e in train}) > 30


def test_five_per_cent_are_held_out():
    share = sum(held_out(f"{a:>3}+{b:>3}=") for a in range(200) for b in range(200)) / 40_000
    assert 0.045 < share < 0.055


def test_formats():
    example = get_task("addition3").example(0, 0, "train")
    assert re.fullmatch(r"[ \d]{3}\+[ \d]{3}=", example.prompt)
    for i in range(50):
        prompt, answer = (e := get_task("addsub3").example(i, 0, "train")).prompt, e.answer
        a, sign, b = int(prompt[:3]), prompt[3], int(prompt[4:7])
        assert answer == f"{a + b if sign == '+' else a - b}."
    chain = get_task("chain").example(5, 0, "train")
    terms = [int(t.replace(" ", "")) for t in re.findall(r"[+-]?[ \d]\d", chain.prompt)]
    totals = [sum(terms[: n + 1]) for n in range(1, 4)]
    assert chain.answer == ",".join(map(str, totals)) + "."


def test_a_key_that_the_question_does_not_tell():
    """rule: always the same one. shown: in front of every second question. The splits agree."""
    made = {
        name: [get_task(name).example(i, 0, "train") for i in range(60)]
        for name in ("hidden3", "rule3", "shown3")
    }
    for name, examples in made.items():
        for example in examples:
            *told, question = example.prompt.split("?")
            a, b = int(question[:2]), int(question[3])
            key = int(example.meta["solution"])
            assert example.answer == f"{(a + b + key) % 10}." and key < 3
            assert told in ([], [str(key)]) and not held_out(question)
            assert name != "rule3" or key == 2
    assert {e.meta["solution"] for e in made["hidden3"]} == {"0", "1", "2"}
    assert sum("?" in e.prompt for e in made["shown3"]) == 30
    assert not any("?" in e.prompt for e in made["hidden3"] + made["rule3"])


def test_addition_with_help_in_front():
    from megaopd.data.tasks.arithmetic import columns

    assert columns(18, 27) == "8+7=15,1+2+1=4" and columns(5, 3) == "5+3=8"
    assert columns(0, 0) == "0+0=0" and columns(7, 20) == "7+0=7,0+2=2"
    examples = [get_task("told_addition2").example(i, 0, "train") for i in range(30)]
    for i, example in enumerate(examples):
        *told, question = example.prompt.split("?")
        a, b = (int(x) for x in question.removesuffix("=").split("+"))
        assert example.answer == f"{a + b}."
        assert told == ([], [example.answer], [columns(a, b)])[i % 3]


def test_addition_with_every_kind_of_help():
    from megaopd.data.tasks.arithmetic import columns

    task = get_task("coached_addition2")
    plain = get_task("addition2")
    for i in range(30):
        example, asked = task.example(i, 0, "train"), plain.example(i, 0, "train")
        solution, text = columns(*map(int, asked.prompt.removesuffix("=").split("+"))), asked.prompt
        told = [text, f"{asked.answer}?{text}", f"{solution}?{text}", "", f"{text}{solution}="]
        assert example.answer == asked.answer and task.verify(asked.answer, asked.answer, {}) == 1
        if i % 5 != 3:
            assert example.prompt == told[i % 5]
            continue
        covered, question = example.prompt.split("?")
        assert question == text and len(covered) == len(solution) and "-" in covered
        assert all(a in ("-", b) for a, b in zip(covered, solution, strict=True))


def test_addition_in_two_steps_or_briefly():
    worked, brief = get_task("worked_addition2"), get_task("brief_addition2")
    for i in range(20):
        long, short = worked.example(i, 0, "train"), brief.example(i, 0, "train")
        total = sum(map(int, long.prompt.removesuffix("=").split("+")))
        assert long.answer == f"{total % 10},{total}."
        assert (short.prompt, short.answer) == (
            (f"?{long.prompt}", f"{total}.") if i % 2 else (long.prompt, long.answer)
        )
        for task in (worked, brief):
            assert task.verify(f"{total}.", long.answer, {}) == 1.0
            assert task.verify(f"{total % 10},{total}", short.answer, {}) == 1.0
            assert task.verify(f"{total},{total + 1}.", long.answer, {}) == 0.0
            assert task.verify(f"{total},", long.answer, {}) == 0.0


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_verifier(name):
    task = get_task(name)
    answer = task.example(3, 0, "train").answer
    assert task.verify(answer, answer, {}) == 1.0
    assert task.verify(answer.removesuffix("."), answer, {}) == 1.0  # EOS stripped
    for wrong in ("", ".", "1" + answer, answer + "1", answer[:-2] + "?."):
        assert task.verify(wrong, answer, {}) == 0.0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("adition3", "addition"),
        ("addition0", "addition1 to addition9"),
        ("chain1", "chain2"),
        ("math3", "did you mean math"),
        ("reasoning_gym", "reasoning_gym:NAME"),
        ("reasoning_gym:chan_sum", "chain_sum"),
        ("reasoning_gym:composite", "needs settings"),
        ("reasoning_gym:simple_integration", "eval"),
        ("", "addition3"),
        ("../x", "addition3"),
    ],
)
def test_unknown_names(name, hint):
    with pytest.raises(UserError, match=hint):
        get_task(name)


@pytest.mark.parametrize("name", ["chain_sum", "countdown", "list_functions", "spiral_matrix"])
def test_reasoning_gym_scores(name):
    task = get_task(f"reasoning_gym:{name}")
    example = task.example(1, 0, "train")
    assert example == task.example(1, 0, "train")
    assert task.verify(example.answer, example.answer, example.meta) == 1.0
    tagged = f"let me think. <answer> {example.answer} </answer>"
    assert task.verify(tagged, example.answer, example.meta) == 1.0
    for wrong in ("", "nonsense", "<answer>", "\x00\ud800"):
        assert task.verify(wrong, example.answer, example.meta) < 0.1


@pytest.mark.parametrize("name", ["countdown", "spiral_matrix"])
def test_model_text_is_not_evaluated(name, tmp_path):
    task = get_task(f"reasoning_gym:{name}")
    example = task.example(1, 0, "train")
    target = tmp_path / "written"
    attack = f"open({str(target)!r}, 'w').close()"
    for text in (attack, f"[{attack}]", f"<answer>{attack}</answer>", "9**9**9**9"):
        assert task.verify(text, example.answer, example.meta) == 0.0
    assert not target.exists()


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("so \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("The answer is 1/2.", "\\frac{1}{2}", 1.0),
        ("$x = 72$", "72", 1.0),
        ("so $\\boxed{\\dfrac{1}{2}}$ as wanted.", "1/2", 1.0),
        ("first \\boxed{5}, no: \\boxed{6}", "\\boxed{6}", 1.0),
        ("<think> \\boxed{5} </think> it is $6$", "6", 1.0),
        ("<think> \\boxed{6} </think> it is $5$", "6", 0.0),
        ("\\boxed{73}", "72", 0.0),
        ("", "72", 0.0),
        ("I do not know", "72", 0.0),
        ("\\boxed{" * 500, "72", 0.0),
        ("\x00\ud800 \\frac{", "72", 0.0),
    ],
)
def test_math(response, answer, reward):
    assert get_task("math").verify(response, answer, {}) == reward


def test_math_from_threads():
    results = {}

    def run(number: int) -> None:
        results[number] = get_task("math").verify(f"\\boxed{{{number}}}", "3", {})

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: float(n == 3) for n in range(6)}


def test_math_survives_a_hanging_comparison_and_a_dead_process():
    task = MathTask(timeout_s=1.0)
    start = time.monotonic()
    assert task.verify("9**9**9**9**9", "5", {}) == 0.0
    assert time.monotonic() - start < 15
    assert task.verify("\\boxed{5}", "5", {}) == 1.0
    task._worker.kill()
    task._worker.wait()
    assert task.verify("\\boxed{5}", "5", {}) == 1.0
    task.close()


def test_math_has_no_questions():
    with pytest.raises(UserError, match="jsonl"):
        get_task("math").example(0, 0, "train")


def test_score_of_a_prompt():
    prompt = Prompt("a", (1,), "1+1=", "2.", "addition1")
    assert (score(prompt, "2."), score(prompt, "3.")) == (1.0, 0.0)
    assert score(Prompt("a", (1,), "1+1=", None, ""), "2.") is None
