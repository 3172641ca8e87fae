"""What a run minimises, as configuration."""

from dataclasses import dataclass
from typing import Literal

from megaopd.errors import UserError

DIVERGENCES = ("rkl", "fkl")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss of one optimizer step: divergence, temperature and reduction."""

    # rkl: KL(student || teacher); fkl: KL(teacher || student); sft: -log p(token) without a teacher
    loss: Literal["rkl", "fkl", "sft"] = "rkl"
    temperature: float = (
        1.0  # both models' logits are divided by it; the divergence gets its square
    )
    loss_agg: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = "token-mean"  # how token losses make one number; counted over the whole optimizer step
    chunk_size: int = 1024  # tokens whose logits exist at once

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(
                f"objective.temperature = {self.temperature}", expected="a number above 0"
            )
        if self.chunk_size < 1:
            raise UserError(f"objective.chunk_size = {self.chunk_size}", expected="at least 1")
        if self.loss == "sft" and self.temperature != 1.0:
            raise UserError(
                f"objective.temperature = {self.temperature} with loss = sft",
                expected="1.0: cross-entropy is the likelihood of the data",
                fix="set objective.temperature=1.0",
            )

    @property
    def needs_teacher(self) -> bool:
        return self.loss in DIVERGENCES
