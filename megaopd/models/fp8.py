"""FP8 in a model: what megatron-core is told on a GPU, and what replaces it without one.

A model of ours is made FP8 by two calls in models/build.py: `config_fields` fills the
TransformerConfig where Transformer Engine runs, and `apply_fp8` checks the built model and, on a
CPU, gives its linear layers the emulation of models/fp8_emulation.py. The output layer is never
FP8: the loss applies it. Norms, attention, embeddings and routers are not either.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megaopd import platform
from megaopd.errors import UserError
from megaopd.models.config import ModelConfig
from megaopd.parallel import Grid, ParallelConfig

# megatron-core's names.
RECIPES = {
    "delayed": "delayed",
    "current": "tensorwise",
    "blockwise": "blockwise",
    "mxfp8": "mxfp8",
}
EXTRA = "_extra_state"  # where a linear layer's scales stand in a state dict


def config_fields(model: ModelConfig) -> dict[str, Any]:
    """The fields of megatron-core's TransformerConfig; none where FP8 is off or emulated.

    Raises:
        UserError: this machine cannot run the recipe.
    """
    if model.fp8 == "none":
        return {}
    _check_machine(model)
    if not platform.use_transformer_engine():
        return {}
    return {
        "fp8": "hybrid" if model.fp8_backward == "e5m2" else "e4m3",
        "fp8_recipe": RECIPES[model.fp8],
        "fp8_margin": model.fp8_margin,
        "fp8_amax_history_len": model.fp8_history,
        "fp8_amax_compute_algo": model.fp8_amax,
        "fp8_param": model.fp8_params,
        "first_last_layers_bf16": model.fp8_first_last_bf16 > 0,
        "num_layers_at_start_in_bf16": model.fp8_first_last_bf16,
        "num_layers_at_end_in_bf16": model.fp8_first_last_bf16,
    }


def _check_machine(model: ModelConfig) -> None:
    capability = platform.compute_capability()
    if capability is None:
        if model.fp8 == "mxfp8" or model.fp8_params:
            what = "fp8_params = true" if model.fp8_params else "fp8 = mxfp8"
            raise UserError(
                f"{what} without a GPU",
                expected="a recipe that is emulated: delayed, current, blockwise",
                fix="set fp8=blockwise and fp8_params=false",
            )
        return
    if not platform.use_transformer_engine():
        raise UserError(
            f"fp8 = {model.fp8} without Transformer Engine",
            expected="transformer_engine.pytorch imports: its kernels are the FP8 layers of a GPU",
            fix="install transformer-engine, or set fp8=none",
        )
    if model.dtype != "bfloat16":
        raise UserError(
            f"fp8 = {model.fp8} with dtype = {model.dtype}",
            expected="bfloat16 around the FP8 products on a GPU",
            fix="set dtype=bfloat16",
        )
    needed = {"mxfp8": (10, 0), "blockwise": (9, 0)}.get(model.fp8, (8, 9))
    if capability < needed:
        raise UserError(
            f"fp8 = {model.fp8} on a GPU of compute capability {capability[0]}.{capability[1]}",
            expected=f"{needed[0]}.{needed[1]} or more"
            + (" (Blackwell)" if model.fp8 == "mxfp8" else ""),
            fix="set fp8=current" if capability >= (8, 9) else "set fp8=none",
        )


def _check_padding(model: ModelConfig, parallel: ParallelConfig) -> None:
    """For a weight's gradient tensor cores sum over 16 tokens (mxfp8: 32); blockwise has tiles of
    128 and under sequence parallel gathers whole ones. The emulation takes any number."""
    multiple = {"mxfp8": 32, "blockwise": 128}.get(model.fp8, 16)
    key = f"{parallel.section}.pad_multiple"
    if parallel.pad_multiple % multiple:
        raise UserError(
            f"fp8 = {model.fp8} with {key} = {parallel.pad_multiple}",
            expected=f"a multiple of {multiple}: tokens that Transformer Engine's kernels take",
            fix=f"set {key}={multiple}",
        )


def apply_fp8(built: Any, model: ModelConfig, grid: Grid) -> None:
    """Make the built model an FP8 one: the hook at the end of build_model.

    Raises:
        UserError: a matrix or a padding that FP8 tensor cores cannot take, or no layer left.
    """
    built.register_load_state_dict_pre_hook(_drop_foreign_scales)
    if model.fp8 == "none":
        return
    linears = list(_linears(built, model))
    if not linears and built.config.num_layers <= 2 * model.fp8_first_last_bf16:
        raise UserError(
            f"fp8_first_last_bf16 = {model.fp8_first_last_bf16}: all of the model's layers",
            expected=f"some of {built.config.num_layers} layers in between",
            fix="lower fp8_first_last_bf16, or set fp8=none",
        )
    multiple = 32 if model.fp8 == "mxfp8" else 16
    for name, linear in linears:
        if any(size % multiple for size in linear.weight.shape):
            raise UserError(
                f"fp8 = {model.fp8}: {name}.weight is {tuple(linear.weight.shape)}",
                expected=f"multiples of {multiple} on each tensor rank: FP8 tensor cores need them",
                fix="lower parallel.tensor, or set fp8=none for this model",
            )
    if platform.use_transformer_engine():
        _check_padding(model, grid.config)
        if model.fp8 == "delayed":
            _keep_scales_without_gradients(built)
    else:
        _emulate([linear for _, linear in linears], built, model)


def _linears(built: Any, model: ModelConfig) -> Iterator[tuple[str, Any]]:
    """The linear layers that are FP8, by name: those of the layers, but for the first and last."""
    from megatron.core.fp8_utils import is_column_parallel_linear, is_row_parallel_linear

    skipped, count = model.fp8_first_last_bf16, built.config.num_layers
    for layer in built.decoder.layers:
        number = layer.layer_number - 1  # over all pipeline stages
        if number < skipped or number >= count - skipped:
            continue
        for name, module in layer.named_modules():
            if is_column_parallel_linear(module) or is_row_parallel_linear(module):
                yield f"decoder.layers.{number}.{name}", module


def _emulate(linears: list[Any], built: Any, model: ModelConfig) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megaopd.models import fp8_emulation as emulation

    updates = None
    if model.fp8 == "delayed":
        # Transformer Engine's: tensor x data x context parallel ranks.
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        updates = built.fp8_updates = emulation.DelayedUpdates(group)
        built.decoder.register_forward_pre_hook(lambda *_: updates.enter())
        built.decoder.register_forward_hook(lambda *_: updates.leave(), always_call=True)
    for linear in linears:
        if model.fp8 == "current":
            column = isinstance(linear, ColumnParallelLinear)
            split = ("weight", "gradient") if column else ("input", "weight")
            group = linear.tp_group
            groups = {role: group for role in split if group.size() > 1}
            scaling = emulation.CurrentScaling(model.fp8_backward, groups)
        elif model.fp8 == "blockwise":
            scaling = emulation.BlockScaling(model.fp8_backward)
        else:
            assert updates is not None
            scaling = emulation.DelayedScaling(
                model.fp8_backward,
                history=model.fp8_history,
                latest=model.fp8_amax == "most_recent",
                margin=model.fp8_margin,
            )
            updates.scalings.append(scaling)
            linear.get_extra_state = scaling.state
            linear.set_extra_state = _loader(scaling)
        linear._forward_impl = emulation.linear_forward(scaling, updates)


def _loader(scaling: Any) -> Any:
    """`set_extra_state` of an emulated layer: scales that are not there begin anew."""
    return lambda state: scaling.load(state) if isinstance(state, dict) else None


@contextmanager
def calibrating(built: Any) -> Iterator[None]:
    """Forward passes without gradients fill the histories of an emulated delayed model.

    For a model that never trains; a run refuses one (Transformer Engine updates scales in training
    only), tools/fp8_study.py measures one.
    """
    updates = built.fp8_updates
    updates.calibrating = True
    try:
        yield
    finally:
        updates.calibrating = False


def _keep_scales_without_gradients(built: Any) -> None:
    """Forward passes without gradients leave Transformer Engine's amax history as it was.

    Its kernels write magnitudes into the history in every pass and only skip the update, so that a
    teacher's pass on live weights would enter the student's next scales.
    """
    import torch

    saved: list[tuple[Any, Any]] = []

    def before(*_: Any) -> None:
        saved.clear()
        if not torch.is_grad_enabled():
            modules = [m for m in built.decoder.modules() if hasattr(m, "get_fp8_meta_tensors")]
            saved.extend((m, m.get_fp8_meta_tensors()) for m in modules)

    def after(*_: Any) -> None:
        for module, tensors in saved:
            # None: the first pass of this module made them; they begin anew.
            module.reset_fp8_meta_tensors(tensors)
        saved.clear()

    built.decoder.register_forward_pre_hook(before)
    built.decoder.register_forward_hook(after, always_call=True)


def _drop_foreign_scales(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take scales from checkpoints of the same kind of layers; from others they begin anew.

    Transformer Engine's are bytes, the emulation's a dict, those of layers without FP8 None. Layers
    that only one kind has (its core attention) have no entry in the other's checkpoints.
    """
    import torch

    emulated = not platform.use_transformer_engine()
    for name, child in module.named_modules():
        # A class that says nothing of it inherits torch's, which raises.
        if type(child).get_extra_state is torch.nn.Module.get_extra_state:
            continue
        key = f"{prefix}{name}.{EXTRA}" if name else f"{prefix}{EXTRA}"
        value = state.get(key)
        state[key] = value if isinstance(value, dict if emulated else torch.Tensor) else None


