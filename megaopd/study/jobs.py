"""A case or another part of the study for one seed, and its figures on disk.

Figures carry a digest of all that they come from: where a case or one of its stages is set
otherwise than it was, they are old, and count as not there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopd.recipes import filled, merged, places, shared, stage_values
from megaopd.study.cases import BY_NAME, EXTRAS
from megaopd.study.stages import Stages, slug


@dataclass(frozen=True)
class Job:
    """A case, one of EXTRAS, or the stages of a seed. real_model: of question 9."""

    root: Path
    seed: int
    name: str = ""
    stages: tuple[str, ...] = ()
    real_model: Path | None = None

    def place(self) -> Stages:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        return Stages(self.root / f"seed_{self.seed}", self.seed, say=lambda text: None)

    @property
    def path(self) -> Path:
        return self.root / "figures" / f"{slug(self.name)}-{self.seed}.json"

    def store(self, figures: Any, **more: Any) -> None:
        """Write them whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"of": settings(self.name), "figures": figures, **more}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(record))
        part.replace(self.path)

    def stored(self, what: str = "figures") -> Any:
        """What `store` was given, or None where nothing is there or the settings were others."""
        if not self.path.is_file():
            return None
        record = json.loads(self.path.read_text())
        current = isinstance(record, dict) and record.get("of") == settings(self.name)
        return record.get(what) if current else None


def all_stored(root: Path, name: str, what: str = "figures") -> dict[int, Any]:
    """Of a case or one of EXTRAS, by seed."""
    ends = (p.stem.rpartition("-")[2] for p in (root / "figures").glob(f"{slug(name)}-*.json"))
    seeds = sorted(int(end) for end in ends if end.isdigit())
    found = {seed: Job(root, seed, name).stored(what) for seed in seeds}
    return {seed: one for seed, one in found.items() if one is not None}


def settings(name: str) -> str:
    """A digest of the values of a case, or of one of EXTRAS, and of all stages behind them."""
    if name in BY_NAME:
        return _digest(merged(shared("tiny"), BY_NAME[name].values))
    extra = EXTRAS[name]
    stages = {one: f"{{{one}}}" for one in extra.stages}
    shared_values = shared("tiny") if stages else {}
    return _digest({"stages": stages, "shared": shared_values, **extra.values})


def _digest(values: Mapping[str, Any]) -> str:
    behind = {name: _digest(stage_values(name)) for name in dict.fromkeys(places(values))}
    text = json.dumps(filled(values, behind), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
