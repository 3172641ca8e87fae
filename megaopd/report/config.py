"""Where the numbers of a run go."""

from dataclasses import dataclass
from typing import Literal

from megaopd.errors import UserError


@dataclass(frozen=True)
class ReportConfig:
    """metrics.jsonl in the run directory is always written; these are the rest."""

    console: bool = True  # one aligned line a step
    wandb: Literal["off", "offline", "online", "auto"] = "auto"  # auto: online if WANDB_API_KEY
    wandb_project: str = "megaopd"
    every: int = 1  # steps between console lines and wandb points; the file gets every step

    # Steps between two looks at how long each rank computes; the slowest is named. 0: never.
    rank_times_every: int = 10

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"report.every = {self.every}", expected="at least 1")
        if self.rank_times_every < 0:
            raise UserError(
                f"report.rank_times_every = {self.rank_times_every}", expected="0 or more"
            )