def known_scales(chunks: dict[str, dict[str, Any]], directory: Any) -> dict[str, Any]:
    """Sharded state dicts without the scales that the checkpoint in `directory` does not hold.

    dist_checkpointing refuses to load what is not there; what is left out begins anew.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    held = {item.key for item in load_sharded_metadata(str(directory)).values()}

    def keep(value: Any) -> bool:
        scales = isinstance(value, ShardedObject) and value.key.endswith(EXTRA)
        return not scales or value.key in held

    return {
        name: {key: value for key, value in state.items() if keep(value)}
        for name, state in chunks.items()
    }


def remember_precise(built: Any, state: dict[str, Any]) -> None:
    """`remember_value` for every parameter of a model and the state dict that filled it."""
    for name, parameter in built.named_parameters():
        if name in state:
            remember_value(parameter, state[name])


def remember_value(parameter: Any, value: Any) -> None:
    """Tell an FP8 parameter its full-precision value, from which the optimizer's copy is made.

    Transformer Engine keeps the value of the initialisation, which ours replace.
    """
    if hasattr(parameter, "_high_precision_init_val"):
        parameter._high_precision_init_val = value.detach().to("cpu", parameter.dtype, copy=True)


def plain(parameter: Any) -> Any:
    """The parameter as a tensor of its own dtype: an FP8 one dequantised, any other itself."""
    return parameter.dequantize() if hasattr(parameter, "_quantizer") else parameter.detach()
