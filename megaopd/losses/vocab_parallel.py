"""What it takes to see a vocabulary that is split over a tensor-parallel group.

Rank r of a group of R holds ids [r*Vp, (r+1)*Vp). Every collective of the losses is issued here,
and never on a tensor that autograd traces: a bare all_reduce inside autograd gives right values and
wrong gradients at R > 1. group=None, or a group of one rank, means no communication at all.

Shapes: T tokens, C rows of one chunk, Vp = V/R local ids, n packed scalars.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.errors import UserError

Group = Any  # a torch.distributed.ProcessGroup, or None where there is nothing to talk to


def group_size(group: Group) -> int:
    """Number of ranks; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """This process's rank within the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


@dataclass(frozen=True)
class Shard:
    """The ids that this rank owns: [offset, offset + width), of which the first `valid` are real.

    Padded ids are the highest ones, so they end the last shards and a slice removes them: a rank
    without padding pays nothing for it, and no -inf ever enters the arithmetic.
    """

    offset: int
    width: int
    valid: int
    group: Group

    @classmethod
    def of(cls, width: int, group: Group, vocab_size: int | None) -> "Shard":
        """This rank's shard when each rank holds `width` ids; vocab_size=None: all are real."""
        size = group_size(group)
        total = width * size
        if vocab_size is not None and not 0 < vocab_size <= total:
            raise UserError(
                f"vocab_size {vocab_size} with {size} shards of {width} ids",
                expected=f"1 <= vocab_size <= {total}",
                fix="pass the tokenizer's number of ids, or pad the output layer further",
            )
        offset = group_rank(group) * width
        real = total if vocab_size is None else vocab_size
        return cls(offset, width, min(max(real - offset, 0), width), group)

    def owned(self, ids_C: Tensor) -> tuple[Tensor, Tensor]:
        """(mask of the ids that this rank owns, their column; column 0 where it does not)."""
        local = ids_C - self.offset
        mask = (local >= 0) & (local < self.valid)
        return mask, torch.where(mask, local, 0)

    def gather_owned(self, values_CVp: Tensor, ids_C: Tensor) -> tuple[Tensor, Tensor]:
        """(mask, values[c, ids[c]] where owned and 0 elsewhere); a SUM over ranks completes it."""
        mask, column = self.owned(ids_C)
        if self.valid == 0:
            return mask, values_CVp.new_zeros(ids_C.shape)
        picked = values_CVp.gather(1, column[:, None])[:, 0]
        return mask, torch.where(mask, picked, 0.0)


def all_reduce_max_(packed_nC: Tensor, group: Group) -> Tensor:
    """In-place MAX over the group: one collective, whatever n is."""
    if group_size(group) > 1:
        dist.all_reduce(packed_nC, op=dist.ReduceOp.MAX, group=group)
    return packed_nC


def all_reduce_sum_(packed_nC: Tensor, group: Group) -> Tensor:
    """In-place SUM over the group: one collective, whatever n is."""
    if group_size(group) > 1:
        dist.all_reduce(packed_nC, op=dist.ReduceOp.SUM, group=group)
    return packed_nC


def all_gather_packed(packed_nC: Tensor, group: Group) -> Tensor:
    """[n, C] on each rank -> [R, n, C] on every rank: one collective, whatever n is."""
    size = group_size(group)
    if size == 1:
        return packed_nC[None]
    full = packed_nC.new_empty(size * packed_nC.shape[0], packed_nC.shape[1])
    dist.all_gather_into_tensor(full, packed_nC.contiguous(), group=group)
    return full.view(size, *packed_nC.shape)


def all_gather_last(local_CnK: Tensor, group: Group) -> Tensor:
    """[C, n, K] on each rank -> [C, n, R*K], rank-major, on every rank."""
    size = group_size(group)
    if size == 1:
        return local_CnK
    rows, lists, width = local_CnK.shape
    full = local_CnK.new_empty(size * rows, lists, width)
    dist.all_gather_into_tensor(full, local_CnK.contiguous(), group=group)
    return full.view(size, rows, lists, width).permute(1, 2, 0, 3).flatten(2)


def all_gather_rows(local_cH: Tensor, group: Group) -> Tensor:
    """[c, H] on each rank -> [R*c, H], rank-major, on every rank."""
    size = group_size(group)
    if size == 1:
        return local_cH
    full = local_cH.new_empty(size * local_cH.shape[0], *local_cH.shape[1:])
    dist.all_gather_into_tensor(full, local_cH.contiguous(), group=group)
    return full


def start_sum_rows(full_CH: Tensor, group: Group, *, scatter: bool) -> tuple[Any, Tensor]:
    """Begins the SUM over ranks of [C, H]; (work to wait for, where the result will be).

    scatter: only this rank's C/R rows of the sum (undoes all_gather_rows); else all, in place.
    """
    if not scatter:
        return dist.all_reduce(full_CH, group=group, async_op=True), full_CH
    size = group_size(group)
    local = full_CH.new_empty(full_CH.shape[0] // size, *full_CH.shape[1:])
    return dist.reduce_scatter_tensor(local, full_CH, group=group, async_op=True), local
