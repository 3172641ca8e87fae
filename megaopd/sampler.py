"""The student's samples, by whichever engine: weights there, requests out, whose turn it is."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megaopd.data.prompts import PromptStream
from megaopd.data.tasks import environment_task
from megaopd.data.types import Prompt, Sample
from megaopd.inputs import eos_ids, pad_id, reward_of
from megaopd.models.stream import WeightStream
from megaopd.parallel import Grid
from megaopd.rollout.agent import AgentEngine
from megaopd.rollout.base import Probe, RolloutEngine, SamplingParams
from megaopd.rollout.buffer import RolloutBuffer
from megaopd.rollout.engines import make_engine
from megaopd.schema import Config
from megaopd.trainer.offload import TurnTaking
from megaopd.trainer.remote_teacher import RemoteTeacher
from megaopd.trainer.student import Student
from megaopd.trainer.teacher import Teacher
from megaopd.trainer.teachers.base import BaseTeacher

PROBE_TOKENS = 16  # of the text that is checked after every sync


class Sampler:
    """The engine, its weights and the batches under way. Every method is a collective.

    With servers on the trainer's own GPUs (server.placement = colocated) the two take turns: a sync
    hands the memory to the servers piece by piece, and it comes back when the samples are there.

    Args:
        reward: of one sample, for dynamic sampling.
        finished: told of samples on rank 0 as they come, before their step has all of them.
        training: False where nothing is updated: there is no optimizer to put away.
    """

    def __init__(
        self,
        config: Config,
        engine: RolloutEngine,
        prompts: PromptStream,
        grid: Grid,
        student: Student,
        teacher: BaseTeacher | None,
        *,
        reward: Callable[[Sample], float | None],
        finished: Callable[[Sequence[Sample]], None] | None = None,
        training: bool,
    ) -> None:
        self.engine, self.student = engine, student
        shares = config.rollout.engine == "sglang" and config.server.placement == "colocated"
        self.turns = TurnTaking(student, teacher) if shares and training else None
        self.engine_turn = False
        self.probes = engine.shared and config.server.verify == "probe"
        rng = random.Random(config.run.seed)
        # Not the last id: where SGLang scores, it reports that one as 0.
        self.probe_ids = [rng.randrange(max(1, student.vocab - 1)) for _ in range(PROBE_TOKENS)]
        self._metrics: dict[str, float] = {}
        self.buffer = RolloutBuffer(
            engine,
            prompts,
            config.rollout,
            grid,
            run_seed=config.run.seed,
            total_steps=config.run.steps,
            reward=reward,
            finished=finished,
            top_ids=config.top_ids,
            resync=lambda: self.sync(engine.weight_version, again=True),
        )

    def sync(self, version: int, *, again: bool = False) -> None:
        """Give the engine the student's current weights; `again` if it lost those of `version`."""
        if self.engine.weight_version == version and not again and self.turns is None:
            return
        self.take_turn()
        probe = None
        if self.probes and self.turns is None:  # a probe needs the KV cache, which is away
            ids = self.probe_ids
            probe = Probe(tuple(ids), self.student.log_probs(ids))
        if self.turns is not None:
            self.turns.before_sync()
            self.engine.resume("weights")
        stream: Any = self.student.weights(only_rank_0=self.engine.shared)
        self._metrics |= self.engine.update_weights(stream, version, probe=probe)
        if self.turns is not None:
            self.turns.before_rollout()
            self.engine.resume("kv_cache")
            self.engine_turn = True

    def take_turn(self) -> None:
        """The GPUs go back to the trainer, where servers share them."""
        if self.turns is not None and self.engine_turn:
            self.engine.release()
            self.turns.before_update()
            self.engine_turn = False

    def sample(self, step: int) -> list[Sample]:
        """The samples of step number `step` (from 0), in order, the same list on every rank."""
        samples = self.buffer.sample(step)
        self.take_turn()
        self._metrics |= {**self.buffer.metrics(), **self.engine.metrics()}
        return samples

    def generate(
        self, prompts: Sequence[Prompt], key: int, per_prompt: int, params: SamplingParams
    ) -> list[Sample]:
        """`per_prompt` samples of each prompt; `key` takes the step's place in their seeds.

        The weights of the last `sync` sample them; the turn stays with the engine.
        """
        return self.buffer.generate(prompts, key, per_prompt, params)

    @property
    def cursor(self) -> dict[str, Any]:
        """Where the prompts begin that no step has trained on yet."""
        return self.buffer.cursor

    def metrics(self) -> dict[str, float]:
        """Of what happened since the last call."""
        found, self._metrics = self._metrics, {}
        return found

    def close(self) -> None:
        """Forget requests under way and stop the engine."""
        self.buffer.close()
        self.engine.close()


def make_sampler(
    config: Config,
    grid: Grid,
    tokenizer: Any,
    prompts: PromptStream,
    student: Student,
    teacher: BaseTeacher | None,
    remote: RemoteTeacher | None,
    *,
    training: bool,
) -> Sampler:
    """The engine that `config` names, with the agent loop around it, ready for its first sync."""
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
    if isinstance(teacher, Teacher) and config.rollout.teacher_mix and training:
        weights = WeightStream(teacher.chunks, teacher.arch, grid)
        inner.mix_in(config.teacher.hf_dir, weights)  # pyright: ignore[reportAttributeAccessIssue]
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
