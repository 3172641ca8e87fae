"""Runs that build on each other, in one process, each of them once.

A stage's folder is named by a hash of all that it is made from, so that methods that share a
student or a teacher share its folder, and a study that is started again goes on where it was.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaopd.config import apply_overrides
from megaopd.parallel import leave_distributed
from megaopd.recipes import filled, places, stage_values
from megaopd.schema import Config, make_config, sampling_values


def slug(name: str) -> str:
    """The name of a case as one of files and folders."""
    return "".join(c if c.isalnum() else "_" for c in name)


@dataclass
class Stages:
    """Makes stages under a folder. Single-rank: of models that fit on one.

    say: is told what is made.
    overrides: of every stage that trains or samples, e.g. to make them short.
    """

    root: Path
    seed: int
    say: Callable[[str], None] = print
    made: dict[str, str] = field(default_factory=dict)  # stage -> what it made
    overrides: Sequence[str] = ()

    def make(self, name: str) -> str:
        """The path of what stage `name` makes: a checkpoint, or a file of responses."""
        if name not in self.made:
            values = stage_values(name)
            kind = values.pop("stage")
            if kind["kind"] != "init":
                values = apply_overrides(values, self.overrides)
            self.made[name] = self._one(name, kind, self._filled(values))
        return self.made[name]

    def run(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Train with these values, of a method or a study, after the stages that they refer to.

        Returns:
            summary.json of the run; with "dir", its folder.
        """
        values = self._filled(values)
        folder = self._folder(name, values)
        self._train(name, values, folder)
        return {**json.loads((folder / "summary.json").read_text()), "dir": str(folder)}

    def config(self, values: Mapping[str, Any]) -> Config:
        """The Config of such values, whose run.dir is given, after their stages."""
        values = self._filled(values)
        return make_config(self._placed(values, Path(values["run"]["dir"])))

    def _filled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return filled(values, {name: self.make(name) for name in dict.fromkeys(places(values))})

    def _one(self, name: str, kind: dict[str, Any], values: dict[str, Any]) -> str:
        folder = self._folder(name, {**values, "stage": kind})
        if kind["kind"] == "init":
            if not folder.exists():
                from megaopd.quickstart import make_checkpoint

                folder.parent.mkdir(parents=True, exist_ok=True)
                make_checkpoint(kind["shape"], folder, self.seed)
            return str(folder)
        if kind["kind"] == "sample":
            return self._sample(name, values, folder, kind["prompts"])
        self._train(name, values, folder)
        return str(max((folder / "checkpoints").glob("step_????????")))

    def _folder(self, name: str, values: Mapping[str, Any]) -> Path:
        text = json.dumps([values, self.seed], sort_keys=True)
        return self.root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def _train(self, name: str, values: Mapping[str, Any], folder: Path) -> None:
        from megaopd import run

        if (folder / "summary.json").is_file():
            self.say(f"{name}: made already")
            return
        self.say(f"{name}: {folder}")
        run.train(make_config(self._placed(values, folder)))
        leave_distributed()

    def _sample(self, name: str, values: Mapping[str, Any], folder: Path, prompts: int) -> str:
        from megaopd import run

        out, done = folder / "responses.jsonl", folder / "done"
        if not done.is_file():
            self.say(f"{name}: {out}")
            config = make_config(sampling_values(self._placed(values, folder)))
            run.sample(config, out, prompts=prompts)
            leave_distributed()
            done.touch()
        return str(out)

    def _placed(self, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """With its folder, and the seed in every draw."""
        seed = values.get("data", {}).get("seed", 0) + 1000 * self.seed
        overrides = [f"run.dir={folder}", f"run.seed={self.seed}", f"data.seed={seed}"]
        return apply_overrides(json.loads(json.dumps(values)), overrides)
