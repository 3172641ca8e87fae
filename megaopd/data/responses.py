"""Responses on disk: what `megaopd sample` wrote, and what [mix] puts beside the student's own.

One JSON object a line: prompt_id, prompt_ids, prompt, answer, task, index, response_ids, response,
log_probs (of the law that sampled it, or null), finish_reason, reward, pass_rate (of its prompt's
samples, or null). Ids are what is trained on; texts are for people. Nothing is tokenised again.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megaopd.data.types import Kind, Prompt, Sample
from megaopd.errors import UserError


def to_record(sample: Sample, text: str, pass_rate: float | None) -> dict[str, Any]:
    """One line of the file."""
    prompt = sample.prompt
    return {
        "prompt_id": prompt.id,
        "prompt_ids": list(prompt.token_ids),
        "prompt": prompt.text,
        "answer": prompt.answer,
        "task": prompt.task,
        "index": sample.index,
        "response_ids": list(sample.response_ids),
        "response": text,
        "log_probs": None if sample.log_probs is None else list(sample.log_probs),
        "finish_reason": sample.finish_reason,
        "reward": sample.reward,
        "pass_rate": pass_rate,
    }


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file; a last line that was cut off (a killed run) is left out.

    Raises:
        UserError: no such file, or a line that is not one of these records.
    """
    if not path.is_file():
        raise UserError(
            f"no file {path}", expected="responses, one JSON object a line, of `megaopd sample`"
        )
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not (record["prompt_ids"] and record["response_ids"] and record["prompt_id"]):
                raise ValueError("empty")
        except (ValueError, KeyError, TypeError) as err:
            if number == len(lines):  # no newline behind it: it was being written
                return
            raise UserError(
                f"{path}:{number} is no response ({type(err).__name__}: {err})",
                expected="prompt_id, prompt_ids and response_ids, as `megaopd sample` writes them",
            ) from err
        yield record


def load_responses(
    path: Path, *, kind: Kind, vocab: int, least_reward: float, least_pass_rate: float
) -> list[Sample]:
    """The responses of a file that are good enough, as samples of `kind`.

    replay: one of each prompt, the first that is good enough, so that no prompt counts twice.

    Raises:
        UserError: ids outside the vocabulary, or nothing left.
    """
    kept: list[Sample] = []
    seen: set[str] = set()
    for record in read_records(path):
        if (record.get("reward") or 0.0) < least_reward:
            continue
        if (record.get("pass_rate") or 0.0) < least_pass_rate:
            continue
        if kind == "replay" and record["prompt_id"] in seen:
            continue
        seen.add(record["prompt_id"])
        kept.append(_sample(record, kind, vocab, path))
    if not kept:
        raise UserError(
            f"{path} holds no response with a reward of {least_reward} and a pass rate of "
            f"{least_pass_rate}",
            expected="at least one",
            fix="lower mix.least_reward or mix.least_pass_rate, or sample more",
        )
    return kept


def _sample(record: dict[str, Any], kind: Kind, vocab: int, path: Path) -> Sample:
    ids = [*record["prompt_ids"], *record["response_ids"]]
    if not all(isinstance(i, int) and 0 <= i < vocab for i in ids):
        raise UserError(
            f"{path}: prompt {record['prompt_id']} has ids outside 0 to {vocab - 1}",
            expected="responses in the student's own tokens",
            fix="sample them with a model that has the student's tokenizer",
        )
    prompt = Prompt(
        id=record["prompt_id"],
        token_ids=tuple(record["prompt_ids"]),
        text=record.get("prompt", ""),
        answer=record.get("answer"),
        task=record.get("task") or "",
    )
    return Sample(
        prompt=prompt,
        response_ids=tuple(record["response_ids"]),
        log_probs=None,
        finish_reason=record.get("finish_reason", "stop"),
        weight_version=0,
        reward=record.get("reward"),
        kind=kind,
    )


def pick(samples: Sequence[Sample], step: int, count: int, seed: int) -> list[Sample]:
    """`count` of them for a step: each epoch in an order of its own, by the step's number alone."""

    def places() -> Iterable[int]:
        for i in range(step * count, (step + 1) * count):
            epoch, place = divmod(i, len(samples))
            if epoch not in orders:
                orders[epoch] = list(range(len(samples)))
                random.Random(f"{seed}/{epoch}").shuffle(orders[epoch])
            yield orders[epoch][place]

    orders: dict[int, list[int]] = {}
    return [samples[i] for i in places()]
