"""megatron-core's DDP, optimizer and learning-rate schedule, configured."""

from functools import partial
from typing import Any

from megaopd.parallel import Grid
from megaopd.trainer.config import OptimConfig


def wrap_ddp(model: Any, config: OptimConfig, grid: Grid) -> Any:
    """Megatron's DistributedDataParallel around this rank's stage, which sums gradients in fp32.

    The model's config must have calculate_per_token_loss set before: DDP reads it here, and then
    sums over data-parallel ranks instead of averaging.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    assert model.config.calculate_per_token_loss
    ddp = DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=config.distributed,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            check_for_nan_in_grad=True,
            fp8_param_gather=bool(model.config.fp8_param),
        ),
        module=model,
        pg_collection=grid.groups,
    )
    ddp.broadcast_params()
    model.config.no_sync_func = ddp.no_sync
    model.config.finalize_model_grads_func = partial(_finalize, finalize_model_grads)
    return ddp


def _finalize(finalize: Any, model: list[Any], num_tokens: Any, **kwargs: Any) -> None:
    """Sum gradients over all groups and divide by nothing: the token weights hold 1/denominator."""
    finalize(model, None, **kwargs)


def make_optimizer(ddp: Any, config: OptimConfig, grid: Grid) -> Any:
    """Adam over the stage's parameters; its state is split over data-parallel ranks if asked."""
    import torch
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    dtype = ddp.config.params_dtype
    return get_megatron_optimizer(
        OptimizerConfig(
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
            fp8_recipe=ddp.config.fp8_recipe if ddp.config.fp8_param else None,
            use_distributed_optimizer=config.distributed,
        ),
        [ddp],
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
