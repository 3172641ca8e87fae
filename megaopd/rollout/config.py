"""How the student samples, the servers that it samples on, and the limits of episodes."""

import ipaddress
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from megaopd.errors import UserError


@dataclass(frozen=True)
class RolloutConfig:
    """The rollout engine and the law that responses are sampled from."""

    engine: Literal["embedded", "sglang"] = "embedded"  # generate inside the ranks, or on servers
    prompts_per_step: int = 64  # prompts of one optimizer step
    samples_per_prompt: int = 1  # responses of each
    max_new_tokens: int = 1024  # a response is cut here
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # sampling is cut to the smallest set with this mass; 1 is off
    top_k: int = 0  # sampling is cut to this many tokens; 0 is off
    min_p: float = 0.0  # sampling is cut to tokens above min_p x the largest probability; 0 is off
    # Share of the teacher in the law that tokens are drawn from (MiniLLM: 0.2; embedded engine).
    teacher_mix: float = 0.0
    batch_size: int = 256  # sequences generated together on one rank (embedded engine)
    # How many optimizer steps old the weights of a sampled token may be. 0: sampling and training
    # take turns; 1: step t + 1 is sampled while step t trains; n: up to n steps are under way.
    staleness: int = 0
    # Prompts drawn a step, as a multiple of prompts_per_step. Above 1, groups of samples whose
    # rewards are all equal are left out as long as there are others (dynamic sampling).
    oversample: float = 1.0

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "samples_per_prompt", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"rollout.{name} = {getattr(self, name)}", expected="at least 1")
        if self.temperature < 0:
            raise UserError(
                f"rollout.temperature = {self.temperature}", expected="0 (greedy) or above"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"rollout.top_p = {self.top_p}", expected="in (0, 1]")
        if not 0 <= self.min_p < 1:
            raise UserError(f"rollout.min_p = {self.min_p}", expected="in [0, 1)")
        if self.top_k < 0:
            raise UserError(f"rollout.top_k = {self.top_k}", expected="0 (off) or above")
        if not 0 <= self.teacher_mix <= 0.5:
            raise UserError(
                f"rollout.teacher_mix = {self.teacher_mix}",
                expected="in [0, 0.5]: above, importance weights exceed 2, where they are cut",
            )
        if self.teacher_mix and (self.engine != "embedded" or not self.temperature):
            raise UserError(
                f"rollout.teacher_mix = {self.teacher_mix} with "
                f"rollout.engine = {self.engine}, temperature = {self.temperature}",
                expected="the embedded engine, which holds both models, and sampling: a server has "
                "one model",
                fix="set rollout.engine=embedded and rollout.temperature=1.0, or "
                "rollout.teacher_mix=0",
            )
        if self.staleness < 0:
            raise UserError(f"rollout.staleness = {self.staleness}", expected="0 or above")
        if self.oversample < 1:
            raise UserError(f"rollout.oversample = {self.oversample}", expected="1 (off) or above")
        if self.oversample > 1 and self.samples_per_prompt == 1:
            raise UserError(
                f"rollout.oversample = {self.oversample} with rollout.samples_per_prompt = 1",
                expected="groups of samples: one sample's reward cannot differ",
                fix="set rollout.samples_per_prompt=2 or more, or rollout.oversample=1",
            )
        if self.staleness and self.engine == "embedded":
            raise UserError(
                f"rollout.staleness = {self.staleness} with rollout.engine = embedded",
                expected="0: the embedded engine and the trainer take turns in one process",
                fix="set rollout.engine=sglang, or rollout.staleness=0",
            )

    @property
    def whole_law(self) -> bool:
        """Whether tokens come from the model's own law: temperature 1, nothing cut or mixed."""
        cut = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return self.temperature == 1.0 and not cut and not self.teacher_mix

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt


