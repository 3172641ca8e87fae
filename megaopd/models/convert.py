"""Whole checkpoints between Hugging Face and Megatron, for any layout.

Each function runs on every rank of a grid (megaopd/launch.py starts the ranks); no rank holds more
than its shard and one full tensor, and rank 0 of an export one output file.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaopd import platform
from megaopd.errors import UserError
from megaopd.models.arch import architecture, read_hf_config
from megaopd.models.build import build_model
from megaopd.models.chunks import load_chunks, sharded_chunks
from megaopd.models.config import LoraConfig, ModelConfig
from megaopd.models.fp8 import remember_precise
from megaopd.models.lora import add_adapters, fold
from megaopd.models.sharded import load_sharded, read_manifest, save_sharded, verify
from megaopd.models.weights import WeightStream, check_new_dir, export_hf, load_hf_weights
from megaopd.parallel import Grid, as_chunks
from megaopd.report.progress import progress


def load_weights(
    model: Any, config: ModelConfig, arch: Any, grid: Grid, *, progress: Any = None
) -> None:
    """Fill this rank's stage, or list of chunks, from config.path of either kind; a collective."""
    if not config.is_megatron:
        load_hf_weights(model, config.path, arch, grid, progress=progress)
        return
    why = verify(Path(config.path))
    if why:
        raise UserError(why, expected="an intact checkpoint", fix="convert or train it again")
    manifest = read_manifest(Path(config.path))
    saved = manifest.get("dtype", config.dtype)
    if saved != config.dtype:
        raise UserError(
            f"{config.path} holds {saved} weights, and the model is to be {config.dtype}",
            expected="the same dtype",
            fix=f"set dtype={saved}, or convert the Hugging Face checkpoint with --dtype",
        )
    lora, chunks = dict(manifest.get("lora", {})), as_chunks(model)
    if lora:
        _load_base(model, config, lora.pop("base"), arch, grid)
        add_adapters(model, LoraConfig(**{**lora, "targets": tuple(lora["targets"])}))
    wanted = sharded_chunks(chunks)
    state = load_sharded(wanted, Path(config.path))
    load_chunks(chunks, state)
    for chunk, name in zip(chunks, wanted, strict=True):
        remember_precise(chunk, state[name])
    if lora:
        fold(model)


def _load_base(model: Any, config: ModelConfig, base: str, arch: Any, grid: Grid) -> None:
    """The weights that a checkpoint of adapters was trained on top of."""
    if not Path(base).is_dir():
        raise UserError(
            f"{config.path} holds LoRA adapters on {base}, which is not there",
            expected="the checkpoint that student.path named when they were trained",
            fix=f'put it back, or change "base" in {config.path}/manifest.json',
        )
    load_weights(model, replace(config, path=base), arch, grid)


def hf_to_megatron(config: ModelConfig, out: Path, grid: Grid) -> None:
    """Write the Hugging Face checkpoint config.path as a Megatron one.

    Raises:
        UserError: an unsupported or incomplete checkpoint, a layout that does not divide the model,
            or `out` in use; nothing is left behind.
    """
    check_new_dir(out)
    arch = architecture(read_hf_config(config.path), where=config.path)
    model = build_model(arch, config, grid).to(platform.device())
    with progress("loading (MB)", _megabytes(model), enabled=grid.rank == 0) as advance:
        load_hf_weights(model, config.path, arch, grid, progress=_in_megabytes(advance))
    info = {"step": 0, "family": arch.family, "dtype": config.dtype}
    layout = {
        "tensor": grid.tp_size,
        "pipeline": grid.pp_size,
        "expert": grid.ep_size,
        "data": grid.dp_size,
    }
    save_sharded(
        {"model": model.sharded_state_dict()},
        out,
        info={**info, "layout": layout},
        side_files=Path(config.path),
    )


def megatron_to_hf(config: ModelConfig, out: Path, grid: Grid) -> None:
    """Write the Megatron checkpoint config.path as a Hugging Face one, bit for bit."""
    check_new_dir(out)
    read_manifest(Path(config.path))
    arch = architecture(read_hf_config(config.hf_dir), where=str(config.hf_dir))
    model = build_model(arch, config, grid).to(platform.device())
    load_weights(model, config, arch, grid)
    stream = WeightStream(model, arch, grid)
    with progress("exporting tensors", stream.count, enabled=grid.rank == 0) as advance:
        export_hf(_counted(stream, advance), out, side_files_from=config.hf_dir, grid=grid)


def _counted(stream: WeightStream, advance: Callable[[int], None]) -> Iterator[tuple[str, Any]]:
    for item in stream:
        yield item
        advance(1)


def _megabytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters()) >> 20


def _in_megabytes(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Collect bytes until they make a megabyte."""
    waiting = 0

    def add(size: int) -> None:
        nonlocal waiting
        waiting += size
        advance(waiting >> 20)
        waiting %= 1 << 20

    return add
