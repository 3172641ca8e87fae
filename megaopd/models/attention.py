"""Core attention on torch's scaled_dot_product_attention: what the local layer spec uses.

megatron-core's own local module materialises [B, heads, S, S] scores and knows neither packed
sequences nor context parallelism (models/segments.py). Transformer Engine's module takes its place
where that can run, but for models that soft-cap their attention scores, which it does not do.

Shapes: S sequence, B batch, N query heads of this tensor rank, G key/value heads, D head size of
queries and keys, Dv of values.
"""

import math
from typing import Any

from megaopd.models.segments import attend


def sdpa_attention(softcap: float | None = None) -> type:
    """The module class. A function because megatron-core is imported only after platform.install().

    It takes the arguments of megatron-core's DotProductAttention; window and layers that have it
    are those of the config.
    """
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.utils import is_layer_window_attention

    class SdpaAttention(MegatronModule):
        def __init__(
            self,
            config: Any,
            layer_number: int,
            attn_mask_type: Any,
            attention_type: str,
            attention_dropout: float | None = None,
            softmax_scale: float | None = None,
            cp_comm_type: str | None = None,
            pg_collection: Any = None,
            **_: Any,
        ) -> None:
            super().__init__(config=config)
            self.layer_number = layer_number
            self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
            self.cp_group = pg_collection.cp if pg_collection is not None else None
            has_window = is_layer_window_attention(
                config.window_size, config.window_attn_skip_freq, layer_number
            )
            self.window = config.window_size[0] + 1 if has_window else None

        def forward(
            self,
            query: Any,
            key: Any,
            value: Any,
            attention_mask: Any,
            attn_mask_type: Any = None,
            attention_bias: Any = None,
            packed_seq_params: Any = None,
            **_: Any,
        ) -> Any:
            """query [S, B, N, D], key [S, B, G, D], value [S, B, G, Dv] -> [S, B, N*Dv], causal.

            Packed: [S, N, D], [S, G, D], [S, G, Dv] -> [S, 1, N*Dv], causal within each sequence.
            """
            assert attention_mask is None and attention_bias is None
            return attend(
                self._piece,
                query,
                key,
                value,
                packed_seq_params=packed_seq_params,
                cp_group=self.cp_group,
            )

        def _piece(self, query: Any, key: Any, value: Any) -> Any:
            """query [n, B, N, D] at the last n of the m positions of key and value [m, B, G, ...].

            Returns [n, B, N*Dv].
            """
            mask = visible(query.shape[0], key.shape[0], self.window, query.device)
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = attention(q, k, v, mask, scale=self.scale, softcap=softcap)
            return out.permute(2, 0, 1, 3).flatten(2)

    return SdpaAttention


def visible(queries: int, keys: int, window: int | None, device: Any) -> Any:
    """Which keys a query sees: [n, m] bool for the last n of m positions.

    A query sees itself and what stands before it, with a window no more than that many positions.
    None where that is plain causal attention of a sequence with itself.
    """
    import torch

    narrow = window is not None and window < keys
    if queries == keys and not narrow:
        return None
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if narrow:
        assert window is not None
        mask = mask.triu(keys - queries - window + 1)
    return mask


def attention(q: Any, k: Any, v: Any, mask: Any, *, scale: float, softcap: float | None) -> Any:
    """q [B, N, n, D], k [B, G, m, D], v [B, G, m, Dv], mask of `visible` -> [B, N, n, Dv].

    softcap c: scores z become c tanh(z / c). They are held whole then, [B, N, n, m] in fp32.
    """
    import torch

    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * (scale / softcap)
    scores = softcap * scores.tanh()
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
