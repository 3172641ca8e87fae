"""A Job from a run's configuration."""

from dataclasses import asdict
from typing import Any

from megaopd.config import build
from megaopd.errors import UserError
from megaopd.objectives.validate import needs
from megaopd.parallel import ParallelConfig
from megaopd.plan.job import Job, Side
from megaopd.plan.models import find_model
from megaopd.schema import Config

ITEMSIZE = {"float32": 4, "bfloat16": 2}


def job_of(config: Config, gpus: int, *, teacher_layout: str = "") -> Job:
    """The step that `config` describes on `gpus` ranks, the teacher's own among them, at its
    longest sequences.

    Args:
        teacher_layout: "tensor=8,sequence=true"; empty: [teacher_parallel] of a regrouped
            or separate teacher, else the student's.

    Raises:
        UserError: a model that is not known, a layout that does not divide.
    """
    sequence, rows = sequence_of(config)
    law = config.objective
    apart = config.teacher_parallel.ranks if config.teacher.placement == "separate" else 0
    if apart >= gpus:
        raise UserError(
            f"{gpus} GPUs, {apart} of them the teacher's own",
            expected="some for the student",
            fix="raise --gpus or lower teacher_parallel.ranks",
        )
    tempered = law.temperature != 1.0 and (law.sft_coef or law.is_sampled)
    return Job(
        student=_side(config.student, config.parallel),
        teacher=_teacher(config, teacher_layout),
        world=gpus - apart,
        samples=config.rollout.samples_per_step,
        sequence=sequence,
        rows=rows,
        micro_batch=config.trainer.micro_batch_size,
        chunk=law.chunk_size,
        distributed=config.optim.distributed,
        laws=2 if tempered else 1,
        old_log_probs=needs(law).old_log_prob_pass
        or (config.trainer.updates > 1 and needs(law).ratio),
        epochs=config.trainer.epochs,
        rollout=_rollout(config),
        rollout_batch=config.rollout.batch_size,
        placement=_placement(config, teacher_layout),
        teacher_world=apart,
        window=config.teacher.window,
        held=law.needs_sequences or config.trainer.term_norms_every > 0,
        scored_first=law.needs_sequences,
    )


def sequence_of(config: Config) -> tuple[int, int]:
    """(longest sequence, longest response)."""
    response = config.rollout.max_new_tokens
    prompt = config.data.max_prompt_tokens
    longest = prompt + response
    limit = config.trainer.max_sequence
    return (min(longest, limit) if limit else longest), response


def _side(model: Any, layout: ParallelConfig) -> Side:
    return Side(
        find_model(model.path),
        layout,
        itemsize=ITEMSIZE[model.dtype],
        recompute=model.recompute,
        vocab_multiple=model.vocab_multiple,
    )


def _teacher(config: Config, layout: str) -> Side | None:
    if not config.teacher.path:
        return None
    if layout:
        return _side(config.teacher, parse_layout(layout))
    if config.teacher.placement in ("regrouped", "separate"):
        own = asdict(config.teacher_parallel)
        del own["ranks"]
        return _side(config.teacher, ParallelConfig(**own))
    return _side(config.teacher, config.parallel)


def _placement(config: Config, layout: str) -> Any:
    placement = config.teacher.placement
    return "regrouped" if layout and placement == "same" else placement


def left_out(config: Config) -> list[str]:
    """Settings that change memory or time and that a plan does not know: it is made without."""
    teacher = config.teacher
    said = {
        f"lora.rank = {config.lora.rank}": config.lora.rank,
        f"student.fp8 = {config.student.fp8}": config.student.fp8 != "none",
        f"teacher.fp8 = {teacher.fp8}": teacher.fp8 != "none",
        f"teacher.kind = {teacher.kind}": teacher.follows,
        f"teacher.offload = {teacher.offload}": teacher.offload,
        "[teachers]": config.teachers,
        f"rollout.teacher_mix = {config.rollout.teacher_mix} (a whole teacher on every rank)": (
            config.rollout.teacher_mix
        ),
        f"trainer.mini_batches = {config.trainer.mini_batches}": config.trainer.mini_batches > 1,
        f"trainer.term_norms_every = {config.trainer.term_norms_every}": (
            config.trainer.term_norms_every
        ),
        "trainer.micro_batch_tokens": config.trainer.micro_batch_tokens,
        f"optim.cpu_offload = {config.optim.cpu_offload}": config.optim.cpu_offload,
        f"optim.state_dtype = {config.optim.state_dtype}": config.optim.state_dtype != "float32",
    }
    return [what for what, given in said.items() if given]


def _rollout(config: Config) -> Any:
    if not config.on_policy:
        return "none"
    if config.rollout.engine == "embedded":
        return "embedded"
    return config.server.placement


def parse_layout(text: str) -> ParallelConfig:
    """ "tensor=8,sequence=true" as a ParallelConfig."""
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, sep, value = part.partition("=")
        if not sep:
            raise UserError(f"layout {text!r}", expected="tensor=8,pipeline=2,sequence=true")
        on = value.strip().lower()
        values[name.strip()] = on == "true" if on in ("true", "false") else _number(on, text)
    return build(ParallelConfig, values)


def _number(value: str, text: str) -> int:
    if not value.isdigit():
        raise UserError(f"layout {text!r}", expected="integers, or true and false")
    return int(value)
