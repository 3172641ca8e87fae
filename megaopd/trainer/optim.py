"""megatron-core's DDP, optimizer and learning-rate schedule, configured."""

from functools import partial
from typing import Any

from megaopd import platform
from megaopd.errors import UserError
from megaopd.parallel import Grid
from megaopd.trainer.config import OptimConfig


def wrap_ddp(chunks: list[Any], config: OptimConfig, grid: Grid) -> list[Any]:
    """Megatron's DistributedDataParallel around each chunk of this rank's stage.

    It sums gradients in fp32 over the ranks that hold other tokens: data and context parallel ones.
    The model's config must have calculate_per_token_loss set before: DDP reads it here, and then
    sums over those ranks instead of averaging.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    wrapped = []
    for chunk in chunks:
        assert chunk.config.calculate_per_token_loss
        ddp = DistributedDataParallel(
            config=chunk.config,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=config.distributed,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=False,
                check_for_nan_in_grad=True,
                fp8_param_gather=bool(chunk.config.fp8_param),
            ),
            module=chunk,
            pg_collection=grid.groups,
        )
        ddp.broadcast_params()
        wrapped.append(ddp)
    no_sync = [ddp.no_sync for ddp in wrapped]
    for chunk in chunks:  # the schedules read the first one's
        chunk.config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        chunk.config.finalize_model_grads_func = partial(_finalize, finalize_model_grads)
    return wrapped


def _finalize(finalize: Any, model: list[Any], num_tokens: Any, **kwargs: Any) -> None:
    """Sum gradients over all groups and divide by nothing: the token weights hold 1/denominator."""
    finalize(model, None, **kwargs)


def check_optimizer(config: OptimConfig) -> None:
    """Refuse what this machine cannot do, before weights are loaded."""
    if config.cpu_offload and not platform.has_gpu():
        raise UserError(
            f"optim.cpu_offload = {config.cpu_offload} without a GPU",
            expected="a GPU whose memory it would save: the state is on the host already",
            fix="set optim.cpu_offload=0.0",
        )
    narrow = config.state_dtype != "float32"
    if (config.cpu_offload or narrow) and not platform.use_transformer_engine():
        option = "state_dtype" if narrow else "cpu_offload"
        raise UserError(
            f"optim.{option} = {getattr(config, option)} without Transformer Engine",
            expected="Transformer Engine: megatron-core's code for it asks for its version",
            fix="install transformer-engine, or leave the option out",
        )


def optimizer_config(config: OptimConfig, model: Any) -> Any:
    """megatron-core's OptimizerConfig for a model of this TransformerConfig."""
    import torch
    from megatron.core.optimizer import OptimizerConfig

    moments, dtype = getattr(torch, config.state_dtype), model.params_dtype
    return OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        # How FP8 parameters are made from the optimizer's copies.
        fp8_recipe=model.fp8_recipe if model.fp8_param else None,
        use_distributed_optimizer=config.distributed,
        # The host's share goes through the same code path as moments of another dtype.
        use_precision_aware_optimizer=config.cpu_offload > 0 or moments != torch.float32,
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
        optimizer_cpu_offload=config.cpu_offload > 0,
        optimizer_offload_fraction=config.cpu_offload,
        overlap_cpu_optimizer_d2h_h2d=config.cpu_offload > 0,
    )


def make_optimizer(ddp: list[Any], config: OptimConfig, grid: Grid) -> Any:
    """Adam over the stage's parameters; its state is split over data-parallel ranks if asked."""
    from megatron.core.optimizer import get_megatron_optimizer

    return get_megatron_optimizer(
        optimizer_config(config, ddp[0].config),
        ddp,
        use_gloo_process_groups=False,
        pg_collection=grid.groups,
    )


def make_schedule(optimizer: Any, config: OptimConfig, total_steps: int) -> Any:
    """Linear warm-up, then constant, linear or cosine decay to min_lr at the last step."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps, config.warmup_steps + 1),
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
        # A resumed run keeps its step count and takes the schedule of its configuration, so that a
        # run can be lengthened.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
