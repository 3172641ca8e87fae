"""Core attention on torch's scaled_dot_product_attention: what the local layer spec uses.

megatron-core's own local module materialises [B, heads, S, S] scores and knows neither packed
sequences nor context parallelism (models/segments.py). Transformer Engine's module takes its place
where that can run.

Shapes: S sequence, B batch, N query heads of this tensor rank, G key/value heads, D head size.
"""

import math
from typing import Any

from megaopd.models.segments import attend


def sdpa_attention() -> type:
    """The module class. A function because megatron-core is imported only after platform.install().

    It takes the arguments of megatron-core's DotProductAttention.
    """
    import torch
    from megatron.core.transformer.module import MegatronModule

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
            """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N*D], causal.

            Packed: [S, N, D] and [S, G, D] -> [S, 1, N*D], causal within each sequence.
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
            """query [n, B, N, D] at the last n of the m positions of key, value [m, B, G, D]."""
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            n, m, mask = q.shape[2], k.shape[2], None
            if n != m:
                mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
            out = torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            return out.permute(2, 0, 1, 3).flatten(2)

    return SdpaAttention
