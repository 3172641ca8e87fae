"""Causal attention within sequences that share a row, and over context-parallel ranks.

The kernel behind it (`Piece`) sees one run of consecutive queries of one sequence and the keys from
the sequence's start to the last of those queries. No score between two sequences is ever made.

Shapes: S positions of a row on this rank, B rows, N query heads, G key/value heads, D head size.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from megaopd.parallel import zigzag

# (query [n, B, N, D], key [m, B, G, D], value [m, B, G, D]) -> [n, B, N*D]; query i stands at
# position m - n + i.
Piece = Callable[[Any, Any, Any], Any]


def attend(
    piece: Piece, query: Any, key: Any, value: Any, *, packed_seq_params: Any, cp_group: Any
) -> Any:
    """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N*D].

    Args:
        packed_seq_params: megatron's; then all tensors come without B, which is 1.
        cp_group: the ranks that share the rows (parallel.zigzag); None or of size 1: none do.
    """
    import torch

    bounds = None
    if packed_seq_params is not None:
        bounds = tuple(packed_seq_params.cu_seqlens_q.tolist())
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    rank, size = (cp_group.rank(), cp_group.size()) if cp_group is not None else (0, 1)
    if size > 1:
        bounds = bounds or (0, size * query.shape[0])
        key, value = (_whole(x, bounds, cp_group) for x in (key, value))
    elif bounds is None:
        return piece(query, key, value)
    made, own = [], 0
    for start, stop, first in _runs(bounds, rank, size):
        run = query[own : own + stop - start]
        made.append(piece(run, key[first:stop], value[first:stop]))
        own += stop - start
    return torch.cat(made)


def _runs(bounds: Sequence[int], rank: int, size: int) -> list[tuple[int, int, int]]:
    """(start, stop) of every run of positions that a rank holds, and where its sequence begins."""
    runs = []
    for first, end in pairwise(bounds):
        if size == 1:
            runs.append((first, end, first))
            continue
        chunk = (end - first) // (2 * size)
        for index in (rank, 2 * size - 1 - rank):
            runs.append((first + index * chunk, first + (index + 1) * chunk, first))
    return runs


def _whole(x: Any, bounds: tuple[int, ...], group: Any) -> Any:
    """[S, ...] of every context-parallel rank -> [CP*S, ...] in the order of the positions."""
    gathered = _gather_over_context().apply(x, group)
    return gathered.index_select(0, _order(bounds, group.size()).to(x.device))


@lru_cache(maxsize=64)
def _order(bounds: tuple[int, ...], size: int) -> Any:
    """[CP*S] int64: where each position of the row stands among the ranks' parts."""
    import torch

    return torch.cat([zigzag(bounds, rank, size) for rank in range(size)]).argsort()


@lru_cache(maxsize=1)
def _gather_over_context() -> Any:
    import torch
    import torch.distributed as dist

    class GatherOverContext(torch.autograd.Function):
        """All-gather forward; every rank's queries use every key, so reduce-scatter backward."""

        @staticmethod
        def forward(ctx: Any, x: Any, group: Any) -> Any:
            ctx.group = group
            out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
            dist.all_gather_into_tensor(out, x.contiguous(), group=group)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (grad,) = grads
            out = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
            dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
            return out, None

    return GatherOverContext
