"""The configuration of a whole run: one section per part, checked against one another.

Importable without torch, so that a bad configuration is refused before anything starts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megaopd import extend
from megaopd.checks import (
    check_mix,
    check_reference,
    check_skills,
    check_teacher_mix,
    check_term_norms,
    check_updates,
)
from megaopd.config import apply_overrides, build, read_toml
from megaopd.data.config import DataConfig, MixConfig
from megaopd.errors import UserError
from megaopd.models.config import LoraConfig, ModelConfig
from megaopd.objectives.presets import with_preset
from megaopd.objectives.remote import check_remote
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.objectives.surprises import warnings
from megaopd.objectives.validate import check_run
from megaopd.parallel import ParallelConfig
from megaopd.report.config import ReportConfig
from megaopd.rollout.config import AgentConfig, RolloutConfig, ServerConfig
from megaopd.trainer.config import (
    CheckpointConfig,
    OptimConfig,
    ReferenceConfig,
    RemoteTeacherConfig,
    RoutedTeacherConfig,
    TeacherConfig,
    TeacherParallelConfig,
    TrainerConfig,
    check_teacher_layout,
)


@dataclass(frozen=True)
class RunConfig:
    """The run itself."""

    dir: str = "runs/opd"  # everything the run leaves behind
    steps: int = 100  # optimizer steps
    seed: int = 0  # of sampling and of the RNG tracker
    # A run in which no rank moves for so long ends, and says which rank holds it up; 0: never. At
    # most 0.8 x parallel.timeout_minutes, after which a collective would end it without a name.
    stall_minutes: float = 20.0
    # Files of one's own with losses, tasks and hooks (extend.py); relative to the file that names
    # them, in an override to the working directory. They are executed.
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.stall_minutes < 0:
            raise UserError(f"run.stall_minutes = {self.stall_minutes}", expected="0 or more")
        if self.steps < 1:
            raise UserError(f"run.steps = {self.steps}", expected="at least 1")
        if not self.dir:
            raise UserError('run.dir = ""', expected="a directory")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation: greedy reward, and the objective on the student's own responses."""

    every: int = 0  # steps between evaluations; 0: only before the first and after the last step
    prompts: int = 0  # how many held-out prompts; 0 switches evaluation off
    source: str = ""  # like data.source; empty: the test split of data.source
    stop_at: float = 0.0  # end the run once greedy accuracy reaches this; 0: never
    seed: int = 0  # of the held-out prompts: they stay the same while data.seed changes
    samples: int = 1  # responses a prompt that `megaopd eval` samples; 0: greedy ones only
    pass_k: tuple[int, ...] = (1,)  # the k of its pass@k, each at most eval.samples
    control: str = ""  # like data.source: prompts of something that must not be forgotten

    def __post_init__(self) -> None:
        if self.every < 0 or self.prompts < 0:
            raise UserError(
                f"eval.every = {self.every}, eval.prompts = {self.prompts}", expected="0 or more"
            )
        bad = [k for k in self.pass_k if not 1 <= k <= max(self.samples, 1)]
        if bad or self.samples < 0:
            raise UserError(
                f"eval.pass_k = {list(self.pass_k)} with eval.samples = {self.samples}",
                expected="each k from 1 to eval.samples",
                fix=f"set eval.samples={max([*bad, 1])} or more",
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run: TOML sections of the same names."""

    run: RunConfig = field(default_factory=RunConfig)
    student: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, RoutedTeacherConfig] = field(default_factory=dict)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    remote_teacher: RemoteTeacherConfig = field(default_factory=RemoteTeacherConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    teacher_parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    data: DataConfig
    mix: MixConfig = field(default_factory=MixConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        if not self.student.path:
            raise UserError(
                "student.path is not set",
                expected="the directory of a Hugging Face or Megatron checkpoint",
            )
        self._check_teacher()
        if self.student.fp8_params:
            self._check_fp8_params()
        if self.rollout.engine == "embedded" and self.server != ServerConfig():
            raise UserError(
                "[server] is set with rollout.engine = embedded",
                expected="no servers: the embedded engine samples inside the training ranks",
                fix="set rollout.engine=sglang, or remove [server]",
            )
        if self.server.placement == "colocated" and self.rollout.staleness:
            raise UserError(
                f"server.placement = colocated with rollout.staleness = {self.rollout.staleness}",
                expected="0: on the same GPUs servers and trainer take turns",
                fix="set rollout.staleness=0, or server.placement=separate",
            )
        if self.server.placement == "colocated" and self.optim.cpu_offload:
            raise UserError(
                f"server.placement = colocated with optim.cpu_offload = {self.optim.cpu_offload}",
                expected="0: taking turns puts the whole state on the host while servers sample",
                fix="set optim.cpu_offload=0.0, or server.placement=separate",
            )
        check_reference(self)
        check_mix(self)
        check_updates(self)
        check_teacher_mix(self)
        check_term_norms(self)
        check_skills(self)
        # Every engine reports the law that it samples from; the data's answers have none.
        if self.remote_teacher.addresses:
            check_remote(self.objective, log_probs=self.on_policy, top_ids=self.top_ids)
        else:
            check_run(
                self.objective,
                log_probs=self.on_policy,
                group=self.rollout.samples_per_prompt if self.on_policy else 0,
            )
        if self.objective.loss_agg.endswith("norm") and not self.trainer.max_sequence:
            raise UserError(
                f"objective.loss_agg = {self.objective.loss_agg} without trainer.max_sequence",
                expected="a constant length to divide by",
                fix="set trainer.max_sequence",
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if self.on_policy and 0 < self.trainer.micro_batch_tokens < longest:
            raise UserError(
                f"trainer.micro_batch_tokens = {self.trainer.micro_batch_tokens} with "
                f"data.max_prompt_tokens = {self.data.max_prompt_tokens} and "
                f"rollout.max_new_tokens = {self.rollout.max_new_tokens}",
                expected=f"room for the longest sample, {longest} tokens",
                fix=f"set trainer.micro_batch_tokens={longest} or more, or lower the other two",
            )
        if self.optim.warmup_steps > self.run.steps:
            raise UserError(
                f"optim.warmup_steps = {self.optim.warmup_steps} of {self.run.steps} run.steps",
                expected="a warm-up that ends within the run",
            )

    def _check_teacher_model(self) -> None:
        """Refuse keys of the checkpoint at teacher.path where there is none to read them."""
        if self.teacher.path or not (
            self.teacher.follows or self.teachers or self.remote_teacher.addresses
        ):
            return
        keys = (field for field in fields(ModelConfig) if field.name != "path")
        for name, default in ((key.name, key.default) for key in keys):
            value = getattr(self.teacher, name)
            if value != default:
                raise UserError(
                    f"teacher.{name} = {value} without teacher.path",
                    expected="settings of the checkpoint at teacher.path; a copy of the student "
                    "has its own, each of several teachers too, and servers have theirs",
                    fix=f"set student.{name} or teachers.NAME.{name}, or remove teacher.{name}",
                )

    def _check_teacher_fp8(self) -> None:
        """FP8 that a teacher cannot have."""
        for one in (self.teacher, *self.teachers.values()):
            put_away = self.teacher.offload or self.server.placement == "colocated"
            if one.fp8_params and put_away:
                raise UserError(
                    "teacher.fp8_params = true with teacher.offload = true or server.placement = "
                    "colocated",
                    expected="parameters that can be put away: FP8 ones are not plain tensors",
                    fix="set teacher.fp8_params=false",
                )
            if one.fp8 == "delayed":
                raise UserError(
                    "teacher.fp8 = delayed",
                    expected="a recipe whose scales need no history: a teacher never trains",
                    fix="set teacher.fp8=current or blockwise",
                )
        if self.teacher.kind not in ("frozen", "live"):
            self._check_fp8_of_copy()

    def _check_fp8_of_copy(self) -> None:
        """A copy of the student has its precision, and never trains."""
        wrong = "student.fp8_params = true" if self.student.fp8_params else ""
        wrong = "student.fp8 = delayed" if self.student.fp8 == "delayed" else wrong
        if wrong:
            raise UserError(
                f"{wrong} with teacher.kind = {self.teacher.kind}",
                expected="FP8 that a copy can have: its scales need no history, its weights move",
                fix="set student.fp8=current or blockwise and student.fp8_params=false",
            )

    def _check_fp8_params(self) -> None:
        if not self.optim.distributed:
            raise UserError(
                "student.fp8_params = true with optim.distributed = false",
                expected="the distributed optimizer, which makes FP8 parameters of its copies",
                fix="set optim.distributed=true, or student.fp8_params=false",
            )
        if self.server.placement == "colocated":
            raise UserError(
                "student.fp8_params = true with server.placement = colocated",
                expected="parameters that can be put away: FP8 ones are not plain tensors",
                fix="set student.fp8_params=false, or server.placement=separate",
            )

    def _check_teacher(self) -> None:
        """One kind of teacher where the objective needs one, none where it does not."""
        if self.teacher.kind == "initial" and not self.lora.rank:
            raise UserError(
                "teacher.kind = initial without lora.rank",
                expected="adapters, under which the initial weights stay",
                fix="set lora.rank, or teacher.kind=frozen with the student's checkpoint",
            )
        self._check_teacher_model()
        self._check_teacher_fp8()
        kinds = {
            "teacher.path": self.teacher.path,
            "teacher.kind": self.teacher.kind if self.teacher.follows else "",
            "teachers": list(self.teachers),
            "remote_teacher.addresses": list(self.remote_teacher.addresses),
        }
        given = [name for name, value in kinds.items() if value]
        if len(given) > 1:
            raise UserError(
                f"{given[0]} = {kinds[given[0]]} with {given[1]}",
                expected="one teacher: beside the student, the student itself, or on servers; or "
                "several, each in [teachers.NAME]",
                fix="remove one of the two",
            )
        if self.objective.needs_teacher and not given:
            raise UserError(
                f"objective.loss = {self.objective.loss} without teacher.path",
                expected="a teacher checkpoint, or the addresses of servers that hold one",
                fix="set teacher.path or remote_teacher.addresses, or objective.loss=sft",
            )
        if not self.objective.needs_teacher and self.data.teacher_sees:
            raise UserError(
                f"data.teacher_sees = {self.data.teacher_sees} with objective.loss = "
                f"{self.objective.loss}",
                expected="a teacher that reads it",
                fix="remove data.teacher_sees, or set objective.loss=rkl",
            )
        if not self.objective.needs_teacher and given:
            raise UserError(
                f"{given[0]} = {kinds[given[0]]} with objective.loss = {self.objective.loss}",
                expected="no teacher: it would be ignored",
                fix=f"remove {given[0]}, or set objective.loss=rkl",
            )
        if self.objective.rl == "dpg" and self.teachers:
            raise UserError(
                f"objective.rl = dpg with [teachers.{next(iter(self.teachers))}]",
                expected="one teacher, the initial policy, of which the posterior is made",
                fix="set teacher.path to the student's own checkpoint",
            )
        nameless = [name for name, one in self.teachers.items() if not one.path]
        if nameless:
            raise UserError(
                f"teachers.{nameless[0]}.path is not set", expected="the teacher's checkpoint"
            )
        check_teacher_layout(self.teacher, self.teacher_parallel)

    @property
    def local_teachers(self) -> dict[str, ModelConfig]:
        """The frozen teachers of the job's own ranks, by name; a single one has none."""
        return {"": self.teacher} if self.teacher.path else dict(self.teachers)

    @property
    def ranks(self) -> int:
        """The fewest ranks that this run takes."""
        return self.student_ranks + self.teacher_parallel.ranks

    @property
    def student_ranks(self) -> int:
        """The fewest of the student, and what their number is a multiple of."""
        regrouped = self.teacher.placement == "regrouped"
        layouts = [self.parallel, *([self.teacher_parallel] if regrouped else [])]
        return math.lcm(*(layout.least_ranks for layout in layouts))

    @property
    def top_ids(self) -> int:
        """How many of the student's most probable ids a sample carries for its teacher."""
        asked = self.remote_teacher.addresses and self.objective.lists_of_student
        return self.objective.own_k if asked else 0

    @property
    def on_policy(self) -> bool:
        """Whether the student samples; otherwise it is trained on the data's answers."""
        return self.objective.on_policy and self.mix.student_share > 0

    @property
    def warnings(self) -> list[str]:
        """What this run does that is allowed and likely to surprise."""
        law = self.rollout
        return warnings(
            self.objective,
            temperature=law.temperature,
            top_p=law.top_p,
            top_k=law.top_k,
            updates=self.trainer.updates,
            mixed=self.mix.source != "" and self.mix.kind == "sft",
            answers=not self.mix.student_share,
        )


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """A Config from a TOML file (or from defaults) and `section.key=value` overrides."""
    return make_config(read_run(path) if path else {}, overrides)


def read_run(path: str | Path) -> dict[str, Any]:
    """The values of a run's TOML file."""
    return extend.placed(read_toml(path), Path(path).parent)


def make_config(values: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A Config from a TOML file's values and overrides, with the objective's preset filled in.

    A preset that is an override takes the place of the file's whole [objective].
    """
    named = apply_overrides({}, overrides).get("objective")
    if isinstance(named, dict) and "preset" in named:
        values["objective"] = {}
    values = extend.placed(apply_overrides(values, overrides), Path())
    plugins = values.get("run", {}).get("plugins", [])
    if isinstance(plugins, list):  # else the type check says so
        extend.load(plugins)
    if isinstance(values.get("objective"), dict):
        values["objective"] = with_preset(values["objective"])
    return build(Config, values)


def sampling_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a run whose model only samples: what it would train on is left out."""
    dropped = ("teacher", "teachers", "teacher_parallel", "reference", "remote_teacher", "mix")
    kept = {name: section for name, section in values.items() if name not in dropped}
    if isinstance(kept.get("rollout"), dict):
        kept["rollout"] = {k: v for k, v in kept["rollout"].items() if k != "teacher_mix"}
    return {**kept, "objective": {"loss": "none", "rl": "ppo", "advantage": "reward"}}
