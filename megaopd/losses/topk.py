"""Exact top-k of vocabulary-sharded logits, and the losses' split into a head and the rest.

A global top-k token is in the top-k of its shard. So each rank takes its local top-k, the lists are
gathered (12 bytes a rank, token, list and entry: both models' logits, id), and the best k of
them are the answer, the same on every rank. Ties go to the lower id: values and ids are joined in
one 64-bit key, so that no two are equal.

Shapes: C rows, Vp local ids (padding sliced off), K entries of a list.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.kernels import native
from megaopd.losses.vocab_parallel import Group, Shard, all_gather_last, group_size

GROUP = 64  # ids in a group of the first selection stage
MASKED = -1e30  # the logit of a token that was taken out: e^MASKED = 0, MASKED - MASKED = 0
_NONE = -3.0e38  # fills the list of a shard with fewer than k ids; below every real logit
_TOP_ID = (1 << 31) - 1
_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}  # elements of the rows that are selected from at once


@dataclass
class Head:
    """A list of tokens taken out of the logits of both models, the same on every rank.

    ids, s, t [C, K]: token ids, student and teacher logits; member [C, K]: in the support or not.
    """

    ids: Tensor
    s: Tensor
    t: Tensor
    member: Tensor


def vocab_parallel_topk(
    logits_TVp: Tensor, k: int, *, group: Group = None, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """(values [T, k] descending, ids [T, k] int64) over the whole vocabulary, without gradient.

    Exact; equal values are ordered by id. Collectives: one all-gather, 8 bytes a rank, token and
    entry in fp32. Raises UserError where k is not between 1 and the vocabulary's size.
    """
    shard = Shard.of(logits_TVp.shape[-1], group, vocab_size)
    real = shard.width * group_size(group) if vocab_size is None else vocab_size
    if not 1 <= k <= real:
        raise UserError(f"k={k} of {real} ids", expected=f"1 <= k <= {real}", fix="lower k")
    with torch.no_grad():
        local = logits_TVp[:, : shard.valid].detach()
        values, ids = local_topk(local, k)
        values, (ids,) = _merge(values, ids + shard.offset, [], shard, k)
    return values, ids


def local_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, columns) of the k largest of each row, ties to the lower column; padded to k."""
    found = min(k, x.shape[1])
    values = x.new_full((x.shape[0], k), _NONE, dtype=_wide(x))
    columns = torch.full((x.shape[0], k), _TOP_ID, dtype=torch.int64, device=x.device)
    if found == 0:
        return values, columns
    ops = native(x)
    if hasattr(ops, "topk"):
        return ops.topk(x, k)  # pyright: ignore[reportOptionalMemberAccess]
    for rows in _row_blocks(x):
        block = x[rows]
        groups = x.shape[1] // GROUP
        if groups >= 2 * found and x.dtype != torch.float64:
            candidates = _candidates(block, groups, found)
            value = block.gather(1, candidates).to(values.dtype)
        else:
            candidates = torch.arange(x.shape[1], device=x.device).expand_as(block)
            value = block.to(values.dtype)
        values[rows, :found], columns[rows, :found] = _best(value, candidates, found)
    return values, columns


