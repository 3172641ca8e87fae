"""What the loop of run.py is made of: built once, checked before anything is trained."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from megaopd import config as config_io
from megaopd import faults
from megaopd.data.prompts import PromptStream
from megaopd.data.tasks import environment_task
from megaopd.data.tokenizer import check_same_tokenizer, load_tokenizer
from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError
from megaopd.inputs import check_run_dir, eos_ids, held_out, pad_id, response_text, reward_of
from megaopd.models.arch import architecture, check_layout, padded_vocab, read_hf_config
from megaopd.models.layout import check_expert_use
from megaopd.objectives.alarms import new_alarms
from megaopd.parallel import Grid, make_grid
from megaopd.report.metrics import MetricLogger, read_metrics
from megaopd.rollout.agent import AgentEngine
from megaopd.rollout.engines import make_engine
from megaopd.rollout.episode import episode_metrics
from megaopd.sampler import Sampler
from megaopd.schema import Config
from megaopd.trainer.batch import MicroBatch, make_micro_batches, plan_step, shares_of
from megaopd.trainer.checkpoint import Checkpoints
from megaopd.trainer.remote_teacher import RemoteTeacher
from megaopd.trainer.student import Student
from megaopd.trainer.teacher import Teacher

MISMATCH = ("rollout_log_prob_diff", "rollout_k3", "rollout_ess")
COLUMNS = ("reward", "grad_norm", "response_length", "tokens_per_s")
# What of the objective's metrics an evaluation reports.
EVALUATED = (
    "kl", "distill", "bucket_kl", "mass_student", "entropy", "teacher_entropy", "rollout_k3",
)  # fmt: skip


def build_parts(config: Config, *, training: bool = True) -> "Parts":
    """Read, check and build everything that a run needs; a collective.

    Args:
        training: open the run directory and resume; otherwise the student is only evaluated.

    Raises:
        UserError: any input that does not fit, before weights are loaded.
    """
    arch = architecture(read_hf_config(config.student.hf_dir), where=config.student.path)
    check_layout(arch, config.parallel, who="student")
    tokenizer = _tokenizer(config)
    teacher_arch = None
    if config.teacher.path:
        check_same_tokenizer(tokenizer, load_tokenizer(config.teacher.hf_dir))
        teacher_arch = architecture(
            read_hf_config(config.teacher.hf_dir), where=config.teacher.path
        )
        check_layout(teacher_arch, config.parallel, who="teacher")
    archs = [a for a in (arch, teacher_arch) if a is not None]
    check_expert_use(archs, config.parallel)
    prompts = PromptStream(config.data, tokenizer)
    grid = make_grid(config.parallel, seed=config.run.seed + 1234)
    vocab = min(a.vocab for a in archs)
    rows = max(padded_vocab(a.vocab, grid.tp_size, config.student.vocab_multiple) for a in archs)
    student = Student(
        config.student,
        arch,
        grid,
        config.objective,
        config.optim if training else None,
        total_steps=config.run.steps,
        vocab=vocab,
        vocab_rows=rows,
    )
    teacher = None
    if teacher_arch is not None:
        teacher = Teacher(config.teacher, teacher_arch, grid, vocab_rows=rows)
    remote = None
    if config.remote_teacher.addresses:
        remote = RemoteTeacher(config.remote_teacher, config.objective, grid)
    parts = Parts(
        config=config,
        grid=grid,
        tokenizer=tokenizer,
        eos_ids=eos_ids(config, tokenizer),
        prompts=prompts,
        student=student,
        teacher=teacher,
        remote=remote,
        sampler=_sampler(
            config, grid, tokenizer, prompts, student, teacher, remote, training=training
        ),
        training=training,
        held_out=held_out(config, tokenizer),
    )
    if training:
        parts.start()
    return parts


def _tokenizer(config: Config) -> Any:
    tokenizer = load_tokenizer(config.student.hf_dir)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {config.student.path} has no end token",
            expected="eos_token in tokenizer_config.json: responses end with it",
        )
    return tokenizer


def _sampler(
    config: Config,
    grid: Grid,
    tokenizer: Any,
    prompts: PromptStream,
    student: Student,
    teacher: Teacher | None,
    remote: RemoteTeacher | None,
    *,
    training: bool,
) -> Sampler:
    ends = eos_ids(config, tokenizer)
    inner = make_engine(
        config.rollout,
        config.server,
        config.student,
        eos_ids=ends,
        pad_id=pad_id(tokenizer),
        run_dir=Path(config.run.dir),
        grid=grid,
    )
    engine = AgentEngine(
        inner,
        tokenizer,
        config.agent,
        template=config.data.template,
        vocab=student.vocab,
        max_positions=config.trainer.longest(student.arch.max_positions),
    )
    if environment_task(config.data.task or ""):
        _ = engine.turns  # a chat template that cannot separate turns is refused now
    return Sampler(
        config,
        engine,
        prompts,
        grid,
        student,
        teacher,
        reward=lambda sample: reward_of(sample, tokenizer, ends),
        finished=remote.submit if remote is not None else None,
        training=training,
    )


@dataclass
class Parts:
    """The verbs of the loop. Every method is a collective over all ranks."""

    config: Config
    grid: Grid
    tokenizer: Any
    eos_ids: tuple[int, ...]
    prompts: PromptStream
    student: Student
    teacher: Teacher | None
    remote: RemoteTeacher | None  # on servers, in place of `teacher`
    sampler: Sampler
    held_out: list[Prompt]
    training: bool = True
    first_step: int = 0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    score_metrics: dict[str, float] = field(default_factory=dict)  # of the remote teacher
    logger: MetricLogger | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # metrics so far, of the main rank

    def start(self) -> None:
        """Open the run directory and take up an interrupted run."""
        config, directory = self.config, self.dir
        self.checkpoints = Checkpoints(directory, self.grid, keep=config.checkpoint.keep)
        check_run_dir(config, has_checkpoints=bool(self.checkpoints.steps()))
        self.grid.barrier()
        if self.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            config_io.save(config, directory / "config.toml")
        step = self.checkpoints.latest_good()
        if step is not None:
            state = self.checkpoints.load(step, self.student)
            self.prompts.load_state_dict(state["prompts"])
            self.evaluations = {int(k): v for k, v in state["evaluations"].items()}
            self.first_step = step
        if self.is_main:
            self.logger = MetricLogger(
                directory,
                config.report,
                columns=("loss", config.objective.value_name, *COLUMNS),
                total_steps=config.run.steps,
                resume_step=step,
            )
            self.history = read_metrics(directory)
            for text in config.warnings:
                self.warn("warning", text)
        self.started = time.monotonic()

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def is_main(self) -> bool:
        return self.grid.rank == 0

    def warn(self, kind: str, text: str, **values: Any) -> None:
        """Say it on the main rank's console, and keep it among the events."""
        if self.logger is not None:
            print(f"megaopd: {kind}: {text}", file=sys.stderr, flush=True)
            self.logger.log_event(kind, {"text": text, **values})

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of this block to the step's `time/what`."""
        begun = time.perf_counter()
        yield
        key = f"time/{what}"
        self.times[key] = self.times.get(key, 0.0) + time.perf_counter() - begun

    def sync_weights(self, version: int) -> None:
        """Give the engine the student's current weights."""
        with self.timed("sync"):
            self.sampler.sync(version)

    def sample(self, step: int) -> list[Sample]:
        """The student's responses of this step, in order, the same list on every rank."""
        faults.point("rollout")
        with self.timed("rollout"):
            return self.sampler.sample(step)

    def verify(self, samples: Sequence[Sample]) -> list[Sample]:
        """Rewards from each prompt's own task; samples of prompts without one keep None."""
        with self.timed("verify"):
            return [replace(s, reward=reward_of(s, self.tokenizer, self.eos_ids)) for s in samples]

    def text(self, sample: Sample) -> str:
        return response_text(sample, self.tokenizer, self.eos_ids)

    def examples(self) -> list[Sample]:
        """The next prompts with the data's own answers as responses (supervised fine-tuning)."""
        prompts = self.prompts.next_batch(self.config.rollout.prompts_per_step)
        return [self._example(prompt) for prompt in prompts]

    def _example(self, prompt: Prompt) -> Sample:
        if not prompt.answer:
            raise UserError(
                f"prompt {prompt.id!r} has no answer",
                expected="an answer for every prompt: objective.loss = sft trains on it",
            )
        ids = self.tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]
        if ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
        return Sample(prompt, tuple(ids), None, "stop", weight_version=0)

    def micro_batches(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        trainer, scores = self.config.trainer, None
        cut: Any = {"grid": self.grid, "micro_batch_size": trainer.micro_batch_size}
        cut["micro_batch_tokens"] = trainer.micro_batch_tokens
        if self.remote is not None:
            with self.timed("score"):
                shares = shares_of(plan_step(samples, **cut), len(samples))
                scores = self.remote.score(samples, shares)
            self.score_metrics = scores.metrics
        return make_micro_batches(
            samples,
            **cut,
            pad_id=pad_id(self.tokenizer),
            loss_agg=self.config.objective.loss_agg,
            max_sequence=trainer.max_sequence,
            remote=scores,
        )

    def update(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Score with the teacher and take one optimizer step."""
        micro_batches = self.micro_batches(samples)
        with self.timed("update"):
            return self.student.update(micro_batches, self.teacher)

    def log(self, step: int, metrics: dict[str, float], samples: Sequence[Sample]) -> None:
        """One line of metrics.jsonl, the console and wandb."""
        lengths = [len(s.response_ids) for s in samples]
        rewards = [s.reward for s in samples if s.reward is not None]
        spent = sum(self.times.values())
        extra = {"response_length": sum(lengths) / len(lengths)}
        extra["truncated"] = sum(s.finish_reason == "length" for s in samples) / len(samples)
        if rewards:
            extra["reward"] = sum(rewards) / len(rewards)
        if not self.config.rollout.whole_law:
            # Engine and trainer speak of different laws then; their difference is no mismatch.
            metrics = {k: v for k, v in metrics.items() if k not in MISMATCH}
        extra |= {**episode_metrics(samples), **self.score_metrics}
        extra["tokens_per_s"] = sum(lengths) / max(spent, 1e-9)
        if self.logger is not None:
            self.logger.log_metrics(
                step, {**metrics, **extra, **self.sampler.metrics(), **self.times}
            )
            self.history.append(metrics)
            for text in new_alarms(self.history).values():
                self.warn("alarm", text, step=step)
        self.times = {}

    def evaluate_at(self, step: int) -> None:
        """Evaluate if this step is due and was not evaluated before a restart."""
        every, steps = self.config.eval.every, self.config.run.steps
        due = step in (0, steps) or (every and step % every == 0)
        if not self.held_out or not due or step in self.evaluations:
            return
        self.evaluations[step] = self.evaluate(step)
        if self.logger is not None:
            self.logger.log_event("eval", {"step": step, **self.evaluations[step]})
        self.times = {}

    @property
    def done(self) -> bool:
        """Whether an evaluation has reached eval.stop_at."""
        goal = self.config.eval.stop_at
        reached = (e.get("accuracy", 0.0) >= goal for at, e in self.evaluations.items() if at)
        return goal > 0 and any(reached)

    def evaluate(self, step: int) -> dict[str, float]:
        """Greedy reward on the held-out prompts; the objective on sampled responses to them."""
        self.sync_weights(version=step)
        params = self.sampler.buffer.params
        greedy = self.verify(self.sampler.generate(self.held_out, -1, 1, params.greedy()))
        rewards = [s.reward for s in greedy if s.reward is not None]
        result = {"accuracy": sum(rewards) / len(rewards)} if rewards else {}
        if self.teacher is not None or self.remote is not None:
            sampled = self.sampler.generate(self.held_out, -2, 1, params)
            self.sampler.take_turn()
            scored = self.student.score(self.micro_batches(sampled), self.teacher)
            result |= {name: scored[name] for name in EVALUATED if name in scored}
        self.sampler.take_turn()
        self._save_samples(greedy)
        return result

    def _save_samples(self, samples: Sequence[Sample], count: int = 20) -> None:
        if not self.is_main or not self.training:
            return
        rows = [
            {
                "prompt": s.prompt.text,
                "response": self.text(s),
                "expected": s.prompt.answer,
                "reward": s.reward,
            }
            for s in samples[:count]
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.dir / "samples.jsonl").write_text(lines)

    def checkpoint(self, step: int) -> None:
        """Save if this step is due; the last one always is."""
        every = self.config.checkpoint.every
        last = step == self.config.run.steps or self.done
        if not last and not (every and step % every == 0):
            return
        run_state = {
            "prompts": self.sampler.cursor,
            "evaluations": {str(k): v for k, v in self.evaluations.items()},
        }
        self.checkpoints.save(step, self.student, run_state, self.config.student.hf_dir)

    def finish(self) -> dict[str, Any]:
        """Write summary.json from what was measured."""
        seconds = time.monotonic() - self.started
        summary: dict[str, Any] = {"steps": self.checkpoints.steps()[-1], "seconds": seconds}
        if self.evaluations:
            first, last = min(self.evaluations), max(self.evaluations)
            for name in self.evaluations[last]:
                summary[f"{name}_before"] = self.evaluations[first].get(name)
                summary[f"{name}_after"] = self.evaluations[last][name]
        if self.is_main:
            (self.dir / "summary.json").write_text(json.dumps(summary, indent=1))
        return summary

    def __enter__(self) -> "Parts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.sampler.close()
        if self.remote is not None:
            self.remote.close()
        if self.logger is not None:
            self.logger.close()
