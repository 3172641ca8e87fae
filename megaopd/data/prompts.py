"""Prompts from a JSONL file or a generating task, in an order that a run can take up again.

A JSONL line: {"prompt": str or chat messages, "answer": str?, "task": str?, "id": str?,
"teacher_prompt": str or chat messages?}; other keys go to Prompt.meta. `teacher_prompt` is what the
teacher reads in place of `prompt`: the question with privileged information, for instance. The
order depends on (seed, epoch) alone: not on batch size, nor on the rank.
"""

import functools
import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from megaopd.data.config import DataConfig
from megaopd.data.privileged import teacher_version
from megaopd.data.tasks import get_task
from megaopd.data.types import Prompt
from megaopd.errors import UserError

# Long prompts in a row that a generated stream may skip before something must be wrong.
MAX_SKIPPED = 1000
_FIELDS = ("prompt", "answer", "task", "id", "teacher_prompt")


class PromptStream:
    """Batches of prompts, forever; the cursor is saved with the checkpoint.

    With data.too_long = "skip", `skipped` counts the prompts left out for their length so far.
    """

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        """Reads, checks and tokenises the whole file (a generated stream: nothing yet).

        Raises:
            UserError: see `load_file` and tasks.get_task.
        """
        self.config = config
        self.skipped = 0
        self._epoch, self._index = 0, 0
        self._tokenizer = tokenizer
        self._prompts: list[Prompt] | None = None
        if config.task is None:
            path = Path(config.source)
            self._prompts, self.skipped = load_file(config, tokenizer)
            self._fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
            self.size = len(self._prompts)
        else:
            self._fingerprint = f"task:{get_task(config.task).name}/{config.split}"
            self.size = config.num_prompts  # 0: endless

    def next_batch(self, n: int) -> list[Prompt]:
        """The next n prompts; a batch runs on into the next epoch where one ends."""
        batch: list[Prompt] = []
        skipped = 0
        while len(batch) < n:
            prompt = self._take()
            if prompt is not None:
                batch.append(prompt)
                skipped = 0
                continue
            self.skipped += 1
            skipped += 1
            if skipped > MAX_SKIPPED:
                raise UserError(
                    f"{skipped} prompts in a row of {self.config.source} are longer than "
                    f"data.max_prompt_tokens = {self.config.max_prompt_tokens}",
                    fix="raise data.max_prompt_tokens",
                )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what the order depends on."""
        return {"epoch": self._epoch, "index": self._index, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved cursor.

        Raises:
            UserError: the prompts, the seed or the order are not those of the saved run.
        """
        for key, mine in self._identity().items():
            if state.get(key) != mine:
                raise UserError(
                    f"prompts of {self.config.source}: {key} {mine} differs from the saved run's",
                    expected=f"{key} {state.get(key)}",
                    fix="restore the file and the data settings, or start a new run directory",
                )
        self._epoch, self._index = int(state["epoch"]), int(state["index"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.config.seed,
            "shuffle": self.config.shuffle,
            "size": self.size,
            "fingerprint": self._fingerprint,
        }

    def _take(self) -> Prompt | None:
        """The prompt under the cursor (None: too long), which then moves on by one."""
        position = self._index
        if self.size:
            if self.config.shuffle:
                position = _permutation(self.size, self.config.seed, self._epoch)[position]
            self._index += 1
            if self._index == self.size:
                self._epoch, self._index = self._epoch + 1, 0
        else:
            self._index += 1
        if self._prompts is not None:
            return self._prompts[position]
        return generate(self.config, self._tokenizer, position)


def fixed_set(config: DataConfig, tokenizer: Any, n: int) -> list[Prompt]:
    """The first n prompts in file or generator order: the same ones at every evaluation.

    For held-out prompts of a task pass dataclasses.replace(config, split="test"). A file with fewer
    than n prompts gives all of them.
    """
    if n < 1:
        raise UserError(f"an evaluation set of {n} prompts", expected="at least 1")
    if config.task is None:
        return load_file(config, tokenizer)[0][:n]
    n = min(n, config.num_prompts) if config.num_prompts else n
    prompts: list[Prompt] = []
    for index in range(n + MAX_SKIPPED):
        prompt = generate(config, tokenizer, index)
        if prompt is not None:
            prompts.append(prompt)
        if len(prompts) == n:
            break
    return prompts


def generate(config: DataConfig, tokenizer: Any, index: int) -> Prompt | None:
    """Prompt `index` of a task: a function of (seed, index, split). None: too long, and skipped."""
    assert config.task is not None
    task = get_task(config.task)
    example = task.example(index, config.seed, config.split)
    name = f"{task.name}/{config.split}/{config.seed}/{index}"
    text = _render(example.prompt, config, tokenizer, name)
    ids = _tokenize([text], [name], tokenizer)[0]
    if len(ids) > config.max_prompt_tokens:
        if config.too_long == "skip":
            return None
        raise _too_long(config, 1, name, len(ids), len(ids))
    told, later = None, ""
    if config.teacher_sees:
        told, later = _told(example.prompt, example.answer, example.meta, config, tokenizer, name)
    return Prompt(name, ids, text, example.answer, task.name, example.meta, told, later)


def _told(
    prompt: Any, answer: str | None, meta: dict[str, Any], config: DataConfig, tok: Any, name: str
) -> tuple[tuple[int, ...] | None, str]:
    """What the teacher reads in place of the prompt: its token ids, or (None, text) where a skill
    has yet to come into it."""
    told, behind = teacher_version(prompt, answer, meta, config, name)
    text = _render(told, config, tok, name) + behind
    if config.teacher_sees == "skill":
        return None, text
    return _tokenize([text], [name], tok)[0], ""


def load_file(config: DataConfig, tokenizer: Any) -> tuple[list[Prompt], int]:
    """The prompts of a JSONL file in file order, and how many were skipped for their length.

    Raises:
        UserError: a missing or empty file; a malformed line (named as file:line); an id that occurs
            twice; prompts longer than data.max_prompt_tokens, unless data.too_long = "skip".
    """
    path = Path(config.source)
    records = _read_records(path)
    if config.num_prompts:
        records = records[: config.num_prompts]
    places = [place for place, _ in records]
    texts = [_render(record["prompt"], config, tokenizer, place) for place, record in records]
    told = _teacher_prompts(records, config, tokenizer)
    prompts = []
    for (place, record), text, ids in zip(
        records, texts, _tokenize(texts, places, tokenizer), strict=True
    ):
        meta = {k: v for k, v in record.items() if k not in _FIELDS}
        answer = record.get("answer")
        task = record.get("task") or (config.verifier if answer is not None else "")
        if task:
            _check_task(task, place)
        name = record.get("id") or place
        mine, later = told.get(place), ""
        if mine is None and config.teacher_sees:
            mine, later = _told(record["prompt"], answer, meta, config, tokenizer, place)
        prompts.append(Prompt(name, ids, text, answer, task, meta, mine, later))

    repeated = [name for name, count in Counter(p.id for p in prompts).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: id {repeated[0]!r} occurs twice", expected="ids that differ")
    return _drop_long(config, prompts, places)


def _teacher_prompts(
    records: list[tuple[str, dict[str, Any]]], config: DataConfig, tokenizer: Any
) -> dict[str, tuple[int, ...]]:
    """Token ids by file:line of the prompts that the teacher alone reads."""
    some = [(place, r["teacher_prompt"]) for place, r in records if "teacher_prompt" in r]
    texts = [_render(prompt, config, tokenizer, place) for place, prompt in some]
    places = [place for place, _ in some]
    ids = _tokenize(texts, places, tokenizer) if texts else []
    return dict(zip(places, ids, strict=True))


def _drop_long(
    config: DataConfig, prompts: list[Prompt], places: list[str]
) -> tuple[list[Prompt], int]:
    lengths = [len(prompt.token_ids) for prompt in prompts]
    long = [i for i, length in enumerate(lengths) if length > config.max_prompt_tokens]
    if long and (config.too_long == "refuse" or len(long) == len(prompts)):
        raise _too_long(config, len(long), places[long[0]], lengths[long[0]], max(lengths))
    kept = [p for p in prompts if len(p.token_ids) <= config.max_prompt_tokens]
    return kept, len(long)


def _too_long(config: DataConfig, count: int, first: str, tokens: int, most: int) -> UserError:
    return UserError(
        f"{count} prompts are too long; the first is {first} with {tokens} tokens",
        expected=f"at most data.max_prompt_tokens = {config.max_prompt_tokens}",
        fix=f'data.max_prompt_tokens={most}, or data.too_long="skip"',
    )


def _read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file:line, record) of every line that is not blank, checked."""
    if not path.is_file():
        raise UserError(f"no prompt file {path}", expected='a .jsonl file, or "task:NAME"')
    records = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as err:
        raise UserError(f"{path} is not UTF-8 text: {err}") from err
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path.name}:{number}"
            records.append((place, _parse_line(line, place)))
    if not records:
        raise UserError(
            f"{path} is empty", expected='lines like {"prompt": "...", "answer": "..."}'
        )
    return records


def _parse_line(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as err:
        raise UserError(f"{place}: not JSON: {err}") from err
    if not isinstance(record, dict) or "prompt" not in record:
        raise UserError(f"{place}: no prompt", expected='{"prompt": ..., "answer": ...}')
    for key in ("answer", "task", "id"):
        if not isinstance(record.get(key), str | None):
            raise UserError(f"{place}: {key} = {record[key]!r}", expected="a string")
    for key in ("prompt", "teacher_prompt"):
        if key in record:
            _check_prompt(record[key], key, place)
    return record


def _check_prompt(prompt: Any, key: str, place: str) -> None:
    messages_fit = isinstance(prompt, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in prompt
    )
    if not prompt or not (isinstance(prompt, str) or messages_fit):
        raise UserError(
            f"{place}: {key} = {str(prompt)[:80]!r}",
            expected='text, or a list of {"role": ..., "content": ...}',
        )


@functools.lru_cache(maxsize=2)  # this epoch and, across its end, the next
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


def _check_task(name: str, place: str) -> None:
    try:
        get_task(name)
    except UserError as err:
        raise UserError(f"{place}: {err.got}", expected=err.expected, fix=err.fix) from err


def _render(prompt: str | list[dict[str, str]], config: DataConfig, tok: Any, place: str) -> str:
    """The text of a prompt, with the chat template applied where one is asked for."""
    if config.template == "raw":
        if isinstance(prompt, list):
            raise UserError(f"{place}: chat messages", fix='data.template="chat"')
        return prompt
    if not tok.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            fix='data.template="raw", or a chat model\'s tokenizer',
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if config.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system}, *messages]
    try:
        return tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as err:  # a template raises what its author chose, e.g. on an unknown role
        raise UserError(f"{place}: the chat template refuses the messages: {err}") from err


def _tokenize(texts: list[str], places: list[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """Token ids of rendered prompts. A chat template has put its special tokens in the text."""
    try:
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    except Exception as err:  # bare Exception from the tokenizers library: a character it lacks
        if len(texts) == 1:
            raise UserError(f"{places[0]}: {texts[0][:80]!r} has no tokens: {err}") from err
        return [_tokenize([t], [p], tokenizer)[0] for t, p in zip(texts, places, strict=True)]
    for place, row in zip(places, rows, strict=True):
        if not row:
            raise UserError(f"{place}: an empty prompt", expected="at least one token")
    return [tuple(row) for row in rows]
