"""Core attention on torch's scaled_dot_product_attention: what the local layer spec uses.

megatron-core's own local module materialises [B, heads, S, S] scores and knows neither packed
sequences nor context parallelism. Transformer Engine's module takes its place where that can run.

Shapes: S sequence, B batch, N query heads of this tensor rank, G key/value heads, D head size.
"""

import math
from typing import Any


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
            """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N*D], causal."""
            assert attention_mask is None and attention_bias is None and packed_seq_params is None
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            return out.permute(2, 0, 1, 3).flatten(2)

    return SdpaAttention
