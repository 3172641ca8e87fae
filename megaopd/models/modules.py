"""Parts of a layer that megatron-core lacks, for both layer specs (models/spec.py).

Functions that return classes: megatron-core is imported only after platform.install().

Shapes: S sequence (S/TP under sequence parallel), B batch, H hidden.
"""

from typing import Any

from megaopd.models.rope import Rope


class LocalRMSNorm:
    """torch.nn.RMSNorm that tells Megatron when its gradient must be summed over tensor ranks.

    megatron-core's own wrapper refuses sequence parallel. There each rank's norm sees its part of
    the sequence only, so finalize_model_grads all-reduces the weights marked `sequence_parallel`.
    With config.layernorm_zero_centered_gamma the factor is 1 + weight, in fp32.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        import torch

        made = zero_centered_norm() if config.layernorm_zero_centered_gamma else torch.nn.RMSNorm
        norm = made(hidden_size, eps=eps, dtype=config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore
        return norm


def zero_centered_norm() -> type:
    """RMSNorm whose factor is 1 + weight."""
    import torch

    class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
        def forward(self, x: Any) -> Any:
            plain = torch.nn.functional.rms_norm(x.float(), self.normalized_shape, None, self.eps)
            return (plain * (1.0 + self.weight.float())).to(x.dtype)

    return ZeroCenteredRMSNorm


def with_post_norm(linear: Any, norm: Any) -> type:
    """A row-parallel linear layer with a norm behind it, before the residual is added."""

    class PostNormLinear(linear):
        def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
            super().__init__(*args, config=config, **kwargs)
            self.post_norm = norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
            # A hook: an adapter's, which comes first (models/lora.py), adds to what is normalised.
            self.register_forward_hook(_apply_post_norm)

    return PostNormLinear


def _apply_post_norm(module: Any, inputs: Any, output: tuple[Any, Any]) -> tuple[Any, None]:
    y, bias = output
    return module.post_norm(y if bias is None else y + bias), None


def with_bias(linear: Any) -> type:
    """A linear layer that has a bias though its config has none."""

    class BiasedLinear(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": True})

    return BiasedLinear


def set_frequencies(module: Any, rope: Rope) -> None:
    """Give a megatron-core RotaryEmbedding the frequencies of this rope."""
    dim = 2 * module.inv_freq.numel()
    module.inv_freq = rope.frequencies(dim).to(module.inv_freq.device)


def local_rope_attention(rope: Rope) -> type:
    """Self-attention of a layer whose rotary embedding is not that of the model."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.attention import SelfAttention

    class LocalRopeAttention(SelfAttention):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self.local_rope = RotaryEmbedding(
                config.kv_channels,
                rotary_percent=1.0,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )
            set_frequencies(self.local_rope, rope)

        def forward(self, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
            packed = kwargs.get("packed_seq_params") is not None
            length = rotary_pos_emb.shape[0] * (1 if packed else self.pg_collection.cp.size())
            local = self.local_rope(length, packed_seq=packed)
            return super().forward(*args, rotary_pos_emb=local, **kwargs)

    return LocalRopeAttention


def latent_attention() -> type:
    """Multi-latent attention whose narrow projections are whole on every tensor rank.

    megatron-core splits them where Transformer Engine is absent and gathers what comes out; the
    gradient of the rotary key, which all heads share, then misses the other ranks' heads. Whole,
    they work on this rank's part of the sequence, and their gradients are summed like a norm's.
    Tensor parallel needs sequence parallel here (arch.check_layout).
    """
    import torch
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    mla: Any = multi_latent_attention
    if not isinstance(mla.TELinear, type):  # no class where Transformer Engine does not import
        mla.TELinear = type("NoTransformerEngine", (), {})

    class WholeLinear(torch.nn.Module):
        """[S, B, H] -> [S, B, rows], the same weight on every tensor rank."""

        def __init__(self, config: Any, rows: int) -> None:
            super().__init__()
            device = None if config.use_cpu_initialization else torch.cuda.current_device()
            weight = torch.empty(rows, config.hidden_size, dtype=config.params_dtype, device=device)
            self.weight = torch.nn.Parameter(weight)
            self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore

        def forward(self, x: Any) -> tuple[Any, None]:
            return torch.nn.functional.linear(x, self.weight), None

    class LatentAttention(MLASelfAttention):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            rows = config.kv_lora_rank + config.qk_pos_emb_head_dim
            self.linear_kv_down_proj = WholeLinear(config, rows)
            if config.q_lora_rank is not None:
                self.linear_q_down_proj = WholeLinear(config, config.q_lora_rank)

    return LatentAttention


def router() -> type:
    """megatron-core's router, whose auxiliary loss waits for no division by the number of tokens.

    config.aux_loss_share is 1 / (micro-batches of the step, over all data-parallel ranks): the
    trainer divides by nothing, so the mean over them is taken here. Padding does not count, and a
    micro-batch of nothing else has no loss, where megatron-core divides by zero.
    """
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter

    class Router(TopKRouter):
        def __init__(self, config: Any, pg_collection: Any = None) -> None:
            super().__init__(config=config, pg_collection=pg_collection)
            self.calculate_per_token_loss = False

        def _apply_aux_loss(
            self, probs: Any, scores: Any, routing_map: Any, with_padding_mask: bool = False
        ) -> Any:
            coefficient = self.get_aux_loss_coeff("aux_loss")
            if coefficient == 0:
                return probs
            counted: Any = moe_utils.get_tokens_per_expert_and_token_count(
                routing_map, self.tp_cp_group, self.topk, with_padding_mask
            )
            counts, _, total = counted
            if with_padding_mask:
                total = total.clamp_min(1)
            loss = moe_utils.switch_load_balancing_loss_func(
                probs=scores,
                tokens_per_expert=counts,
                total_num_tokens=total,
                topk=self.topk,
                num_experts=scores.shape[1],
                moe_aux_loss_coeff=coefficient,
            )
            return self.attach_and_log_load_balancing_loss(
                probs, coefficient, loss, "load_balancing_loss", self.tp_cp_group
            )

        def _apply_expert_bias(self, routing_map: Any, padding_mask: Any = None) -> None:
            # [tokens] against [tokens, experts]
            mask = None if padding_mask is None else padding_mask.unsqueeze(-1)
            super()._apply_expert_bias(routing_map, mask)

        def attach_and_log_load_balancing_loss(
            self, activation: Any, aux_loss_coeff: float, aux_loss: Any, *args: Any, **kwargs: Any
        ) -> Any:
            config: Any = self.config
            return super().attach_and_log_load_balancing_loss(
                activation, aux_loss_coeff, aux_loss * config.aux_loss_share, *args, **kwargs
            )

    return Router
