"""Weights between Hugging Face safetensors and a sharded model, one tensor at a time.

`load_hf_weights` reads only this rank's slices. `WeightStream` (models/stream.py) is the way back.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from megaopd.errors import UserError
from megaopd.models.arch import Architecture
from megaopd.models.fp8 import remember_value
from megaopd.models.names import Entry, entries, expected_names
from megaopd.models.rules import VocabRows
from megaopd.models.stream import WeightStream as WeightStream
from megaopd.models.stream import exhaust
from megaopd.parallel import Grid, as_chunks

INDEX = "model.safetensors.index.json"
# Everything beside the weights that a Hugging Face checkpoint may hold; never code.
SIDE_FILES = ("config.json", "generation_config.json", "chat_template.jinja", "*token*", "vocab*")
SIDE_FILES += ("merges.txt",)


class HfReader:
    """Slices of the safetensors of a Hugging Face checkpoint directory, read on demand.

    Raises:
        UserError: no safetensors, an unreadable or missing shard, a tensor that is not there.
    """

    def __init__(self, hf_dir: str | Path) -> None:
        self.dir = Path(hf_dir)
        self.files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        if (self.dir / INDEX).is_file():
            shards = sorted(set(json.loads((self.dir / INDEX).read_text())["weight_map"].values()))
            paths = [self.dir / Path(shard).name for shard in shards]
        else:
            paths = sorted(self.dir.glob("*.safetensors"))
        if not paths:
            raise UserError(
                f"{self.dir} holds no *.safetensors",
                expected="weights as safetensors (pickled .bin files are not read)",
                fix="save the model with transformers' save_pretrained",
            )
        for path in paths:
            for name in self._file(path).keys():  # noqa: SIM118  (safe_open is not a dict)
                self.files[name] = path

    def _file(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as err:
                raise UserError(
                    f"cannot read {path}: {err}", expected="an intact safetensors file"
                ) from err
        return self._open[path]

    def read(self, name: str, dim: int | None, start: int, stop: int, length: int) -> Any:
        """The slice [start, stop) of tensor `name` along `dim`; the whole tensor if dim is None.

        Raises:
            UserError: the dimension does not have the length that config.json says.
        """
        tensor = self._file(self.files[name]).get_slice(name)
        if dim is None:
            return tensor[:]
        shape = tensor.get_shape()
        if len(shape) <= dim or shape[dim] != length:
            raise UserError(
                f"{self.dir}: {name} has shape {tuple(shape)}",
                expected=f"{length} in dimension {dim}, as config.json says",
                fix="check that config.json belongs to these weights",
            )
        return tensor[(slice(None),) * dim + (slice(start, stop),)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the headers alone."""
        return {
            name: tuple(self._file(path).get_slice(name).get_shape())
            for name, path in self.files.items()
        }

    def check_names(self, arch: Architecture) -> None:
        """Every expected tensor is there, and nothing else but recomputed or tied ones."""
        wanted, have = expected_names(arch), set(self.files)
        missing = sorted(wanted - have)
        extra = sorted(n for n in have - wanted if not self._harmless(n, arch))
        if missing or extra:
            raise UserError(
                f"{self.dir}: missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'} "
                f"({len(missing)} and {len(extra)} in all)",
                expected=f"{len(wanted)} tensors: a {arch.family} model of {arch.layers} layers",
                fix="check that config.json belongs to these weights",
            )

    @staticmethod
    def _harmless(name: str, arch: Architecture) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (arch.tied and name == "lm_head.weight")


