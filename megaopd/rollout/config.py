"""How the student samples."""

from dataclasses import dataclass
from typing import Literal

from megaopd.errors import UserError


@dataclass(frozen=True)
class RolloutConfig:
    """The rollout engine and the law that responses are sampled from."""

    engine: Literal["embedded"] = "embedded"  # transformers' generate inside the training ranks
    prompts_per_step: int = 64  # prompts of one optimizer step
    samples_per_prompt: int = 1  # responses of each
    max_new_tokens: int = 1024  # a response is cut here
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # sampling is cut to the smallest set with this mass; 1 is off
    top_k: int = 0  # sampling is cut to this many tokens; 0 is off
    batch_size: int = 256  # sequences generated together on one rank (embedded engine)

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
        if self.top_k < 0:
            raise UserError(f"rollout.top_k = {self.top_k}", expected="0 (off) or above")

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt
