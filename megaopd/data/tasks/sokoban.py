"""Sokoban over several turns: reasoning-gym's levels, and a board that moves are played on.

    sokoban6    6 x 6 cells with their walls, 2 boxes (two fewer than the inner side: 5 to 9)

A turn is <move>LLUR</move>: up to eight moves. Its reward is the share of the boxes that were not
on a goal at first which it brought there (less those it took away), so a solved level adds up to 1.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from megaopd.data.tasks.base import Example, Split, draw_in_split, stable_hash
from megaopd.data.tasks.environments import Step
from megaopd.data.types import Prompt
from megaopd.errors import UserError

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
MOVES_PER_TURN = 8
LEGEND = "* you, % you on a goal, @ box, $ box on a goal, X goal, + wall, - floor"
INSTRUCTIONS = f"""You play Sokoban: push every box onto a goal. A box cannot be pulled.
{LEGEND}.
Answer with your next moves (U, D, L, R), at most {MOVES_PER_TURN}: <move>LLUR</move>
You are then shown the board again.
"""
_MOVE = re.compile(r"<move>(.*?)</move>", re.DOTALL | re.IGNORECASE)
_BARE = re.compile(r"\s*[UDLR][UDLR\s]*", re.IGNORECASE)


class SokobanTask:
    """Levels of one size; see the top of the file."""

    def __init__(self, size: int) -> None:
        import reasoning_gym

        if not 5 <= size <= 9:
            raise UserError(f"task sokoban{size}", expected="sokoban5 to sokoban9")
        self.name, boxes = f"sokoban{size}", size - 4
        sides = {"min_w": size, "max_w": size, "min_h": size, "max_h": size}
        # Seed 0 always, as for every task of that library: its seeds overlap.
        self._dataset: Any = reasoning_gym.create_dataset(
            "sokoban", seed=0, size=1, min_boxes=boxes, max_boxes=boxes, **sides
        )

    def example(self, index: int, seed: int, split: Split) -> Example:
        """Level `index`; the answer is the moves of a shortest known solution."""

        def draw(attempt: int) -> Example:
            item = stable_hash(self.name, seed, index, attempt) % 2**31
            board, answer = self.level(item)
            return Example(INSTRUCTIONS + board, answer, {"seed": item})

        return draw_in_split(draw, split)

    def verify(self, response: str, answer: str, meta: Mapping[str, Any]) -> float:
        """Reward of one response that holds all its moves, in one <move> or several."""
        game = Sokoban(self)
        game.reset(meta.get("seed", 0))
        total = game.play("".join(moves_in(response)))
        return min(max(total, 0.0), 1.0)

    def environment(self, prompt: Prompt) -> "Sokoban":
        return Sokoban(self)

    def level(self, seed: int) -> tuple[str, str]:
        """(board, solution): the first level from `seed` on that is not solved as it stands."""
        for item in itertools.count(seed):
            entry = self._dataset[item]
            rows = entry["metadata"]["gamestr"].split("\n")
            board = "\n".join(row.strip() for row in rows if row.strip())
            if "@" in board:
                return board, str(entry["answer"])
        raise AssertionError("endless")


class Sokoban:
    """One game. Cells are (row, column); what lies outside the board is wall."""

    def __init__(self, task: SokobanTask) -> None:
        self._task = task

    def reset(self, seed: int) -> str:
        board, _ = self._task.level(seed)
        self.load(board)
        return INSTRUCTIONS + board

    def load(self, board: str) -> None:
        """Set up a board that is written as `board` writes it."""
        rows = [row.split() for row in board.split("\n")]
        cells = {(r, c): mark for r, row in enumerate(rows) for c, mark in enumerate(row)}
        self._shape = len(rows), max(map(len, rows))
        self._floor = {cell for cell, mark in cells.items() if mark != "+"}
        self._goals = {cell for cell, mark in cells.items() if mark in "X$%"}
        self._boxes = {cell for cell, mark in cells.items() if mark in "@$"}
        self._player = next(cell for cell, mark in cells.items() if mark in "*%")
        self._misplaced = len(self._boxes - self._goals)

    def step(self, text: str) -> Step:
        """Play the moves of the last <move>; a text of nothing but moves needs no tag."""
        found = moves_in(text)
        if not found:
            return Step(
                f"No moves found. Write them so: <move>LLUR</move>\n{self.board}", 0.0, False
            )
        reward = self.play(found[-1][:MOVES_PER_TURN])
        return Step(f"{self.status}\n{self.board}", reward, self.solved)

    def play(self, moves: str) -> float:
        """Make these moves until the level is solved; the reward. A blocked move does nothing."""
        before = len(self._boxes & self._goals)
        for letter in moves:
            if not self.solved:
                self._move(MOVES[letter])
        return (len(self._boxes & self._goals) - before) / self._misplaced

    def _move(self, by: tuple[int, int]) -> None:
        target = self._player[0] + by[0], self._player[1] + by[1]
        beyond = target[0] + by[0], target[1] + by[1]
        if target in self._boxes:
            if beyond in self._boxes or beyond not in self._floor:
                return
            self._boxes.remove(target)
            self._boxes.add(beyond)
        if target in self._floor:
            self._player = target

    @property
    def solved(self) -> bool:
        return self._boxes <= self._goals

    @property
    def status(self) -> str:
        return f"Boxes on goals: {len(self._boxes & self._goals)} of {len(self._boxes)}."

    @property
    def board(self) -> str:
        height, width = self._shape
        rows = ([self._mark((r, c)) for c in range(width)] for r in range(height))
        return "\n".join(" ".join(row) for row in rows)

    def _mark(self, cell: tuple[int, int]) -> str:
        goal = cell in self._goals
        if cell == self._player:
            return "%" if goal else "*"
        if cell in self._boxes:
            return "$" if goal else "@"
        return "X" if goal else "-" if cell in self._floor else "+"


def moves_in(text: str) -> list[str]:
    """The moves of every <move>, as letters of MOVES; other characters in it are left out."""
    groups = _MOVE.findall(text) or ([text] if _BARE.fullmatch(text) else [])
    found = ("".join(letter for letter in group.upper() if letter in MOVES) for group in groups)
    return [moves for moves in found if moves]
