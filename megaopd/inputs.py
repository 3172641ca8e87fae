"""What a run is given, checked before anything is trained."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaopd import config as config_io
from megaopd.data.config import DataConfig
from megaopd.data.prompts import fixed_set
from megaopd.data.tasks import can_score, score
from megaopd.data.tokenizer import check_same_tokenizer, load_tokenizer
from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError
from megaopd.models.arch import Architecture, architecture, check_layout, read_hf_config
from megaopd.models.config import ModelConfig
from megaopd.models.layout import check_expert_use, check_lora_targets
from megaopd.schema import Config

# Between two starts of one run, beside whole sections.
MAY_CHANGE = (
    ("run", "steps"),
    ("run", "stall_minutes"),
    ("teacher", "placement"),
    ("teacher", "window"),
    ("teacher", "offload"),
)


def student_tokenizer(config: Config) -> Any:
    """The student's tokenizer, which every prompt and response goes through."""
    tokenizer = load_tokenizer(config.student.hf_dir)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {config.student.path} has no end token",
            expected="eos_token in tokenizer_config.json: responses end with it",
        )
    return tokenizer


def frozen_teachers(config: Config, tokenizer: Any) -> dict[str, tuple[ModelConfig, Architecture]]:
    """Every teacher with a checkpoint of its own, checked."""
    layout = config.parallel if config.teacher.placement == "same" else config.teacher_parallel
    found: dict[str, tuple[ModelConfig, Architecture]] = {}
    for name, model in config.local_teachers.items():
        check_same_tokenizer(tokenizer, load_tokenizer(model.hf_dir))
        arch = architecture(read_hf_config(model.hf_dir), where=model.path)
        check_layout(arch, layout, who=f"teacher {name}".strip())
        found[name] = model, arch
    return found


def reference_model(config: Config, tokenizer: Any) -> Architecture | None:
    """The architecture of [reference], checked; None without one."""
    if not config.reference.path:
        return None
    check_same_tokenizer(tokenizer, load_tokenizer(config.reference.hf_dir))
    arch = architecture(read_hf_config(config.reference.hf_dir), where=config.reference.path)
    check_layout(arch, config.parallel, who="reference")
    return arch


def checked_models(
    config: Config,
) -> tuple[Any, Architecture, dict[str, tuple[ModelConfig, Architecture]]]:
    """The student's tokenizer and architecture and the teachers with a checkpoint, checked."""
    arch = architecture(read_hf_config(config.student.hf_dir), where=config.student.path)
    check_layout(arch, config.parallel, who="student")
    check_lora_targets(arch, config.lora)
    tokenizer = student_tokenizer(config)
    frozen = frozen_teachers(config, tokenizer)
    taught = [a for _, a in frozen.values()]
    if config.teacher.placement == "same":
        check_expert_use([arch, *taught], config.parallel)
    else:
        check_expert_use([arch], config.parallel)
        check_expert_use(taught, config.teacher_parallel)
    return tokenizer, arch, frozen


def pad_id(tokenizer: Any) -> int:
    """The id that fills batches: masked everywhere, so the end token serves where none is set."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def eos_ids(config: Config, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's, and those of generation_config.json."""
    ids = [tokenizer.eos_token_id]
    path = config.student.hf_dir / "generation_config.json"
    if path.is_file():
        named = json.loads(path.read_text()).get("eos_token_id") or []
        ids += named if isinstance(named, list) else [named]
    return tuple(dict.fromkeys(ids))


def response_text(sample: Sample, tokenizer: Any, eos_ids: Sequence[int]) -> str:
    """The response as text, without the token that ended it."""
    ids = list(sample.response_ids)
    if ids and ids[-1] in eos_ids:
        ids.pop()
    return tokenizer.decode(ids)


def reward_of(sample: Sample, tokenizer: Any, eos_ids: Sequence[int]) -> float | None:
    """An episode's reward is its environment's; a response's is its verifier's."""
    if "turn_rewards" in sample.meta:
        return sample.reward
    return score(sample.prompt, response_text(sample, tokenizer, eos_ids))


def scorable_rewards(samples: Sequence[Sample]) -> list[float | None]:
    """Of the responses to prompts that can be scored; None where that went wrong."""
    return [sample.reward for sample in samples if can_score(sample.prompt)]


def example(prompt: Prompt, tokenizer: Any, data: DataConfig) -> Sample:
    """The data's own response to a prompt (supervised fine-tuning): see data.example."""
    worked = data.example == "solution"
    text = prompt.meta.get(data.solution_key) if worked else prompt.answer
    if not isinstance(text, str) or not text:
        lacks = data.solution_key if worked else "answer"
        raise UserError(
            f"prompt {prompt.id!r} has no {lacks!r}, and data.example = {data.example}",
            expected="a text to train on for every prompt",
            fix="set data.solution_key, or data.example=" + ("answer" if worked else "solution"),
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return Sample(prompt, tuple(ids), None, "stop", weight_version=0)


def held_out(config: Config, tokenizer: Any) -> list[Prompt]:
    """The evaluation prompts: of eval.source, or of the test split of the training task."""
    if not config.eval.prompts:
        return []
    source = config.eval.source or config.data.source
    if not (config.eval.source or source.startswith("task:")):
        raise UserError(
            f"eval.prompts = {config.eval.prompts} with the training file {source}",
            expected="held-out prompts",
            fix="set eval.source to another file, or eval.prompts=0",
        )
    return _evaluation_set(config, source, tokenizer)


def control_set(config: Config, tokenizer: Any) -> list[Prompt]:
    """Prompts of eval.control, as many as held-out ones; [] without one."""
    source = config.eval.control
    return _evaluation_set(config, source, tokenizer) if source else []


def _evaluation_set(config: Config, source: str, tokenizer: Any) -> list[Prompt]:
    """The first eval.prompts of a source; of a task, of its test split."""
    data: DataConfig = replace(config.data, source=source, seed=config.eval.seed, num_prompts=0)
    if source.startswith("task:"):
        data = replace(data, split="test")
    return fixed_set(data, tokenizer, config.eval.prompts)


def check_run_dir(config: Config, *, has_checkpoints: bool) -> None:
    """Refuse to go on with another run's checkpoints.

    What may change between two starts of one run: its length, its layout, what is saved and
    reported.
    """
    if not has_checkpoints:
        return
    directory = Path(config.run.dir)
    if not config.checkpoint.resume:
        raise UserError(
            f"{directory} holds checkpoints, and checkpoint.resume = false",
            expected="an unused run.dir for a new run",
            fix="choose another run.dir, or set checkpoint.resume=true",
        )
    before = config_io.read_toml(directory / "config.toml")
    changed = []
    for section, now in config_io.to_dict(config).items():
        if section in ("parallel", "teacher_parallel", "server", "checkpoint", "report", "eval"):
            continue
        then = before.get(section, {})
        for key in dict.fromkeys([*now, *then]):  # one of several teachers may have gone
            if (section, key) not in MAY_CHANGE and then.get(key) != now.get(key):
                changed.append(f"{section}.{key}: {then.get(key)} -> {now.get(key)}")
    if changed:
        raise UserError(
            f"{directory} holds another run's checkpoints ({'; '.join(changed[:4])})",
            expected="the configuration that the run was started with",
            fix="choose another run.dir, or undo the change",
        )
