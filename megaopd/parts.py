"""What the loop of run.py is made of: its verbs. build.py puts it together."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from megaopd import config as config_io
from megaopd import extend, faults, stop, watchdog
from megaopd.data.prompts import PromptStream
from megaopd.data.skills import SkillBank
from megaopd.data.types import Prompt, Sample
from megaopd.inputs import (
    check_run_dir,
    pad_id,
    response_text,
    reward_of,
    scorable_rewards,
)
from megaopd.mixing import Mixture
from megaopd.objectives.weights import completed, weigh
from megaopd.parallel import Grid
from megaopd.report.alarms import ALARMS, Watch
from megaopd.report.metrics import MetricLogger, read_metrics
from megaopd.report.samples import save_samples
from megaopd.report.statistics import reward_columns
from megaopd.rollout.episode import episode_metrics, sample_metrics
from megaopd.sampler import Sampler
from megaopd.schema import Config
from megaopd.trainer.batch import (
    MicroBatch,
    StepCounts,
    make_micro_batches,
    mini_batches_of,
    plan_step,
    shares_of,
)
from megaopd.trainer.checkpoint import Checkpoints
from megaopd.trainer.remote_teacher import RemoteTeacher
from megaopd.trainer.student import Student
from megaopd.trainer.teachers.base import BaseTeacher
from megaopd.trainer.teachers.routed import Router, routed_micro_batches

MISMATCH = ("rollout_log_prob_diff", "rollout_k3", "rollout_ess")
COLUMNS = ("reward", "grad_norm", "response_length", "tokens_per_s")
# What of a pass's metrics an evaluation reports.
EVALUATED = (
    "kl", "distill", "log_ratio", "bucket_kl", "mass_student", "entropy", "teacher_entropy",
    "rollout_k3",
)  # fmt: skip


def means_of(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each name over records that have the same names; {} of none."""
    return {name: fmean(one[name] for one in found) for name in (found[0] if found else ())}


