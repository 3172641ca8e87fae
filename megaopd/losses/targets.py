"""The law that the student is pulled to, written into the teacher's logits (terms.Target).

A geometric mixture of softmaxes is the softmax of mixed logits, so it costs one pass and no
communication. A linear one needs both normalisers first: one all-gather of scalars more.
What comes out are logits of the target; every divergence then treats them as the teacher's.

Shapes: C rows, Vp local ids (padding already sliced off).
"""

import math

import torch
from torch import Tensor

from megaopd.losses.blocks import Blocks
from megaopd.losses.kernels import native
from megaopd.losses.terms import Target
from megaopd.losses.vocab_parallel import Shard, all_gather_packed


def apply_target_(
    target: Target, t: Tensor, base: Tensor | None, labels: Tensor | None, shard: Shard
) -> None:
    """Overwrites t [C, Vp], the teacher's scaled logits; base [C, Vp] is read (and may be lost)."""
    weight = target.weight
    if target.kind == "tempered":
        t.mul_(weight)
    elif target.kind == "geometric":
        assert base is not None
        t.mul_(weight).add_(base, alpha=1 - weight)
    elif target.kind == "linear":
        assert base is not None
        lse_t, lse_base = _logsumexp([t, base], shard)
        t.sub_(lse_t[:, None]).add_(math.log(weight))
        base.sub_(lse_base[:, None]).add_(math.log1p(-weight))
        torch.logaddexp(t, base, out=t)
    elif target.kind == "one_hot":
        assert labels is not None
        (lse_t,) = _logsumexp([t], shard)
        t.sub_(lse_t[:, None]).add_(math.log(weight))
        _add_one_hot_(t, labels, 1 - weight, shard)


def _add_one_hot_(log_t: Tensor, labels: Tensor, weight: float, shard: Shard) -> None:
    """In place: log t -> log(t + weight * onehot(label)) on the rank that owns the label."""
    if shard.valid == 0:
        return
    owned, column = shard.owned(labels)
    old = log_t.gather(1, column[:, None])
    new = torch.logaddexp(old, torch.full_like(old, math.log(weight)))
    log_t.scatter_(1, column[:, None], torch.where(owned[:, None], new, old))


def _logsumexp(logits: list[Tensor], shard: Shard) -> list[Tensor]:
    """logsumexp over the whole vocabulary of each: one all-gather for all of them."""
    local = []
    for x in logits:
        ops = native(x) if x.shape[1] else None
        if ops is not None:
            offset, z = ops.local_moments(x, None, ("z_s",))
            local += [offset[0], z[0]]
        else:
            blocks = Blocks(x, None, "none")
            z = blocks.moments(("z_s",))
            local += [blocks.offsets[0], z[0]]
    by_rank = all_gather_packed(torch.stack(local), shard.group)
    offsets, z = by_rank[:, ::2], by_rank[:, 1::2]
    m = offsets.amax(0)
    return list(m + (z * (offsets - m).exp()).sum(0).log())