def load_hf_weights(
    model: Any, hf_dir: str | Path, arch: Architecture, grid: Grid, *, progress: Any = None
) -> None:
    """Copy this rank's shard out of a Hugging Face checkpoint, one parameter at a time.

    A tied output layer on the last stage of a pipeline takes the embedding's rows.

    Args:
        model: the stage, or the list of its chunks.
        progress: called with each parameter's bytes, if given.

    Raises:
        UserError: a tensor missing, left over or of another shape, by name.
    """
    import torch

    reader = HfReader(hf_dir)
    reader.check_names(arch)
    chunks = as_chunks(model)
    todo = [entry for chunk in chunks for entry in entries(chunk, arch)]
    if arch.tied and grid.is_last_stage and not grid.is_first_stage:
        weight = chunks[-1].output_layer.weight
        rule = VocabRows(weight.shape[0], arch.vocab)
        todo.append(Entry(weight, ["model.embed_tokens.weight"], rule))
    with torch.no_grad():
        for entry in todo:
            place = (grid.tp_size, grid.tp_rank) if entry.rule.split else (1, 0)
            shard = entry.rule.load(reader.read, entry.hf_names, *place)
            if shard.shape != entry.parameter.shape:
                raise UserError(
                    f"{hf_dir}: {entry.hf_names} give a shard of shape {tuple(shard.shape)}",
                    expected=f"{tuple(entry.parameter.shape)}, as config.json says",
                )
            entry.parameter.copy_(shard)
            remember_value(entry.parameter, shard)
            if progress is not None:
                progress(shard.numel() * shard.element_size())


class HfWriter:
    """Writes a Hugging Face checkpoint directory shard by shard; it appears whole or not at all.

    Args:
        out_dir: must not exist yet (or be empty).
        side_files_from: directory whose config, tokenizer and template files are copied.
        max_shard_bytes: tensors are collected up to this size before a file is written.
    """

    def __init__(
        self, out_dir: str | Path, *, side_files_from: str | Path, max_shard_bytes: int = 4 << 30
    ) -> None:
        self.out = Path(out_dir)
        self.source = Path(side_files_from)
        self.tmp = self.out.with_name(self.out.name + ".partial")
        self.limit = max_shard_bytes
        self.pending: dict[str, Any] = {}
        self.pending_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0
        self.dtype = ""

    def __enter__(self) -> "HfWriter":
        check_new_dir(self.out)
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(parents=True)
        return self

    def add(self, name: str, tensor: Any) -> None:
        """Take one full tensor (copied to the CPU)."""
        # A copy: under one rank the stream yields views of live parameters.
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.limit:
            self._flush()
        self.pending[name] = tensor
        self.pending_bytes += size
        self.total_bytes += size
        self.dtype = str(tensor.dtype).removeprefix("torch.")

    def _flush(self) -> None:
        from safetensors.torch import save_file

        path = self.tmp / f"shard-{len(self.shards)}"
        save_file(self.pending, path, metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.tmp, ignore_errors=True)
            return
        self._flush()
        count, weight_map = len(self.shards), {}
        for i, names in enumerate(self.shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            file = "model.safetensors" if count == 1 else file
            (self.tmp / f"shard-{i}").rename(self.tmp / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.tmp / INDEX).write_text(json.dumps(index, indent=1))
        copy_side_files(self.source, self.tmp)
        self._say_dtype()
        if self.out.is_dir():
            self.out.rmdir()
        self.tmp.rename(self.out)

    def _say_dtype(self) -> None:
        """config.json names the dtype of the weights as they are."""
        path = self.tmp / "config.json"
        if path.is_file() and self.dtype:
            config = json.loads(path.read_text())
            key = "torch_dtype" if "torch_dtype" in config else "dtype"
            path.write_text(json.dumps({**config, key: self.dtype}, indent=2))


def hf_dtype(hf_dir: str | Path) -> str:
    """The dtype to hold a Hugging Face checkpoint in: bfloat16 if it is, float32 otherwise."""
    config = json.loads((Path(hf_dir) / "config.json").read_text())
    named = config.get("dtype") or config.get("torch_dtype") or "float32"
    return "bfloat16" if named == "bfloat16" else "float32"


def check_new_dir(path: Path) -> None:
    """Refuse to write into a directory that already holds something."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"{path} exists and is not empty",
            expected="a new directory",
            fix="choose another --out, or remove it first",
        )


def copy_side_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and chat template files between checkpoint directories."""
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def export_hf(
    stream: Iterable[tuple[str, Any]],
    out_dir: str | Path,
    *,
    side_files_from: str | Path,
    grid: Grid,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write the stream as a Hugging Face checkpoint from rank 0; a collective."""
    import torch.distributed as dist

    if grid.rank == 0:
        with HfWriter(
            out_dir, side_files_from=side_files_from, max_shard_bytes=max_shard_bytes
        ) as writer:
            for name, tensor in stream:
                writer.add(name, tensor)
    else:
        exhaust(stream)
    dist.barrier()
