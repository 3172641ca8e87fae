"""How the student is updated and what is saved of it."""

from dataclasses import dataclass
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from megaopd.errors import UserError
from megaopd.models.config import ModelConfig
from megaopd.parallel import ParallelConfig


@dataclass(frozen=True)
class OptimConfig:
    """Adam, its schedule and gradient clipping (megatron-core's optimizer and scheduler)."""

    lr: float = 2e-6  # peak learning rate
    min_lr: float = 0.0  # the decay ends here
    warmup_steps: int = 0  # linear from 0
    decay: Literal["constant", "linear", "cosine"] = "constant"  # after warm-up, until run.steps
    weight_decay: float = 0.0  # decoupled (AdamW)
    beta1: float = 0.9  # decay of the gradient's running mean
    beta2: float = 0.98  # decay of its running square
    eps: float = 1e-8  # added to the root of the running square
    clip_grad: float = 1.0  # global gradient norm; 0 switches clipping off
    distributed: bool = True  # optimizer state split over data-parallel ranks (ZeRO-1)
    # Share of the optimizer's state that lives on the host and is updated there; needs a GPU and
    # Transformer Engine.
    cpu_offload: float = 0.0
    # Of Adam's two moments; bfloat16 needs Transformer Engine's fused Adam.
    state_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("min_lr", "warmup_steps", "weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name} = {getattr(self, name)}", expected="0 or more")
        if not self.lr > 0:
            raise UserError(f"optim.lr = {self.lr}", expected="a number above 0")
        if self.min_lr > self.lr:
            raise UserError(
                f"optim.min_lr = {self.min_lr} above optim.lr = {self.lr}",
                expected="min_lr <= lr",
            )
        self._check_placement()

    def _check_placement(self) -> None:
        if not 0 <= self.cpu_offload <= 1:
            raise UserError(f"optim.cpu_offload = {self.cpu_offload}", expected="a share, 0 to 1")
        wanted = "cpu_offload" if self.cpu_offload else "state_dtype"
        narrow = self.state_dtype != "float32"
        if (self.cpu_offload or narrow) and not self.distributed:
            raise UserError(
                f"optim.{wanted} = {getattr(self, wanted)} with optim.distributed = false",
                expected="megatron-core offers it in its distributed optimizer only",
                fix="set optim.distributed=true",
            )
        if self.cpu_offload and narrow:
            raise UserError(
                f"optim.cpu_offload = {self.cpu_offload} with optim.state_dtype = bfloat16",
                expected="one of the two: the host's Adam keeps its moments in float32",
                fix="set optim.state_dtype=float32, or optim.cpu_offload=0.0",
            )


@dataclass(frozen=True)
class TrainerConfig:
    """The batch of one step: how it is cut, and how many optimizer steps it makes."""

    micro_batch_size: int = 1  # sequences of one forward pass on one data-parallel rank
    # Pack samples of any length into rows of that many tokens, one row a forward pass; 0: pad each
    # to the longest of the step.
    micro_batch_tokens: int = 0
    max_sequence: int = 0  # longest prompt + response; 0: no limit
    # A step's samples in so many parts of whole prompts, with an optimizer step for each.
    mini_batches: int = 1
    epochs: int = 1  # passes over these parts
    # In every n-th step the gradient norm of each term of the objective alone; 0: never.
    term_norms_every: int = 0

    def __post_init__(self) -> None:
        for name in ("mini_batches", "epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name} = {getattr(self, name)}", expected="at least 1")
        if self.term_norms_every < 0:
            raise UserError(
                f"trainer.term_norms_every = {self.term_norms_every}", expected="0 or more"
            )
        if self.micro_batch_size < 1:
            raise UserError(
                f"trainer.micro_batch_size = {self.micro_batch_size}", expected="at least 1"
            )
        if self.micro_batch_tokens < 0:
            raise UserError(
                f"trainer.micro_batch_tokens = {self.micro_batch_tokens}", expected="0 or more"
            )
        if self.micro_batch_tokens and self.micro_batch_size > 1:
            raise UserError(
                f"trainer.micro_batch_tokens = {self.micro_batch_tokens} with "
                f"trainer.micro_batch_size = {self.micro_batch_size}",
                expected="one of them: a packed row holds as many samples as it has room for",
                fix="leave trainer.micro_batch_size at 1",
            )

    @property
    def updates(self) -> int:
        """Optimizer steps for the samples of one step."""
        return self.mini_batches * self.epochs

    def longest(self, positions: int) -> int:
        """Tokens that a sample of a model with that many positions may have."""
        limits = (positions, self.max_sequence, self.micro_batch_tokens)
        return min(limit for limit in limits if limit)


@dataclass(frozen=True)
class CheckpointConfig:
    """Where a run can be taken up again."""

    every: int = 0  # steps between checkpoints; 0: only at the end
    keep: int = 2  # the newest ones that stay on disk
    resume: bool = True  # go on from the last good checkpoint of the run directory

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise UserError(
                f"checkpoint.every = {self.every}, checkpoint.keep = {self.keep}",
                expected="every >= 0 and keep >= 1",
            )


