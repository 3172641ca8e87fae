"""The engine that a configuration names."""

from collections.abc import Sequence
from pathlib import Path

from megaopd import platform
from megaopd.models.config import ModelConfig
from megaopd.parallel import Grid
from megaopd.rollout.base import RolloutEngine
from megaopd.rollout.config import RolloutConfig, ServerConfig


def make_engine(
    rollout: RolloutConfig,
    server: ServerConfig,
    student: ModelConfig,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    run_dir: Path,
    grid: Grid,
) -> RolloutEngine:
    """Built, and without weights yet; servers are started and healthy. A collective."""
    if rollout.engine == "embedded":
        import torch

        from megaopd.rollout.hf import EmbeddedEngine

        return EmbeddedEngine(
            student.hf_dir,
            eos_ids=eos_ids,
            pad_id=pad_id,
            dtype=getattr(torch, student.dtype),
            device=platform.device(),
            batch_size=rollout.batch_size,
        )
    from megaopd.rollout.sglang import SGLangEngine

    return SGLangEngine(
        server,
        student.hf_dir,
        eos_ids=eos_ids,
        dtype=server.dtype or student.dtype,
        device="cuda" if platform.has_gpu() else "cpu",
        run_dir=run_dir,
        rank=grid.rank,
        world_size=grid.world_size,
    )