@dataclass(frozen=True)
class ServerConfig:
    """SGLang servers of the rollout: started and supervised here, or attached to."""

    addresses: tuple[str, ...] = ()  # URLs of servers that run already; empty: start our own
    count: int = 1  # servers to start
    tensor: int = 1  # tensor parallel size inside a server
    data: int = 1  # data parallel size inside a server
    expert: int = 1  # expert parallel size inside a server
    host: str = "127.0.0.1"  # what our servers listen on; anything but loopback needs a key
    port: int = 0  # of the first server, the next ones follow; 0: any free ones
    api_key_env: str = ""  # environment variable that holds the key; empty: none
    dtype: str = ""  # of the weights in a server; empty: the student's
    max_tokens: int = 0  # tokens in a server's KV cache; 0: SGLang's choice (CPU: 65536)
    memory_fraction: float = 0.0  # of the GPU's memory for a server; 0: SGLang's choice
    extra_args: tuple[str, ...] = ()  # appended to a server's command line
    cores: str = ""  # CPU cores for our servers, as taskset writes them ("1" or "2-3"); empty: all
    start_timeout_s: float = 900.0  # a server that is not healthy by then is an error
    request_timeout_s: float = 1800.0  # one response; then it is aborted and sent elsewhere
    health_interval_s: float = 5.0  # between two looks at every server
    health_misses: int = 3  # looks without an answer until a server counts as lost
    retries: int = 4  # of one request, with back-off, before the run fails
    restarts: int = 10  # of one server in a run, before the run fails
    concurrency: int = 256  # requests that one server runs at once; half as many more wait there
    # How weights reach a server; auto: broadcast, but tensor where servers share the trainer's GPUs
    # (a process group cannot have two ranks on one) and disk with data parallel inside a server.
    sync: Literal["auto", "tensor", "disk", "broadcast"] = "auto"
    bucket_mb: int = 512  # weights sent together (10^6 bytes)
    pause: Literal["retract", "in_place", "abort"] = "retract"  # of running requests at a sync
    verify: Literal["probe", "checksum", "off"] = "probe"  # how a sync is checked
    placement: Literal["separate", "colocated"] = "separate"  # GPUs of their own, or the trainer's

    def __post_init__(self) -> None:
        for name in ("count", "tensor", "data", "expert", "health_misses", "concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"server.{name} = {getattr(self, name)}", expected="at least 1")
        for name in ("retries", "restarts", "max_tokens", "port"):
            if getattr(self, name) < 0:
                raise UserError(f"server.{name} = {getattr(self, name)}", expected="0 or above")
        for name in ("start_timeout_s", "request_timeout_s", "health_interval_s", "bucket_mb"):
            if getattr(self, name) <= 0:
                raise UserError(f"server.{name} = {getattr(self, name)}", expected="above 0")
        for address in self.addresses:
            parts = urlsplit(address)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UserError(
                    f"server.addresses holds {address!r}", expected="URLs such as http://host:30000"
                )
        if not self.api_key_env and not self.addresses and not is_loopback(self.host):
            raise UserError(
                f"server.host = {self.host} without server.api_key_env",
                expected="loopback, or a key: whoever reaches a server can change its weights",
                fix="set server.api_key_env to the name of a variable that holds a key",
            )
        if self.placement == "colocated" and self.sync == "broadcast":
            raise UserError(
                "server.sync = broadcast with server.placement = colocated",
                expected="a way that needs no process group: it cannot have two ranks on one GPU",
                fix="set server.sync=auto",
            )
        if self.placement == "colocated" and self.addresses:
            raise UserError(
                "server.placement = colocated with server.addresses",
                expected="servers on the trainer's own GPUs, started by it",
                fix="leave server.addresses empty, or set server.placement=separate",
            )

    @property
    def under_way(self) -> int:
        """Requests sent to one server and not answered: what it runs, and what is there at once
        when one of those ends while the client's process is busy with an update."""
        return self.concurrency + self.concurrency // 2

    @property
    def method(self) -> Literal["tensor", "disk", "broadcast"]:
        """`sync` with "auto" resolved."""
        if self.sync != "auto":
            return self.sync
        if self.data > 1:
            return "disk"
        return "tensor" if self.placement == "colocated" else "broadcast"


@dataclass(frozen=True)
class AgentConfig:
    """Limits of an episode with an environment; max_new_tokens of the rollout limit each turn."""

    max_turns: int = 8  # of the student
    max_tokens: int = 0  # of an episode, prompt included; 0: the student's context
    episode_timeout_s: float = 600.0  # of rollout: the time of training in between does not count
    step_timeout_s: float = 30.0  # of one answer of the environment
    threads: int = 16  # in which environments take their steps
    reward: Literal["sum", "last"] = "sum"  # of an episode, from its turns'; clipped to [0, 1]

    def __post_init__(self) -> None:
        for name in ("max_turns", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"agent.{name} = {getattr(self, name)}", expected="at least 1")
        for name in ("episode_timeout_s", "step_timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"agent.{name} = {getattr(self, name)}", expected="above 0")
        if self.max_tokens < 0:
            raise UserError(
                f"agent.max_tokens = {self.max_tokens}", expected="0 (the context) or above"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
