"""A run's checkpoints: saved whole, the newest good one found by itself, old ones removed."""

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaopd.errors import UserError
from megaopd.models.sharded import MANIFEST, load_sharded, read_manifest, save_sharded, verify
from megaopd.parallel import Grid
from megaopd.trainer.student import Student
from megaopd.trainer.teachers.base import BaseTeacher


class Checkpoints:
    """The directory `run_dir/checkpoints`, one `step_00000010` per saved step.

    Args:
        keep: how many of the newest stay on disk.
        warn: told about checkpoints that are passed over.
    """

    def __init__(
        self, run_dir: Path, grid: Grid, *, keep: int, warn: Callable[[str], None] = print
    ) -> None:
        self.dir, self.grid, self.keep, self.warn = run_dir / "checkpoints", grid, keep, warn

    def steps(self) -> list[int]:
        """The steps that have a complete directory, oldest first."""
        found = (re.fullmatch(r"step_(\d{8})", p.name) for p in self.dir.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.dir / f"step_{step:08d}"

    def save(
        self,
        step: int,
        student: Student,
        run_state: dict[str, Any],
        hf_dir: Path,
        teacher: BaseTeacher | None = None,
    ) -> None:
        """Save the student after `step` optimizer steps with the run's own state; a collective.

        Args:
            run_state: plain numbers, strings, lists and dicts (data cursor, weight version).
            hf_dir: where config and tokenizer are copied from.
            teacher: whose state is saved too, where it follows the student.
        """
        import torch.distributed as dist

        self.dir.mkdir(parents=True, exist_ok=True)
        state = {**student.sharded_state(loading=False), "run": {"step": step, **run_state}}
        following = teacher.sharded_state() if teacher is not None else {}
        if following:
            state["teacher"] = following
        save_sharded(
            state,
            self.path(step),
            info={
                "step": step,
                "layout": self._layout(),
                "family": student.arch.family,
                "dtype": str(student.chunks[0].config.params_dtype).removeprefix("torch."),
                **_adapter_info(student),
                **({"teacher": True} if following else {}),
            },
            side_files=hf_dir,
        )
        if self.grid.rank == 0:
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
        dist.barrier()

    def latest_good(self) -> int | None:
        """The newest step whose files all have their hashes; a collective. None: start anew."""
        for step in reversed(self.steps()):
            try:
                why = verify(self.path(step))
            except UserError as err:
                why = str(err)
            if not why:
                return step
            if self.grid.rank == 0:
                self.warn(f"passing over a damaged checkpoint: {why}")
        return None

    def load(
        self, step: int, student: Student, teacher: BaseTeacher | None = None
    ) -> dict[str, Any]:
        """Put the student (and a teacher that follows it) back to `step`; the saved run state.

        Under any layout. A collective.
        """
        layout = read_manifest(self.path(step))["layout"]
        wanted = student.sharded_state(loading=True)
        if {"context": 1, "virtual": 1, **layout} != self._layout():
            # Another layout has other RNG streams; nothing in a run draws from them but dropout.
            del wanted["rng"]
        following = teacher.sharded_state() if teacher is not None else {}
        if following:
            wanted["teacher"] = following
        state = load_sharded({**wanted, "run": {}}, self.path(step))
        student.load_sharded_state(state)
        if teacher is not None and following:
            teacher.load_sharded_state(state["teacher"])
        return state["run"]

    def _layout(self) -> dict[str, int]:
        grid = self.grid
        return {
            "tensor": grid.tp_size,
            "pipeline": grid.pp_size,
            "virtual": grid.vp_size,
            "context": grid.cp_size,
            "data": grid.dp_size,
        }


def holds_teacher(directory: Path) -> bool:
    """Whether this is a checkpoint of a run whose teacher was a copy that follows the student."""
    return (directory / MANIFEST).is_file() and bool(read_manifest(directory).get("teacher"))


def load_teacher(directory: Path, teacher: BaseTeacher) -> None:
    """Put a teacher that follows the student where it was at a checkpoint; a collective."""
    saved = load_sharded({"teacher": teacher.sharded_state()}, directory)
    teacher.load_sharded_state(saved["teacher"])


def _adapter_info(student: Student) -> dict[str, Any]:
    """What a checkpoint of adapters must say: their shape, and the weights that they belong to."""
    if not student.lora.rank:
        return {}
    return {"lora": {**asdict(student.lora), "base": str(Path(student.base).resolve())}}
