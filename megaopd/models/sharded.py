"""Megatron checkpoint directories: written whole or not at all, checked when read, for any layout.

The tensors are megatron.core.dist_checkpointing's torch_dist format, which reshards on load. Beside
them stands manifest.json with a hash of every file. Directories of this kind are the user's own:
part of their metadata is pickled by torch, so do not load one from a stranger (Hugging Face
checkpoints are safetensors).
"""

import hashlib
import json
import os
import queue
import shutil
from pathlib import Path
from typing import Any

from megaopd import faults
from megaopd.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "megaopd-1"


def save_sharded(
    state: dict[str, Any], directory: Path, *, info: dict[str, Any], side_files: Path | None = None
) -> None:
    """Write `state` (a sharded state dict) to `directory`; a collective over the world.

    It is written under another name, hashed, fsynced and renamed: a reader finds all of it or
    nothing.

    Args:
        info: JSON-able facts for the manifest (step, layout, architecture).
        side_files: a Hugging Face directory whose config and tokenizer are copied to
        `directory`/hf.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megaopd.models.weights import copy_side_files

    tmp = directory.with_name(directory.name + ".partial")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    dist.barrier()
    _use_local_results_queue()
    dist_checkpointing.save(state, str(tmp))
    faults.point("checkpoint-write")
    if rank == 0 and side_files is not None:
        (tmp / "hf").mkdir()
        copy_side_files(side_files, tmp / "hf")
    dist.barrier()
    hashes = _hash_files(tmp)
    if rank == 0:
        manifest = {"format": FORMAT, **info, "files": hashes}
        (tmp / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _fsync_tree(tmp)
        if directory.exists():
            shutil.rmtree(directory)
        tmp.rename(directory)
        _fsync(directory.parent)
    faults.point("checkpoint-renamed")
    dist.barrier()


def _use_local_results_queue() -> None:
    """Have megatron-core hand write results over in this process.

    It would start a manager process for that, which only asynchronous saving needs: it costs
    seconds, and it lives on as an orphan where this process is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    module: Any = filesystem_async
    if module._results_queue is None:
        module._results_queue = queue.Queue()


def load_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Fill a sharded state dict of any layout from `directory`; a collective."""
    from megatron.core import dist_checkpointing

    from megaopd.models.fp8 import known_scales

    chunks = {name: part for name, part in state.items() if name.startswith("model")}
    state = {**state, **known_scales(chunks, directory)}
    loaded = dist_checkpointing.load(state, str(directory))
    assert isinstance(loaded, dict)
    return loaded


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        UserError: no directory, no manifest, or a format that this version does not read.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise UserError(
            f"no Megatron checkpoint at {directory}",
            expected=f"a directory with {MANIFEST}, as `megaopd convert` and training write it",
        )
    try:
        manifest = json.loads(path.read_text())
    except ValueError as err:
        raise UserError(f"{path} is not JSON: {err}") from err
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')}", expected=FORMAT)
    return manifest


def verify(directory: Path) -> str:
    """Why this checkpoint cannot be trusted, or "" where every file has its hash; a collective.

    The files are shared out over the ranks.
    """
    manifest = read_manifest(directory)
    wanted = manifest["files"]
    missing = [name for name in wanted if not (directory / name).is_file()]
    if missing:
        return f"{directory}: {missing[0]} is missing"
    have = _hash_files(directory)
    bad = [name for name in wanted if have.get(name) != wanted[name]]
    return f"{directory}: {bad[0]} does not have the hash of its manifest" if bad else ""


def _hash_files(directory: Path) -> dict[str, str]:
    """sha256 of every file but the manifest, by relative name, on every rank; a collective."""
    import torch.distributed as dist

    from megaopd.parallel import gather_objects

    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    mine = {}
    for path in files[dist.get_rank() :: dist.get_world_size()]:
        with path.open("rb") as file:
            name = str(path.relative_to(directory))
            mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(sorted(item for part in gather_objects(mine) for item in part.items()))


def _fsync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _fsync(path)
    _fsync(directory)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
