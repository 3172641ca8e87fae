"""Sokoban by reasoning-gym's rules, the calculator, and how prompts choose their environment."""

import ast
import contextlib
import random
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaopd.data.config import DataConfig
from megaopd.data.prompts import generate, load_file
from megaopd.data.tasks import get_environment, get_task, score
from megaopd.data.tasks.environments import Step, seed_of
from megaopd.data.tasks.sokoban import MOVES_PER_TURN, Sokoban, moves_in
from megaopd.data.tasks.tools import Calculator, ToolEnvironment, ToolError
from megaopd.data.tokenizer import char_tokenizer
from megaopd.data.types import Prompt
from megaopd.errors import UserError

PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
TOKENIZER = char_tokenizer(PRINTABLE, eos="~")
ALONE = """\
+ + + + + +
+ X - @ * +
+ X @ - - +
+ - - - - +
+ + + + + +"""


def game(board: str = ALONE) -> Sokoban:
    made = Sokoban(get_task("sokoban6"))
    made.load(board)
    return made


@pytest.mark.parametrize("name", ["sokoban5", "sokoban6", "sokoban7", "calculator2", "calculator4"])
def test_examples_are_reproducible_and_splits_disjoint(name):
    task = get_task(name)
    train = [task.example(i, 0, "train") for i in range(60)]
    test = [task.example(i, 0, "test") for i in range(20)]
    assert train[::-1] == [task.example(i, 0, "train") for i in reversed(range(60))]
    assert train[:20] != [task.example(i, 1, "train") for i in range(20)]
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert len({e.prompt for e in train}) > 30
    for example in train:
        assert task.verify(example.answer, example.answer, example.meta) == 1.0
        assert task.verify("", example.answer, example.meta) == 0.0


@pytest.mark.parametrize(
    "name", ["sokoban4", "sokoban10", "calculator1", "calculator:x", "sokobann"]
)
def test_unknown_sizes(name):
    with pytest.raises(UserError, match=r"sokoban|calculator"):
        get_task(name)


@pytest.mark.parametrize("size", [5, 6, 7, 8, 9])
def test_solutions_solve_the_levels_in_turns(size):
    task = get_task(f"sokoban{size}")
    for index in range(4):
        example = task.example(index, 3, "train")
        environment = get_environment(Prompt("p", (1,), "", "", task.name, example.meta))
        assert environment.reset(example.meta["seed"]) == example.prompt
        rewards, last = [], Step("", 0.0, False)
        for start in range(0, len(example.answer), MOVES_PER_TURN):
            assert not last.done
            moves = example.answer[start : start + MOVES_PER_TURN]
            last = environment.step(f"Now <move>{moves}</move>")
            rewards.append(last.reward)
        assert last.done and sum(rewards) == pytest.approx(1.0)


def test_moves_follow_the_rules_of_reasoning_gym():
    """Random walks, cell by cell against the library's own game."""
    from reasoning_gym.games.contrib.sokoban.src.game import Game

    task, rng = get_task("sokoban7"), random.Random(5)
    for seed in range(20):
        board, _ = task.level(seed)
        mine = game(board)
        grid = np.array([row.split() for row in board.split("\n")])
        theirs = Game(height=grid.shape[0], width=grid.shape[1])
        theirs.load_puzzle_matrix(grid)
        for _ in range(80):
            move = rng.choice("UDLR")
            if mine.solved:
                break
            mine.play(move)
            theirs.player.update(key=move)
            rows = [" ".join(str(mark) for mark in row) for row in theirs.get_matrix()]
            assert mine.board == "\n".join(rows)


def test_a_game_of_sokoban():
    """Walls and boxes in a row do not move; a box that leaves its goal costs what it gained."""
    played = game()
    assert played.step("<move>UR</move>") == Step(f"Boxes on goals: 0 of 2.\n{ALONE}", 0.0, False)
    step = played.step("first <move>R</move>, no: <move> l, L </move>")
    assert step == Step(
        "Boxes on goals: 1 of 2.\n+ + + + + +\n+ $ * - - +\n+ X @ - - +\n+ - - - - +\n+ + + + + +",
        0.5,
        False,
    )
    assert played.step("<move>D</move>").reward == 0.0
    assert played.board.split("\n")[2:4] == ["+ X * - - +", "+ - @ - - +"]
    step = played.step("DRDL")  # nothing but moves: no tag needed
    assert not step.done and played.step("I give up").reward == 0.0
    assert "No moves found" in played.step("<move>xyz</move>").observation
    assert "No moves found" in played.step("").observation


def test_a_box_that_leaves_its_goal_costs_what_it_gained():
    played = game("+ + + + +\n+ * @ X - +\n+ + + + +")
    assert played.play("R") == 1.0 and played.solved
    again = game("+ + + + + +\n+ * @ X - +\n+ @ X - - +\n+ + + + + +")
    assert [again.play(move) for move in "RR"] == [0.5, -0.5]