@dataclass(frozen=True)
class RemoteTeacherConfig:
    """A teacher on SGLang servers that run already, in place of one beside the student.

    What it is asked for follows from the objective (objectives/remote.py): log-probs of the sampled
    tokens, and those of lists of objective.k tokens where the loss is on a list.
    """

    addresses: tuple[str, ...] = ()  # URLs, all of the same model; empty: no such teacher
    api_key_env: str = ""  # environment variable that holds the servers' key; empty: none
    vocab_size: int = 0  # ids of the teacher's model; 0: ask the server
    batch_tokens: int = 16384  # tokens of the sequences that are sent in one call
    calls: int = 4  # calls under way on one server, for each data-parallel rank
    timeout_s: float = 600.0  # of one call; then it is aborted and sent again
    retries: int = 8  # of one sequence, with pauses of 90 s in all, before the run fails
    max_union: int = 4096  # ids of one request about the student's top-k
    max_entries: int = 2_000_000  # log-probs that one sample's student top-k may cost

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "calls", "max_union", "max_entries"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"remote_teacher.{name} = {getattr(self, name)}", expected="at least 1"
                )
        for name in ("vocab_size", "retries"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"remote_teacher.{name} = {getattr(self, name)}", expected="0 or more"
                )
        if not self.timeout_s > 0:
            raise UserError(f"remote_teacher.timeout_s = {self.timeout_s}", expected="above 0")
        for address in self.addresses:
            parts = urlsplit(address)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UserError(
                    f"remote_teacher.addresses holds {address!r}",
                    expected="URLs such as http://host:30000",
                )


@dataclass(frozen=True)
class ReferenceConfig(ModelConfig):
    """A third, frozen model beside student and teacher: the base of a geometric or linear target
    (G-OPD's model before its reinforcement learning), on the student's ranks."""

    offload: bool = False  # its weights are on the host between its turns


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """The teacher's checkpoint, or how it follows the student; where it runs."""

    # frozen: the checkpoint at `path`. The others are the student itself and have no path: live,
    # its current weights; initial, those under its LoRA adapters; ema, periodic and
    # previous_epoch, a copy that follows it.
    kind: Literal["frozen", "live", "initial", "ema", "periodic", "previous_epoch"] = "frozen"
    ema_decay: float = 0.999  # theta_T <- decay theta_T + (1 - decay) theta after every step
    sync_every: int = 100  # optimizer steps between two copies of kind "periodic"
    # same: the student's ranks and layout. regrouped: its ranks, laid out by [teacher_parallel].
    # separate: the job's last teacher_parallel.ranks ranks, laid out by [teacher_parallel].
    placement: Literal["same", "regrouped", "separate"] = "same"
    window: int = 2  # separate: micro-batches that it may be ahead of each rank of the student
    offload: bool = False  # its weights are on the host between its turns

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"teacher.ema_decay = {self.ema_decay}", expected="0 <= decay < 1")
        for name in ("sync_every", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"teacher.{name} = {getattr(self, name)}", expected="at least 1")
        if self.follows and self.path:
            raise UserError(
                f"teacher.path = {self.path} with teacher.kind = {self.kind}",
                expected="no path: the student is its own teacher",
                fix="remove teacher.path, or set teacher.kind=frozen",
            )
        if self.follows and self.placement != "same":
            raise UserError(
                f"teacher.placement = {self.placement} with teacher.kind = {self.kind}",
                expected="same: a copy of the student lies where the student does",
                fix="set teacher.placement=same",
            )
        if self.kind in ("live", "initial") and self.offload:
            raise UserError(
                f"teacher.offload = true with teacher.kind = {self.kind}",
                expected="false: there is no copy to put away",
            )

    @property
    def follows(self) -> bool:
        """Whether the student is its own teacher."""
        return self.kind != "frozen"


@dataclass(frozen=True)
class RoutedTeacherConfig(ModelConfig):
    """One of several teachers, and the prompts that it scores."""

    # "task=NAME", or "KEY=VALUE" of the prompt's metadata; empty: every prompt that is left.
    routes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TeacherParallelConfig(ParallelConfig):
    """The layout of a teacher that is not laid out as the student is."""

    section: ClassVar[str] = "teacher_parallel"  # for messages

    ranks: int = 0  # how many of the job's last ranks are the teacher's (placement = separate)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks < 0 or self.ranks % self.least_ranks:
            raise UserError(
                f"teacher_parallel.ranks = {self.ranks}",
                expected=f"a multiple of {self.least_ranks}, by its tensor, pipeline and expert",
            )
        if self.context > 1 or self.virtual > 1:
            raise UserError(
                f"teacher_parallel.context = {self.context}, virtual = {self.virtual}",
                expected="1: a layout of the teacher's own splits tensors, stages and samples",
                fix="split more over tensor or pipeline",
            )


def check_teacher_layout(teacher: TeacherConfig, layout: TeacherParallelConfig) -> None:
    """Refuse a [teacher_parallel] that nothing reads, and one that is missing."""
    if teacher.placement == "same" and layout != TeacherParallelConfig():
        raise UserError(
            "[teacher_parallel] is set with teacher.placement = same",
            expected="the layout of [parallel] for both models",
            fix="set teacher.placement=regrouped or separate, or remove [teacher_parallel]",
        )
    if (teacher.placement == "separate") != (layout.ranks > 0):
        raise UserError(
            f"teacher_parallel.ranks = {layout.ranks} with teacher.placement = {teacher.placement}",
            expected="some ranks for a separate teacher, 0 for another",
            fix="set teacher_parallel.ranks to the ranks that are the teacher's, or change "
            "teacher.placement",
        )
