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
from megaopd.models.names import entries
from megaopd.models.rules import Rule
from megaopd.parallel import Grid, as_chunks


class WeightStream:
    """Iterates over (Hugging Face name, full tensor) of a sharded model, in a fixed order.

    A collective: every rank iterates it. Two forms:

    - every rank gets every tensor: each shard is all-gathered over its tensor group, or an expert
      broadcast over its expert group, and the full tensor broadcast over its pipeline group.
      Memory: the shards of one parameter and the tensors made of them on every rank.
    - `only_rank_0`: rank 0 gets every tensor and the others nothing. The shards of a stage are
      gathered on its first rank, which sends them on as they are to rank 0, where they become full
      tensors. Memory: the shards of one parameter and the tensors made of them on rank 0, the
      shards of one parameter on the first rank of each stage, nothing elsewhere. Of the
      data-parallel replicas only one, and of those of an expert only one, has a part in it.

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

        self.arch, self.grid, self.only_rank_0, self.dtype = arch, grid, only_rank_0, dtype
        assert dtype is None or only_rank_0
        self.own = [entry for chunk in as_chunks(model) for entry in entries(chunk, arch)]
        mine = [self._describe(index) for index in range(len(self.own))]
        held = _gather_objects(mine, grid.groups.ep, grid.ep_size)
        # An expert's parameter stands for as many as there are ranks that hold different ones.
        stage = [
            replace(others[index], owner=owner)
            for index, entry in enumerate(self.own)
            for owner, others in enumerate(held if entry.expert else held[:1])
        ]
        self.stages: list[list[Described]] = _gather_objects(stage, grid.groups.pp, grid.pp_size)
        self.count = sum(len(entry.names) for stage in self.stages for entry in stage)

    def _describe(self, index: int) -> "Described":
        import torch

        entry = self.own[index]
        meta = torch.empty(entry.parameter.shape, device="meta", dtype=entry.parameter.dtype)
        parts = self.grid.tp_size if entry.rule.split else 1
        return Described(
            index,
            tuple(entry.hf_names),
            tuple(tuple(t.shape) for t in entry.rule.merge([meta] * parts)),
            parts,
            tuple(entry.parameter.shape),
            self.dtype or entry.parameter.dtype,
            entry.rule,
            entry.expert,
        )

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
            for entry in described:
                if stage == self.grid.pp_rank:
                    tensors = entry.rule.merge(self._gather(entry))
                else:
                    tensors = [
                        torch.empty(shape, dtype=entry.dtype, device=platform.device())
                        for shape in entry.shapes
                    ]
                for name in entry.names:
                    # Let go of before the next one is made.
                    tensor = tensors.pop(0)
                    if self.grid.pp_size > 1:
                        tensor = tensor.contiguous()
                        dist.broadcast(tensor, src=ranks[stage], group=self.grid.groups.pp)
                    yield name, tensor
                    del tensor

    def _gather(self, entry: "Described") -> list[Any]:
        """The shards of a parameter of this stage, on every rank of it."""
        import torch
        import torch.distributed as dist

        shard = values_of(self.own[entry.index].parameter)
        if entry.expert and self.grid.ep_size > 1:
            mine = entry.owner == self.grid.ep_rank
            shard = shard.contiguous() if mine else torch.empty_like(shard)
            group = self.grid.groups.ep
            dist.broadcast(shard, dist.get_process_group_ranks(group)[entry.owner], group=group)
        if entry.parts == 1:
            return [shard]
        shards = [torch.empty_like(shard) for _ in range(entry.parts)]
        dist.all_gather(shards, shard.contiguous(), group=self.grid.groups.tp)
        return shards

    def _to_rank_0(self) -> Iterator[tuple[str, Any]]:
        for stage, described in enumerate(self.stages):
            for entry in described:
                shards = self._shards_on_rank_0(stage, entry)
                if shards is None:
                    continue
                tensors = entry.rule.merge(shards)
                del shards
                for name in entry.names:
                    # Handed over, not kept: the caller alone decides how long it lives.
                    yield name, tensors.pop(0)

    def _shards_on_rank_0(self, stage: int, entry: "Described") -> list[Any] | None:
        """One parameter's shards, on rank 0; None on the others, which send theirs.

        They are the parameter itself where nothing had to be gathered, sent or cast.
        """
        import torch
        import torch.distributed as dist

        from megaopd import platform

        grid = self.grid
        shards = self._gather_on_first(entry) if grid.pp_rank == stage else None
        # Rank 0 and the first ranks of the other stages make up its pipeline group.
        ranks = grid.stage_ranks
        if stage and ranks[0] == 0:
            if grid.pp_rank == stage:
                assert shards is not None
                dist.send(shards, dst=0, group=grid.groups.pp)
            elif grid.pp_rank == 0:
                shape = (entry.parts, *entry.shard)
                shards = torch.empty(shape, dtype=entry.dtype, device=platform.device())
                dist.recv(shards, src=ranks[stage], group=grid.groups.pp)
        if grid.rank:
            return None
        assert shards is not None
        return list(shards.unbind(0))

    def _gather_on_first(self, entry: "Described") -> Any:
        """[parts, ...] on the first rank of this stage, None on its others."""
        import torch
        import torch.distributed as dist

        # Over the expert group of the stage's first rank, or over its tensor group.
        expert = entry.expert and self.grid.ep_size > 1
        group = self.grid.groups.ep if expert else self.grid.groups.tp
        ranks = dist.get_process_group_ranks(group)
        stage_first = self.grid.pp_rank * (self.grid.world_size // self.grid.pp_size)
        if ranks[0] != stage_first:
            return None
        first = self.grid.rank == stage_first
        holders = [ranks[entry.owner]] if expert else ranks[: entry.parts]
        own = None
        if self.grid.rank in holders:
            own = values_of(self.own[entry.index].parameter).to(entry.dtype).contiguous()
            if holders == [stage_first]:
                return own[None]
        if not first:
            # Not dist.gather: over gloo it takes room for all shards once more.
            calls = [] if own is None else [dist.P2POp(dist.isend, own, stage_first, group)]
            _wait(calls)
            return None
        like = self.own[entry.index].parameter
        shards = torch.empty((entry.parts, *entry.shard), dtype=entry.dtype, device=like.device)
        if own is not None:
            shards[0] = own
        senders = [rank for rank in holders if rank != stage_first]
        received = shards[len(holders) - len(senders) :]
        _wait(
            [
                dist.P2POp(dist.irecv, shard, rank, group)
                for shard, rank in zip(received, senders, strict=True)
            ]
        )
        return shards


def values_of(parameter: Any) -> Any:
    """What others are to see of a parameter: dequantised, and with its adapter merged in."""
    return merged(parameter) if hasattr(parameter, "adapter") else plain(parameter)


def _wait(calls: list[Any]) -> None:
    import torch.distributed as dist

    for call in dist.batch_isend_irecv(calls) if calls else ():
        call.wait()


def _gather_objects(mine: Any, group: Any, size: int) -> list[Any]:
    import torch.distributed as dist

    gathered: list[Any] = [mine] * size
    if size > 1:
        dist.all_gather_object(gathered, mine, group=group)
    return gathered


@dataclass(frozen=True)
class Described:
    """What a stream says about one parameter before it sends it."""

    index: int  # among the stage's own
    names: tuple[str, ...]  # of the Hugging Face tensors
    shapes: tuple[tuple[int, ...], ...]  # of them
    parts: int  # tensor ranks over which it is split
    shard: tuple[int, ...]  # shape of one of them
    dtype: Any
    rule: Rule
    expert: bool
    owner: int = 0  # the rank of the expert group that holds it; any, if it is not an expert's


def exhaust(stream: Iterable[Any]) -> None:
    """Iterate to the end: each tensor is a collective, in which no rank may be missing."""
    for _ in stream:
        pass
