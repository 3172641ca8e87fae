"""Packed attention equals the attention of each sequence by itself, forward and backward."""

from itertools import pairwise

import pytest
import torch

from megaopd import platform
from megaopd.parallel import zigzag

HEADS, GROUPS, SIZE = 4, 2, 8
BOUNDS = (0, 5, 6, 14, 20)


@pytest.fixture(scope="module")
def attention():
    platform.install()
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megaopd.models.attention import sdpa_attention

    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=HEADS, num_query_groups=GROUPS
    )
    return sdpa_attention()(config, 1, AttnMaskType.causal, "self")


def packed(bounds):
    from megatron.core.packed_seq_params import PackedSeqParams

    cu = torch.tensor(bounds, dtype=torch.int32)
    most = int(cu.diff().max())
    return PackedSeqParams("thd", cu, cu, cu, cu, most, most)


def inputs(seed=0):
    torch.manual_seed(seed)
    return [
        torch.randn(BOUNDS[-1], heads, SIZE, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def plain(query, key, value):
    """[S, N, D] -> [S, N*D]: softmax over a triangle of scores, written out."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    scores = torch.einsum("snd,tnd->nst", query, key) * SIZE**-0.5
    mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    law = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("nst,tnd->snd", law, value).flatten(1)


def test_packed_sequences_do_not_see_each_other(attention):
    q, k, v = inputs()
    got = attention(q, k, v, None, packed_seq_params=packed(BOUNDS))
    spans = list(pairwise(BOUNDS))
    want = torch.cat([plain(q[a:b], k[a:b], v[a:b]) for a, b in spans])
    torch.testing.assert_close(got.squeeze(1), want)
    weights = torch.randn_like(want)
    mine = torch.autograd.grad((got.squeeze(1) * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((want * weights).sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    # A later sequence has no gradient from an earlier one's output, nor the other way round.
    got = attention(q, k, v, None, packed_seq_params=packed(BOUNDS))
    (grad,) = torch.autograd.grad(got[6:14].sum(), k)
    assert grad[6:14].any() and not grad[:6].any() and not grad[14:].any()


def test_one_sequence_is_dense_attention(attention):
    q, k, v = inputs(1)
    got = attention(q[:, None], k[:, None], v[:, None], None)
    torch.testing.assert_close(got.squeeze(1), plain(q, k, v))


class Place:
    """Which context-parallel rank, as rotary positions ask a process group."""

    def __init__(self, rank, size):
        self.rank, self.size = (lambda: rank), (lambda: size)


@pytest.mark.parametrize("size", [1, 2])
def test_rotary_positions_begin_anew_in_every_packed_sequence(size):
    """megatron-core's own thd path against the padded one, on every context-parallel rank."""
    platform.install()
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    bounds = (0, 8, 12, 20)
    torch.manual_seed(0)
    x = torch.randn(20, HEADS, SIZE)
    freqs = (torch.arange(8.0)[:, None] / torch.tensor([1.0, 3, 10, 30])).repeat(1, 2)[
        :, None, None
    ]
    turned = []
    for a, b in pairwise(bounds):
        cos, sin = (f(freqs[: b - a, :, 0]) for f in (torch.cos, torch.sin))
        half = torch.cat([-x[a:b, :, SIZE // 2 :], x[a:b, :, : SIZE // 2]], -1)
        turned.append(x[a:b] * cos + half * sin)
    want = torch.cat(turned)
    for rank in range(size):
        own = zigzag(bounds, rank, size) if size > 1 else torch.arange(20)
        got = _apply_rotary_pos_emb_thd(
            x[own], torch.tensor(bounds), freqs, cp_group=Place(rank, size)
        )
        torch.testing.assert_close(got, want[own])
