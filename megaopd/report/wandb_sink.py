"""wandb, where it is wanted and works. Its absence or failure is said once and never ends a run."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megaopd.report.config import ReportConfig

RUN_ID_FILE = "wandb_id.txt"  # so that a resumed run goes on in the same wandb run


class Sink(Protocol):
    """Where the metrics of a step go."""

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class NullSink:
    """No wandb."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class WandbSink:
    """One wandb run; the first failure switches it off."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the metrics of a step."""
        self._guarded(lambda run: run.log(dict(values), step=step))

    def close(self) -> None:
        """Finish the wandb run."""
        self._guarded(lambda run: run.finish())

    def _guarded(self, call: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as err:  # a dashboard must not end a training run, whatever it raises
            _say(f"wandb failed and is off from here on: {err}")
            self._run = None


def wandb_sink(run_dir: Path, config: ReportConfig) -> Sink:
    """The sink that the configuration asks for; NullSink where wandb is off or does not start."""
    mode = config.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "off"
    if mode == "off":
        return NullSink()
    id_file = run_dir / RUN_ID_FILE
    try:
        import wandb

        run = wandb.init(
            project=config.wandb_project,
            name=run_dir.name,
            dir=str(run_dir),
            mode=mode,
            id=id_file.read_text().strip() if id_file.is_file() else None,
            resume="allow",
        )
        id_file.write_text(str(run.id))
    except Exception as err:  # no package, no network, no permission: the run goes on without
        _say(f"wandb is off: {err}")
        return NullSink()
    return WandbSink(run)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
