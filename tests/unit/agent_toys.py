"""A toy environment, a tiny model on the embedded engine, and requests for tests of episodes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaopd.data import tasks
from megaopd.data.tasks.environments import Step
from megaopd.data.tokenizer import char_tokenizer
from megaopd.data.types import Prompt
from megaopd.rollout.agent import AgentEngine
from megaopd.rollout.base import Request, SamplingParams
from megaopd.rollout.config import AgentConfig
from megaopd.rollout.hf import EmbeddedEngine
from tests.dist.models import VOCAB, tiny

SYMBOLS = "".join(map(chr, range(32, 127))) + "\n" + "\u00e4\u00f6\u00fc\u00df"
TOKENIZER = char_tokenizer(SYMBOLS, eos="~")
EOS = TOKENIZER.eos_token_id
POSITIONS = 256
PARAMS = SamplingParams(12)


class Toy:
    """An environment whose parts a test may replace."""

    def __init__(self, task: "ToyTask", prompt: Prompt) -> None:
        self.task, self.prompt = task, prompt
        self.turns: list[str] = []

    def reset(self, seed: int) -> str:
        if self.task.at_reset is not None:
            self.task.at_reset(seed)
        self.seed = seed
        return self.prompt.text

    def step(self, text: str) -> Step:
        self.turns.append(text)
        self.task.heard.append((self.prompt.id, text))
        return self.task.at_step(self, len(self.turns))


class ToyTask:
    name = "toy"
    at_reset: Callable[[int], None] | None = None

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        self.at_step: Callable[[Toy, int], Step] = lambda toy, turn: Step(
            f"[{toy.seed}: turn {turn}]", 0.25, turn == 3
        )

    def example(self, index: int, seed: int, split: str) -> Any:
        raise NotImplementedError

    def verify(self, response: str, answer: str, meta: Any) -> float:
        return 0.0

    def environment(self, prompt: Prompt) -> Toy:
        return Toy(self, prompt)


def use_toy(monkeypatch: pytest.MonkeyPatch) -> ToyTask:
    """A new task "toy" among the others."""
    task = ToyTask()
    known = tasks.get_task
    monkeypatch.setattr(tasks, "get_task", lambda name: task if name == "toy" else known(name))
    return task


def make_model() -> Any:
    made = tiny("qwen3", tied=False, max_position_embeddings=POSITIONS)
    with torch.no_grad():
        made.lm_head.weight[EOS] *= 2  # so that some turns end before their limit
    return made


def make_engine(model: Any, where: Path) -> EmbeddedEngine:
    """With the model's weights as version 3."""
    model.save_pretrained(where)
    made = EmbeddedEngine(
        where,
        eos_ids=[EOS],
        pad_id=TOKENIZER.pad_token_id,
        dtype=torch.float32,
        device=torch.device("cpu"),
        batch_size=64,
    )
    made.update_weights(model.state_dict().items(), 3)
    return made


def agent(engine: Any, **config: Any) -> AgentEngine:
    return AgentEngine(
        engine,
        TOKENIZER,
        AgentConfig(**config),
        template="raw",
        vocab=VOCAB,
        max_positions=POSITIONS,
    )


def asked(count: int, task: str = "toy", **meta: Any) -> list[Request]:
    made = []
    for i in range(count):
        text = f"Question {i}" + "?" * (i % 5)
        ids = tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])
        prompt = Prompt(f"p{i}", ids, text, "4", task, {"seed": 100 + i, **meta})
        made.append(Request(prompt, seed=1000 + i, index=i % 3))
    return made


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def check_record(sample: Any) -> None:
    """Masks, log-probs, turns and spans of an episode agree."""
    turns = sample.meta["turns"]
    sampled = {t for start, end in turns for t in range(start, end)}
    assert sample.loss_mask == tuple(int(t in sampled) for t in range(len(sample.response_ids)))
    assert all(p == 0.0 for p, m in zip(sample.log_probs, sample.loss_mask, strict=True) if not m)
    assert [[s.start, s.end] for s in sample.spans] == turns
    assert len(sample.meta["turn_rewards"]) == len(turns)