def global_lists(
    s: Tensor, t: Tensor, k: int, shard: Shard, *, student: bool, teacher: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ids, s, t) [C, k] of the student's and/or the teacher's top-k: one all-gather for both."""
    wanted = [x for x, want in ((s, student), (t, teacher)) if want]
    local = []
    for x in wanted:
        value, column = local_topk(x, k)
        filled = column == _TOP_ID  # a shard of fewer than k ids: below every real entry
        pair = [torch.full_like(value, _NONE) for _ in range(2)]
        if x.shape[1]:
            inside = torch.where(filled, 0, column)
            pair = [torch.where(filled, _NONE, z.gather(1, inside).to(value)) for z in (s, t)]
        local.append((value, column + shard.offset, pair))
    lists = []
    packed = torch.stack(
        [part for _, ids, pair in local for part in (*pair, _as_float(ids, pair[0]))], 1
    )
    full = all_gather_last(packed, shard.group)  # [C, 3 * lists, R * k]
    for i, x in enumerate(wanted):
        s_all, t_all, ids = full[:, 3 * i], full[:, 3 * i + 1], _as_id(full[:, 3 * i + 2])
        key = s_all if x is s else t_all
        order = _order(key, ids, k)
        lists.append(tuple(z.gather(1, order) for z in (ids, s_all, t_all)))
    return lists


def take_out_(s: Tensor, t: Tensor, ids: Tensor, shard: Shard) -> None:
    """In place: the listed tokens get logit MASKED in both models on the rank that owns them."""
    if shard.valid == 0:
        return
    owned, column = shard.owned(ids)
    # amin: a token that this rank does not own must leave the column that stands in for it alone.
    value = torch.where(owned, MASKED, torch.inf).to(s.dtype)
    s.scatter_reduce_(1, column, value, "amin")
    t.scatter_reduce_(1, column, value, "amin")


def contains(list_CK: Tensor, ids_CJ: Tensor) -> Tensor:
    """[C, J]: which ids are in the list of their row."""
    ordered = list_CK.sort(1).values
    place = torch.searchsorted(ordered, ids_CJ.contiguous()).clamp_max(list_CK.shape[1] - 1)
    return ordered.gather(1, place) == ids_CJ


def _candidates(block: Tensor, groups: int, k: int) -> Tensor:
    """Columns of the k groups with the largest maxima, and of the short last group.

    A token outside them is beaten by k others: each chosen group's maximum is larger, or equal with
    lower ids (groups are contiguous).
    """
    ops = native(block)
    if hasattr(ops, "group_maxima"):
        maxima = ops.group_maxima(block, GROUP)[:, :groups]  # pyright: ignore
    else:
        maxima = block[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(2)
    order = torch.arange(groups, device=block.device).expand_as(maxima)
    _, chosen = _best(maxima.to(_wide(block)), order, k)
    within = torch.arange(GROUP, device=block.device)
    columns = (chosen[:, :, None] * GROUP + within).flatten(1)
    rest = torch.arange(groups * GROUP, block.shape[1], device=block.device)
    return torch.cat([columns, rest.expand(block.shape[0], -1)], 1)


def _best(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    order = _order(values, ids, k)
    return values.gather(1, order), ids.gather(1, order)


def _order(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """Positions of the k best of each row by (value descending, id ascending)."""
    if values.dtype == torch.float64:  # no 128-bit keys: two stable sorts
        by_id = torch.sort(ids, dim=1, stable=True).indices
        by_value = torch.sort(values.gather(1, by_id), dim=1, descending=True, stable=True).indices
        return by_id.gather(1, by_value[:, :k])
    bits = (values + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = (bits ^ ((bits >> 31) & _TOP_ID)).to(torch.int64)
    return ((ordered << 32) + (_TOP_ID - ids)).topk(k, 1).indices


def _merge(
    values: Tensor, ids: Tensor, others: list[Tensor], shard: Shard, k: int
) -> tuple[Tensor, list[Tensor]]:
    packed = torch.stack([values, _as_float(ids, values), *others], 1)
    full = all_gather_last(packed, shard.group)
    values, ids = full[:, 0], _as_id(full[:, 1])
    order = _order(values, ids, k)
    return values.gather(1, order), [ids.gather(1, order)]


def _as_float(ids: Tensor, like: Tensor) -> Tensor:
    """Ids in a float tensor: their bits in fp32, their value in fp64 (exact below 2^53)."""
    ids = ids.clamp_max(_TOP_ID)
    if like.dtype == torch.float64:
        return ids.to(torch.float64)
    return ids.to(torch.int32).view(torch.float32)


def _as_id(floats: Tensor) -> Tensor:
    if floats.dtype == torch.float64:
        return floats.to(torch.int64)
    return floats.contiguous().view(torch.int32).to(torch.int64)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _row_blocks(x: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK[x.device.type] // max(1, x.shape[1]))
    for a in range(0, x.shape[0], step):
        yield slice(a, min(a + step, x.shape[0]))
