"""LoRA: W + scale * B A, with W frozen, on the fused linear layers of every transformer layer.

One adapter over each fused matrix (q, k, v together; gate and up together), as Megatron lays them
out. The adapter hangs beside its linear layer, as `linear_qkv_lora` of the same parent, and adds to
its output in a forward hook: local and Transformer Engine layers alike.

Under tensor parallel A or B is cut where the layer's weight is, and only r numbers a token travel:
  column (qkv, fc1)  A [r, in] on every rank, B [out/TP, r]. z = A x is made whole again under
                     sequence parallel (all-gather); its gradient is summed over the ranks.
  row (proj, fc2)    A [r, in/TP], B [out, r] on every rank. z is summed over the ranks (to each
                     its rows under sequence parallel) before B.
Under sequence parallel the factor on every rank sees only its part of the sequence: marked
`sequence_parallel`, its gradient is summed by finalize_model_grads, like a norm's.

Shapes: S sequence (S/TP under sequence parallel), B batch, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megaopd.errors import UserError
from megaopd.models.config import LoraConfig
from megaopd.models.fp8 import EXTRA, remember_value
from megaopd.parallel import as_chunks

SUFFIX = "_lora"
MODULES = {"qkv": "linear_qkv", "proj": "linear_proj", "fc1": "linear_fc1", "fc2": "linear_fc2"}
COLUMN = ("linear_qkv", "linear_fc1")


class Adapter(torch.nn.Module):
    """A and B of one linear layer on this tensor rank; `enabled` False: the layer as it was.

    Args:
        linear: Megatron's column- or row-parallel layer, or Transformer Engine's of the same kind.
        name: one of MODULES' values; it says which of the two kinds.
        key: what A's start is drawn from, beside the seed: the same under every layout.
    """

    def __init__(
        self, linear: Any, name: str, config: LoraConfig, model_config: Any, group: Any, key: int
    ) -> None:
        super().__init__()
        self.name, self.column, self.group = name, name in COLUMN, group
        self.scale = config.alpha / config.rank
        self.sequence = bool(model_config.sequence_parallel)
        self.enabled = True
        self.handle: Any = None  # of the hook
        out, wide = linear.weight.shape
        kind: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        start = self._draw(config, wide if self.column else wide * group.size(), key)
        if not self.column:
            start = start.chunk(group.size(), 1)[group.rank()]
        self.a = torch.nn.Parameter(start.to(**kind).contiguous())
        self.b = torch.nn.Parameter(torch.zeros(out, config.rank, **kind))
        self._mark()

    @staticmethod
    def _draw(config: LoraConfig, wide: int, key: int) -> Tensor:
        """[r, in]: uniform within 1/sqrt(in), as the LoRA paper's code and PEFT start it."""
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + key)
        limit = wide**-0.5
        drawn = torch.rand(config.rank, wide, generator=generator, dtype=torch.float32)
        return (2 * drawn - 1) * limit

    def _mark(self) -> None:
        """Say which factor is a shard (for the gradient norm) and which one sees part of S."""
        from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

        split, whole = (self.b, self.a) if self.column else (self.a, self.b)
        set_tensor_model_parallel_attributes(split, True, 0 if self.column else 1, 1)
        set_tensor_model_parallel_attributes(whole, False, -1, 1)
        whole.sequence_parallel = self.sequence  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        """x: the layer's input [S, B, in(/TP)] -> what to add to its output, before the scale."""
        from megatron.core import tensor_parallel as tp

        linear = torch.nn.functional.linear
        z = linear(x, self.a)
        if self.column and self.sequence:
            z = tp.gather_from_sequence_parallel_region(z, True, group=self.group)
        elif self.column:
            z = tp.copy_to_tensor_model_parallel_region(z, group=self.group)
        elif self.sequence:
            z = tp.reduce_scatter_to_sequence_parallel_region(z, group=self.group)
        else:
            z = tp.reduce_from_tensor_model_parallel_region(z, group=self.group)
        return linear(z, self.b)

    def merged(self, weight: Tensor) -> Tensor:
        """weight + scale * B A of this rank's shard, a new tensor of the weight's dtype."""
        with torch.no_grad():
            b, a = self.b.float(), self.a.float()
            return torch.addmm(weight.float(), b, a, alpha=self.scale).to(weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """A and B as tensors that can be loaded under any tensor parallel size."""
        from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
        from megatron.core.transformer.utils import (
            ensure_metadata_has_dp_cp_group,
            make_sharded_tensors_for_checkpoint,
        )

        found = make_sharded_tensors_for_checkpoint(
            {"a": self.a, "b": self.b},
            prefix,
            {"b": 0} if self.column else {"a": 1},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        if self.name == "linear_fc1":  # gate and up are stacked per rank
            key = f"{prefix}b"
            found[key] = apply_swiglu_sharded_factory(found[key], sharded_offsets)
        return found


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Freeze every weight of a stage (or of its chunks), put a new adapter on each target layer.

    Before DDP is built, so that frozen weights get no gradient buffer and no optimizer state.

    Raises:
        UserError: a target that a layer does not have, or an expert's.
    """
    for chunk in as_chunks(model):
        _add_to_chunk(chunk, config)


def _add_to_chunk(model: Any, config: LoraConfig) -> None:
    model.requires_grad_(False)
    for layer in model.decoder.layers:
        for index, target in enumerate(MODULES):
            if target in config.targets:
                parent, linear = _find(layer, MODULES[target], target)
                key = layer.layer_number * len(MODULES) + index
                _attach(parent, linear, MODULES[target], config, model, key)
    if model.pre_process and model.config.recompute_granularity == "full":
        # A recomputed layer runs its backward only where its input wants a gradient.
        model.embedding.register_forward_hook(_want_gradient)


def _find(layer: Any, name: str, target: str) -> tuple[Any, Any]:
    """(parent, linear layer) of a layer's target."""
    found = [
        (layer.get_submodule(path.rpartition(".")[0]), module)
        for path, module in layer.named_modules()
        if path.rpartition(".")[2] == name
    ]
    weight = getattr(found[0][1], "weight", None) if len(found) == 1 else None
    if weight is None or weight.dim() != 2 or getattr(found[0][1], "is_expert", False):
        what = "no" if not found else "an expert's" if len(found) > 1 else "another kind of"
        raise UserError(
            f"lora.targets holds {target}: layer {layer.layer_number} has {what} {name}",
            expected="one dense linear layer of that name in every transformer layer",
            fix=f"remove {target} from lora.targets",
        )
    return found[0]


def _attach(parent: Any, linear: Any, name: str, config: LoraConfig, model: Any, key: int) -> None:
    adapter = Adapter(linear, name, config, model.config, model.pg_collection.tp, key)
    parent.add_module(name + SUFFIX, adapter)
    linear.weight.adapter = adapter

    def add(module: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> tuple[Any, Any]:
        if not adapter.enabled:
            return output
        delta = adapter(_after_fused_norm(module, inputs[0]))
        return torch.add(output[0], delta, alpha=adapter.scale), output[1]

    # Before the layer's own hooks: a norm behind the layer (modules.with_post_norm).
    adapter.handle = linear.register_forward_hook(add, prepend=True)


def _after_fused_norm(linear: Any, x: Tensor) -> Tensor:
    """What a layer multiplies: Transformer Engine's may hold the norm before it.

    The norm is computed once more, which is cheap beside the layer, and does not depend on what
    that layer is willing to hand out.
    """
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return x
    if linear.zero_centered_gamma:
        weight = weight + 1
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, linear.eps)


def _want_gradient(module: Any, inputs: Any, output: Tensor) -> Tensor:
    wanted = torch.is_grad_enabled() and not output.requires_grad
    return output.requires_grad_() if wanted else output


def adapters(model: Any) -> list[Adapter]:
    """The adapters of a stage or of its chunks, in layer order; [] without LoRA."""
    return [m for chunk in as_chunks(model) for m in chunk.modules() if isinstance(m, Adapter)]


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model as it was before training, inside the block: a frozen teacher without a copy.

    For forward passes without gradients; a backward pass must not cross the block's border.
    """
    found = adapters(model)
    for adapter in found:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.enabled = True


def merged(parameter: Any) -> Tensor:
    """A parameter's values as a rollout or an export is to see them; not a copy without LoRA."""
    adapter = getattr(parameter, "adapter", None)
    return parameter.detach() if adapter is None else adapter.merged(parameter.detach())


def fold(model: Any) -> None:
    """Write every adapter into its weight and remove it; all weights want gradients again."""
    for chunk in as_chunks(model):
        chunk.requires_grad_(True)
    for parent in [module for chunk in as_chunks(model) for module in chunk.modules()]:
        for name, adapter in list(parent.named_children()):
            if isinstance(adapter, Adapter):
                linear = getattr(parent, adapter.name)
                value = adapter.merged(linear.weight.detach())
                linear.weight.data.copy_(value)
                remember_value(linear.weight, value)
                adapter.handle.remove()
                del linear.weight.adapter
                delattr(parent, name)


def is_adapter(name: str) -> bool:
    """Whether a parameter's or a state dict's name is an adapter's."""
    return SUFFIX + "." in name


def own_state(model: Any) -> dict[str, Any]:
    """The sharded state dict of what a step changes: all of it, or with LoRA the adapters alone.

    FP8 layers have scales that training makes; a frozen layer keeps its own as well.
    """
    state = model.sharded_state_dict()
    if not adapters(model):
        return state

    def kept(name: str, value: Any) -> bool:
        return is_adapter(name) or (name.endswith(EXTRA) and value.data is not None)

    return {name: value for name, value in state.items() if kept(name, value)}


def load_own_state(model: Any, state: dict[str, Any]) -> None:
    """Take what `own_state` described; everything else stays as it is."""
    missing, unexpected = model.load_state_dict(state, strict=not adapters(model))
    wrong = [*unexpected, *(name for name in missing if is_adapter(name))]
    assert not wrong, f"adapters that do not fit: {wrong[:3]}"