@dataclass
class Parts:
    """The verbs of the loop. Every method is a collective over all ranks."""

    config: Config
    grid: Grid
    tokenizer: Any
    eos_ids: tuple[int, ...]
    prompts: PromptStream
    student: Student
    teacher: BaseTeacher | None
    reference: BaseTeacher | None  # the base model of the objective's target
    router: Router | None  # which of several teachers scores a prompt
    remote: RemoteTeacher | None  # on servers, in place of `teacher`
    sampler: Sampler
    held_out: list[Prompt]
    mixture: Mixture  # what [mix] adds to a step
    training: bool = True
    first_step: int = 0
    saved_step: int = 0  # of the newest checkpoint
    stopped: bool = False  # asked to end before the last step
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    # Of the remote teacher, for each time it was asked since the last line.
    scored: list[Mapping[str, float]] = field(default_factory=list)
    logger: MetricLogger | None = None
    alarms: Watch = field(default_factory=Watch)  # of the main rank

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
            state = self.checkpoints.load(step, self.student, self.teacher)
            self.prompts.load_state_dict(state["prompts"])
            self.skills.load_state(state.get("skills", []))
            self.evaluations = {int(k): v for k, v in state["evaluations"].items()}
            self.first_step = self.saved_step = step
        if self.is_main:
            self.logger = MetricLogger(
                directory,
                config.report,
                columns=tuple(dict.fromkeys(("loss", config.objective.value_name, *COLUMNS))),
                total_steps=config.run.steps,
                resume_step=step,
            )
            for line in read_metrics(directory):
                self.alarms.see(line)
            unchecked = self.remote.unchecked if self.remote is not None else ""
            for text in filter(None, (*config.warnings, unchecked)):
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
        watchdog.enter(what)
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

    @cached_property
    def hooks(self) -> extend.Hooks:
        """What run.plugins has the loop call."""
        return extend.hooks_of(self.config.run.plugins)

    @cached_property
    def skills(self) -> SkillBank:
        """What the teacher is told of earlier successes."""
        return SkillBank(self.config.data, self.tokenizer, self.text)

    def hooked(self, point: str, samples: Sequence[Sample], step: int) -> list[Sample]:
        """The samples as the hooks of that point leave them."""
        for function in self.hooks[point]:
            samples = function(samples, step)
        return list(samples)

    def text(self, sample: Sample) -> str:
        return response_text(sample, self.tokenizer, self.eos_ids)

    def examples(self, step: int) -> list[Sample]:
        """What supervised fine-tuning trains on: [mix]'s file, or the next prompts' own answers."""
        count = self.config.rollout.prompts_per_step
        stored = self.mixture.examples(step, count)
        if stored:
            return stored
        prompts = self.prompts.next_batch(count)
        return [self.mixture.example(prompt) for prompt in prompts]

    def micro_batches(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        trainer, scores = self.config.trainer, None
        cut: Any = {"grid": self.grid, "micro_batch_size": trainer.micro_batch_size}
        cut["micro_batch_tokens"] = trainer.micro_batch_tokens
        if self.remote is not None:
            with self.timed("score"):
                shares = shares_of(plan_step(samples, **cut), len(samples))
                scores = self.remote.score(samples, shares)
            self.scored.append(scores.metrics)

        def make(part: Sequence[Sample], whole: StepCounts | None = None) -> list[MicroBatch]:
            return make_micro_batches(
                part,
                **cut,
                pad_id=pad_id(self.tokenizer),
                loss_agg=self.config.objective.loss_agg,
                max_sequence=trainer.max_sequence,
                remote=scores,
                whole=whole,
            )

        if self.router is not None:
            return routed_micro_batches(samples, self.router, make)
        return make(samples)

    def update(self, samples: Sequence[Sample], step: int = 0) -> dict[str, float]:
        """Score with the teacher and take one optimizer step, or as many as [trainer] says."""
        if self.config.on_policy:
            samples = self.mixture(samples, step)
        samples, told = weigh(samples, self.config.objective)
        samples = completed(self.hooked("weighed", samples, step))
        if self.skills.enabled:
            told["skills"] = float(len(self.skills))
        samples = self.skills.fill(samples)
        for function in self.hooks["metrics"]:
            told |= function(samples, step)
        trainer, self.scored = self.config.trainer, []
        parts = mini_batches_of(samples, trainer.mini_batches)
        made = [self.micro_batches(part) for part in parts]
        every = trainer.term_norms_every
        with self.timed("update"):
            metrics = told | self.student.updates(
                made,
                self.teacher,
                reference=self.reference,
                step=step,
                epochs=trainer.epochs,
                term_norms=every > 0 and step % every == 0,
            )
            if self.teacher is not None:
                self.teacher.after_update(epoch=self.sampler.cursor["epoch"])
                metrics |= self.teacher.metrics()  # of all ranks
            self.skills.add(samples)
            return metrics

    def log(self, step: int, metrics: dict[str, float], samples: Sequence[Sample]) -> None:
        """One line of metrics.jsonl, the console and wandb."""
        own = [s for s in samples if s.kind == "rollout"]
        samples = own or samples
        extra = sample_metrics(samples, self.eos_ids)
        if not self.config.rollout.whole_law:
            # Engine and trainer speak of different laws then; their difference is no mismatch.
            metrics = {k: v for k, v in metrics.items() if k not in MISMATCH}
        extra |= {**episode_metrics(samples), **means_of(self.scored)}
        tokens = sum(len(s.response_ids) for s in samples)
        extra["tokens_per_s"] = tokens / max(sum(self.times.values()), 1e-9)
        if self.logger is not None:
            line = {**metrics, **extra, **self.sampler.metrics(), **self.times}
            self.logger.log_metrics(step, line)
            for name, text in self.alarms.see(line).items():
                self.warn("alarm", f"{text}: {ALARMS[name].means}", step=step, name=name)
        self.times = {}

    def evaluate_at(self, step: int) -> None:
        """Evaluate if this step is due and was not evaluated before a restart."""
        every, steps = self.config.eval.every, self.config.run.steps
        due = step in (0, steps) or (every and step % every == 0)
        if not self.held_out or not due or step in self.evaluations:
            return
        watchdog.enter("evaluate")
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
        """Greedy reward on the held-out prompts; `score_samples` of sampled responses to them."""
        self.sync_weights(version=step)
        greedy = self.greedy_answers(self.held_out, -1)
        columns = reward_columns(scorable_rewards(greedy))
        result = {name: fmean(values) for name, values in columns.items()}
        if self.teacher is not None or self.remote is not None:
            sampled = self.sampler.generate(self.held_out, -2, 1, self.sampler.buffer.params.own())
            self.sampler.take_turn()
            found = self.score_samples(sampled)
            result |= found | self.pi_gap(sampled, found)
        self.sampler.take_turn()
        if self.is_main and self.training:
            save_samples(self.dir, greedy, self.text)
        return result

    def greedy_answers(self, prompts: Sequence[Prompt], key: int) -> list[Sample]:
        """One greedy response to each prompt, with its reward; `key` as Sampler.generate has it."""
        law = self.sampler.buffer.params.greedy()
        return self.verify(self.sampler.generate(prompts, key, 1, law))

    def score_samples(self, samples: Sequence[Sample]) -> dict[str, float]:
        """How far student and teacher are apart, and what the objective says of it, on these.

        With a teacher beside the student `kl` is KL(student || teacher) whatever is trained; so are
        entropies and log-ratios those of the two laws, at temperature 1. Where the objective is
        another one, that takes a second pass, and the loss's own value is `distill`.
        """
        micro_batches = self.micro_batches(self.skills.fill(samples))
        found = self.student.score(micro_batches, self.teacher, reference=self.reference)
        if self.teacher is not None and not self.student.objective.is_reverse_kl:
            if "kl" in found:  # another KL
                found["distill"] = found.pop("kl")
            plain = self.student.objective.reverse_kl
            found |= self.student.score(micro_batches, self.teacher, objective=plain)
        return {name: found[name] for name in EVALUATED if name in found}

    def pi_gap(self, samples: Sequence[Sample], found: dict[str, float]) -> dict[str, float]:
        """Mean of log q(y | x, PI) - log q(y | x) over sampled tokens: what the teacher's knowledge
        changes. {} where it sees no more than the student; found: `score_samples` of them."""
        if "log_ratio" not in found or not any(s.privileged for s in samples):
            return {}
        bare = [replace(s, prompt=replace(s.prompt, teacher_prompt_ids=None)) for s in samples]
        # Of log p - log q, where p is the same.
        return {"pi_gap": self.score_samples(bare)["log_ratio"] - found["log_ratio"]}

    def checkpoint(self, step: int) -> None:
        """Save if this step is due; the last one always is."""
        every = self.config.checkpoint.every
        last = step == self.config.run.steps or self.done
        if last or (every and step % every == 0):
            self._save(step)

    def asked_to_stop(self, step: int) -> bool:
        """Whether the run is to end now, after `step` steps; then they are saved."""
        told = self.teacher is not None and self.teacher.asked_to_stop()
        self.stopped = stop.agreed(told=told)
        if self.stopped:
            if step > self.saved_step:
                self._save(step)
            text = f"after step {step} of {self.config.run.steps}; start it again to go on"
            self.warn("stopped", text, step=step)
        return self.stopped

    def _save(self, step: int) -> None:
        watchdog.enter("checkpoint")
        run_state = {
            "prompts": self.sampler.cursor,
            "evaluations": {str(k): v for k, v in self.evaluations.items()},
            **({"skills": self.skills.state()} if self.skills.enabled else {}),
        }
        hf_dir = self.config.student.hf_dir
        self.checkpoints.save(step, self.student, run_state, hf_dir, self.teacher)
        self.saved_step = step

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
        # Else the launcher ends the other ranks, or they stop when all of the student's can.
        if self.teacher is not None and kind is None and not self.stopped:
            self.teacher.close()
        if self.logger is not None:
            self.logger.close()
