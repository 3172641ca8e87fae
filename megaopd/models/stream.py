"""The weights of a sharded model as Hugging Face tensors, one at a time.

`WeightStream` is the one generator of (Hugging Face name, full tensor) that feeds every sink:
export, the embedded rollout engine, and rollout servers. A weight with a LoRA adapter comes merged,
made when its turn comes: the live weights stay as they are.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megaopd.models.arch import Architecture
from megaopd.models.fp8 import plain
from megaopd.models.lora import merged
from megaopd.models.names import Entry, Replicated, Rule, Split, entries
from megaopd.parallel import Grid


class WeightStream:
    """Iterates over (Hugging Face name, full tensor) of a sharded model, in a fixed order.

    A collective: every rank iterates it. Two forms:

    - every rank gets every tensor: each shard is all-gathered over its tensor group and the full
      tensor broadcast over its pipeline group. Memory: one full tensor on every rank.
    - `only_rank_0`: rank 0 gets every tensor and the others nothing. The shards of a stage are
      gathered on its first tensor rank, which sends them on as they are to rank 0, where they
      become full tensors. Memory: the shards of one parameter and the tensors made of them on
      rank 0, the shards of one parameter on the first tensor rank of each stage, nothing
      elsewhere. Data-parallel replicas have no part in it.

    Args:
        model: this rank's stage, or the list of its chunks.
        only_rank_0: the second form.
        dtype: what rank 0 is to get, so that no more than that is sent (second form only); None:
            the parameters' own.
    """

    def __init__(
        self,
        model: Any,
        arch: Architecture,
        grid: Grid,
        *,
        only_rank_0: bool = False,
        dtype: Any = None,
    ) -> None:
        import torch.distributed as dist

        self.arch, self.grid, self.only_rank_0, self.dtype = arch, grid, only_rank_0, dtype
        assert dtype is None or only_rank_0
        chunks = model if isinstance(model, list) else [model]
        self.own = [entry for chunk in chunks for entry in entries(chunk, arch)]
        stage = [
            Described(
                tuple(e.hf_names),
                tuple(tuple(t.shape) for t in self._full(e)),
                tuple(e.parameter.shape),
                self.dtype or e.parameter.dtype,
                _portable(e.rule),
            )
            for e in self.own
        ]
        stages: list[Any] = [None] * grid.pp_size
        if grid.pp_size > 1:
            dist.all_gather_object(stages, stage, group=grid.groups.pp)
        else:
            stages = [stage]
        self.stages: list[list[Described]] = stages
        self.count = sum(len(entry.names) for stage in self.stages for entry in stage)

    def _full(self, entry: Entry) -> list[Any]:
        import torch

        meta = torch.empty(entry.parameter.shape, device="meta", dtype=entry.parameter.dtype)
        return entry.rule.merge([meta] * self.grid.tp_size, self.arch)

    def described(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(Hugging Face name, shape) of all that is to come, in order; nothing is sent for it."""
        for stage in self.stages:
            for entry in stage:
                yield from zip(entry.names, entry.shapes, strict=True)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self._to_rank_0() if self.only_rank_0 else self._to_all()

    def _to_all(self) -> Iterator[tuple[str, Any]]:
        import torch
        import torch.distributed as dist

        from megaopd import platform

        ranks = self.grid.stage_ranks
        for stage, described in enumerate(self.stages):
            for index, entry in enumerate(described):
                if stage == self.grid.pp_rank:
                    tensors = self._gather(self.own[index])
                else:
                    tensors = [
                        torch.empty(shape, dtype=entry.dtype, device=platform.device())
                        for shape in entry.shapes
                    ]
                for name, tensor in zip(entry.names, tensors, strict=True):
                    if self.grid.pp_size > 1:
                        tensor = tensor.contiguous()
                        dist.broadcast(tensor, src=ranks[stage], group=self.grid.groups.pp)
                    yield name, tensor

    def _gather(self, entry: Entry) -> list[Any]:
        import torch
        import torch.distributed as dist

        shard = values_of(entry.parameter)
        if self.grid.tp_size == 1 or isinstance(entry.rule, Replicated):
            return entry.rule.merge([shard] * self.grid.tp_size, self.arch)
        shards = [torch.empty_like(shard) for _ in range(self.grid.tp_size)]
        dist.all_gather(shards, shard.contiguous(), group=self.grid.groups.tp)
        return entry.rule.merge(shards, self.arch)

    def _to_rank_0(self) -> Iterator[tuple[str, Any]]:
        if self.grid.dp_rank or self.grid.cp_rank:
            return
        for stage, described in enumerate(self.stages):
            for index, entry in enumerate(described):
                shards = self._shards_on_rank_0(stage, index, entry)
                if shards is None:
                    continue
                tensors = entry.rule.merge(shards, self.arch)
                del shards
                for name in entry.names:
                    # Handed over, not kept: the caller alone decides how long it lives.
                    yield name, tensors.pop(0)

    def _shards_on_rank_0(self, stage: int, index: int, entry: "Described") -> list[Any] | None:
        """One parameter's shards by tensor rank, on rank 0; None on the others, which send theirs.

        They are the parameter itself where nothing had to be gathered, sent or cast.
        """
        import torch
        import torch.distributed as dist

        from megaopd import platform

        grid = self.grid
        split = grid.tp_size > 1 and not isinstance(entry.rule, Replicated)
        shards = self._gather_on_first(index, entry, split) if grid.pp_rank == stage else None
        if stage and grid.tp_rank == 0:
            ranks = grid.stage_ranks
            if grid.pp_rank == stage:
                assert shards is not None
                dist.send(shards, dst=ranks[0], group=grid.groups.pp)
            elif grid.pp_rank == 0:
                shape = (grid.tp_size if split else 1, *entry.shard)
                shards = torch.empty(shape, dtype=entry.dtype, device=platform.device())
                dist.recv(shards, src=ranks[stage], group=grid.groups.pp)
        if grid.rank:
            return None
        assert shards is not None
        return list(shards.expand(grid.tp_size, *entry.shard).unbind(0))

    def _gather_on_first(self, index: int, entry: "Described", split: bool) -> Any:
        """[TP or 1, ...] on this stage's first tensor rank, None on its others."""
        import torch
        import torch.distributed as dist

        first = self.grid.tp_rank == 0
        if not split and not first:
            return None
        own = values_of(self.own[index].parameter).to(entry.dtype).contiguous()
        if not split:
            return own[None]
        # Not dist.gather: over gloo it takes room for all shards once more.
        group = self.grid.groups.tp
        ranks = dist.get_process_group_ranks(group)
        shards = None
        if first:
            shape = (self.grid.tp_size, *entry.shard)
            shards = torch.empty(shape, dtype=own.dtype, device=own.device)
            shards[0] = own
            calls = [
                dist.P2POp(dist.irecv, shard, rank, group)
                for shard, rank in zip(shards[1:], ranks[1:], strict=True)
            ]
        else:
            calls = [dist.P2POp(dist.isend, own, ranks[0], group)]
        for call in dist.batch_isend_irecv(calls):
            call.wait()
        return shards


def values_of(parameter: Any) -> Any:
    """What others are to see of a parameter: dequantised, and with its adapter merged in."""
    return merged(parameter) if hasattr(parameter, "adapter") else plain(parameter)


@dataclass(frozen=True)
class Described:
    """What a stream says about one parameter before it sends it."""

    names: tuple[str, ...]  # of the Hugging Face tensors
    shapes: tuple[tuple[int, ...], ...]  # of them
    shard: tuple[int, ...]  # shape of one tensor rank's part
    dtype: Any
    rule: Rule


def _portable(rule: Rule) -> Rule:
    """The rule as it can be sent to another rank, where it merges and does not load."""
    return replace(rule, size=_unknown) if isinstance(rule, Split) else rule


def _unknown(arch: Architecture) -> int:
    raise AssertionError("a rule that came from another rank does not load")


def exhaust(stream: Iterable[Any]) -> None:
    """Iterate to the end: each tensor is a collective, in which no rank may be missing."""
    for _ in stream:
        pass