def test_no_more_moves_than_a_turn_has():
    played = game()
    played.step(f"<move>{'LR' * MOVES_PER_TURN}</move>")
    other = game()
    other.play("LR" * (MOVES_PER_TURN // 2))
    assert played.board == other.board


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_turn(text):
    step = game().step(text)
    assert isinstance(step, Step) and len(step.observation) < 200
    wrapped = game().step(f"<move>{text}</move>")
    assert isinstance(wrapped, Step)
    assert all(set(moves) <= set("UDLR") for moves in moves_in(text))


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("12*7", "84"),
        (" ( 2 + 3 ) * -4 ", "-20"),
        ("7/2", "3.5"),
        ("1/3", "0.333333333333"),
        ("0.1+0.2", "0.3"),
        ("2**10", "1024"),
        ("2^10", "1024"),
        ("2**-1", "0.5"),
        ("17 // 5 + 17 % 5", "5"),
        ("6\u00d77", "42"),
        ("--5", "5"),
        ("123456789*987654321", "121932631112635269"),
        ("10/5", "2"),
    ],
)
def test_calculator(text, result):
    assert Calculator().call(text) == result


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1/0",
        "5 % 0",
        "0**-1",
        "1+",
        "007",
        "2(3)",
        "x",
        "__import__('os')",
        "1,2",
        "'a'*9",
        "9**9**9**9",
        "9**99999",
        "1.5**0.5",
        "(" * 150 + "1" + ")" * 40,
        "9" * 500,
        "(9**999)**4*(9**999)",
        "1" + "*9**1000" * 20,
        "\x00",
        "1\n;2",
    ],
)
def test_calculator_refuses(text):
    begun = time.monotonic()
    with pytest.raises(ToolError):
        Calculator().call(text)
    assert time.monotonic() - begun < 0.5


@given(
    st.recursive(
        st.integers(0, 999).map(str),
        lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
            lambda parts: "(" + " ".join(parts) + ")"
        ),
        max_leaves=8,
    )
)
@settings(max_examples=200, deadline=None)
def test_calculator_equals_exact_arithmetic(text):
    def plain(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        left, right = plain(node.left), plain(node.right)
        name = type(node.op).__name__
        if name == "Div":
            return left / right
        return {"Add": left + right, "Sub": left - right, "Mult": left * right}[name]

    try:
        expected = plain(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        expected = None
    if expected is None or len(text) > Calculator.longest:
        with pytest.raises(ToolError):
            Calculator().value(text)
    else:
        assert Calculator().value(text) == expected


@given(st.text(alphabet="0123456789+-*/%(). ^", max_size=40))
@settings(max_examples=300, deadline=None)
def test_calculator_answers_anything(text):
    with contextlib.suppress(ToolError):
        Calculator().call(text)


def test_an_episode_with_the_calculator():
    example = get_task("calculator3").example(0, 0, "train")
    prompt = Prompt("p", (1,), example.prompt, example.answer, "calculator3", example.meta)
    environment = get_environment(prompt)
    assert environment.reset(0) == example.prompt
    call = environment.step(f"Let me see: <tool>{example.meta['question']}</tool>")
    assert call == Step(f"<result>{example.answer}</result>", 0.0, False)
    assert environment.step("<tool>1/0</tool>").observation == (
        "<result>error: division by zero</result>"
    )
    two = environment.step("<tool>1+1</tool><tool>2*2</tool> <answer>5</answer>")
    assert two == Step("<result>2</result>\n<result>4</result>", 0.0, False)
    crowd = environment.step("<tool>1</tool>" * 20).observation
    assert crowd.count("<result>") == 9 and "more than 8 calls" in crowd
    assert environment.step(f"so <answer> {example.answer} </answer>") == Step("", 1.0, True)
    assert environment.step("<answer>12.5</answer>") == Step("", 0.0, True)
    assert environment.step("") == Step("", 0.0, True)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("it is 84", "84", 1.0),
        ("12*7 is 84.", "84", 1.0),
        ("<answer>1,234</answer>", "1234", 1.0),
        ("<answer>83</answer> or <answer>84</answer>", "84", 1.0),
        ("<answer>84</answer> not 85", "84", 1.0),
        ("<answer>-5</answer>", "-5", 1.0),
        ("1/2", "0.5", 1.0),
        ("1/0", "0.5", 0.0),
        ("<answer>eighty</answer> 84", "84", 0.0),
        ("84", "", 0.0),
        ("9" * 100_000, "84", 0.0),
    ],
)
def test_numeric_answers(response, answer, reward):
    assert get_task("calculator").verify(response, answer, {}) == reward


def test_several_tools_are_called_by_name():
    class Shout:
        name = "shout"

        def call(self, text: str) -> str:
            return text.upper()

    environment = ToolEnvironment("q", [Calculator(), Shout()], lambda text: 1.0)
    said = environment.step("<tool>shout hello</tool><tool>calculator 2*3</tool><tool>2*3</tool>")
    assert said.observation == (
        "<result>HELLO</result>\n<result>6</result>\n"
        "<result>error: no such tool; there are calculator, shout</result>"
    )


def test_prompts_choose_their_environment(tmp_path):
    """A generated prompt brings the seed of its level; a line of a file may name one."""
    config = DataConfig("task:sokoban6", max_prompt_tokens=2000)
    prompt = generate(config, TOKENIZER, 4)
    assert prompt.task == "sokoban6" and seed_of(prompt) == prompt.meta["seed"]
    environment = get_environment(prompt)
    assert environment.reset(seed_of(prompt)) == prompt.text
    assert score(prompt, f"<move>{prompt.answer}</move>") == 1.0

    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "Six by seven?", "answer": "42", "task": "calculator"}\n'
        '{"prompt": "1+1=", "answer": "2", "task": "addition1"}\n'
        '{"prompt": "Push", "answer": "", "task": "sokoban6", "seed": "five"}\n'
    )
    asked, plain, wrong = load_file(DataConfig(str(file)), TOKENIZER)[0]
    assert get_environment(asked).step("42") == Step("", 1.0, True)
    assert get_environment(plain) is None
    assert get_environment(Prompt("x", (1,), "", None, "")) is None
    with pytest.raises(UserError, match="seed = 'five'"):
        seed_of(wrong)
