"""FP8 linear layers without FP8 hardware: quantise, dequantise, multiply in fp32.

The numbers are those of Transformer Engine's recipes up to the order of summation: the product of
two FP8 numbers is exact in fp32. A linear layer y = x W^T has three products, and each operand is
rounded to FP8 before it enters one:

    forward   y  = q(x) q(W)^T        x along K, W
    backward  dx = q(dy) q(W)         dy along N
              dW = q(dy)^T q(x)       both along the tokens

delayed and current give a tensor one scale and round it once for all its products. blockwise scales
1 x 128 tiles of activations and gradients along the dimension that is summed over, so x and dy are
rounded a second time, from full precision, for dW; weights have 128 x 128 blocks. Blocks at the
edge of a matrix that 128 does not divide are smaller, which is what padding with zeros gives.

Scales are the largest FP8 number over the largest magnitude, so that q(x) = fp8(x * scale) / scale;
blockwise rounds them down to a power of two.

Shapes: T tokens (S x B, all of the sequence under sequence parallel), K inputs, N outputs of the
layer on this tensor rank.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch

Role = Literal["input", "weight", "gradient"]
Along = Literal["rows", "columns", "both"]  # which dimension a product sums over; both: a weight
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BLOCK = 128


def scale_of(
    largest: torch.Tensor, dtype: torch.dtype, *, margin: int = 0, power_of_two: bool = False
) -> torch.Tensor:
    """The fp32 scale of tensors or blocks whose largest magnitudes are given; 1 where that is 0.

    A magnitude that is not finite gives 1 too, one too small to have a finite scale the largest
    fp32 number.
    """
    largest = largest.float()
    # Not FORMAT_MAX / tensor: torch takes the reciprocal there, which is one ulp off.
    scale = torch.div(torch.full_like(largest, torch.finfo(dtype).max), largest) / 2.0**margin
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        _, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    return torch.where((largest > 0) & torch.isfinite(largest), scale, torch.ones_like(scale))


def round_trip(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to FP8 at `scale` and back, in fp32. Too large magnitudes become the largest."""
    limit = torch.finfo(dtype).max
    # Clamped before the cast: e5m2 would overflow to infinity.
    return (x.float() * scale).clamp(-limit, limit).to(dtype).float() / scale


def magnitude(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of x as an fp32 scalar; 0 for an expert without tokens."""
    return x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


class Scaling:
    """How one linear layer rounds its operands.

    Args:
        backward: e4m3 or e5m2, of gradients; all else is e4m3.
    """

    rounds_again = False  # whether dW has roundings of its own

    def __init__(self, backward: str) -> None:
        e4m3 = FORMATS["e4m3"]
        self.formats = {"input": e4m3, "weight": e4m3, "gradient": FORMATS[backward]}

    def __call__(self, role: Role, x: torch.Tensor, along: Along) -> torch.Tensor:
        """x [rows, columns] as the tensor core sees it, in fp32."""
        raise NotImplementedError


class CurrentScaling(Scaling):
    """One scale a tensor, from the tensor itself.

    Args:
        groups: by role, the tensor parallel group over whose ranks the tensor is split. The largest
            magnitude is taken over all of them, so that the numbers do not depend on the layout.
            Transformer Engine gives each shard its own scale, which is at least as fine.
    """

    def __init__(self, backward: str, groups: dict[str, Any]) -> None:
        super().__init__(backward)
        self.groups = groups

    def __call__(self, role: Role, x: torch.Tensor, along: Along) -> torch.Tensor:
        largest = magnitude(x)
        if role in self.groups:
            torch.distributed.all_reduce(
                largest, op=torch.distributed.ReduceOp.MAX, group=self.groups[role]
            )
        return round_trip(x, scale_of(largest, self.formats[role]), self.formats[role])


class BlockScaling(Scaling):
    """Power-of-two scales of 1 x 128 tiles (weights: 128 x 128 blocks), from the tensor itself."""

    rounds_again = True

    def __call__(self, role: Role, x: torch.Tensor, along: Along) -> torch.Tensor:
        rows, columns = x.shape
        height = 1 if along == "columns" else BLOCK
        width = 1 if along == "rows" else BLOCK
        padded = torch.nn.functional.pad(x.float(), (0, -columns % width, 0, -rows % height))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        largest = blocks.abs().amax((1, 3), keepdim=True)
        scale = scale_of(largest, self.formats[role], power_of_two=True)
        rounded = round_trip(blocks, scale, self.formats[role])
        return rounded.flatten(2).flatten(0, 1)[:rows, :columns]


class DelayedScaling(Scaling):
    """One scale a tensor, from the largest magnitudes of earlier passes.

    `history[0]` collects the pass under way; `update` rolls it in, as Transformer Engine does.
    Scales begin at 1: the first pass of a new model is rounded coarsely.
    """

    def __init__(self, backward: str, *, history: int, latest: bool, margin: int) -> None:
        super().__init__(backward)
        self.latest, self.margin = latest, margin
        self.history = {role: torch.zeros(history) for role in self.formats}
        self.scale = {role: torch.ones(()) for role in self.formats}
        self.records = False  # set for the passes whose magnitudes count
        self.stale: list[dict[str, torch.Tensor]] = []  # scales of passes that will be recomputed
        self.replayed: dict[str, torch.Tensor] | None = None

    def __call__(self, role: Role, x: torch.Tensor, along: Along) -> torch.Tensor:
        replays = self.replayed is not None and role != "gradient"
        scale = self.replayed[role] if self.replayed and replays else self.scale[role]
        if role == "gradient" or (self.records and not replays):
            self.history[role][0] = torch.maximum(self.history[role][0], magnitude(x))
        return round_trip(x, scale, self.formats[role])

    def update(self, role: Role, largest: torch.Tensor) -> None:
        """Close a pass in which `largest` (over all ranks) was the largest magnitude."""
        history = self.history[role]
        history[0] = largest
        amax = history[0] if self.latest else history.max()
        if amax > 0 and torch.isfinite(amax):
            self.scale[role] = scale_of(amax, self.formats[role], margin=self.margin)
        history.copy_(history.roll(-1))
        history[0] = 0

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: the same on every tensor and data parallel rank."""
        return {
            f"{what}_{role}": tensor.clone()
            for what, tensors in (("history", self.history), ("scale", self.scale))
            for role, tensor in tensors.items()
        }

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take what `state` gave; a history of another length is cut or filled up with zeros."""
        for role in self.formats:
            self.scale[role] = state[f"scale_{role}"].clone()
            mine, saved = self.history[role], state[f"history_{role}"]
            mine.zero_()
            mine[: len(saved)] = saved[: len(mine)]


class DelayedUpdates:
    """Ends the passes of a model's delayed scalings, and says which passes count.

    Forward scales are updated when a forward pass of the layers ends, gradient scales when its
    backward does, each from the maximum over `group` (Transformer Engine's: tensor x data x context
    parallel ranks).

    A forward pass without gradients (a teacher's on live weights, an evaluation, a log-prob probe)
    reads the scales and leaves no trace. A recomputed layer is rounded with the scales that its
    first run had.

    Args:
        group: None: this rank alone.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.scalings: list[DelayedScaling] = []
        self.calibrating = False
        self.inside = self.recorded = False
        self.first: DelayedScaling | None = None  # of the forward pass: the backward's last

    def enter(self) -> None:
        """A forward pass of the layers begins."""
        self.inside, self.recorded = True, torch.is_grad_enabled() or self.calibrating
        for scaling in self.scalings:
            scaling.records = self.recorded

    def leave(self) -> None:
        """A forward pass of the layers ends."""
        self.inside = False
        if self.recorded:
            self._update(("input", "weight"))

    def before(self, scaling: DelayedScaling) -> None:
        """A layer is about to run."""
        self.first = self.first or scaling
        scaling.replayed = None
        if self.inside and self.recorded and not self.calibrating and not torch.is_grad_enabled():
            scaling.stale.append(dict(scaling.scale))  # a checkpointed layer's first run
        elif not self.inside and scaling.stale:
            scaling.replayed = scaling.stale.pop(0)

    def after_backward(self, scaling: DelayedScaling) -> None:
        """A layer has made its gradients."""
        if scaling is self.first:
            self._update(("gradient",))

    def _update(self, roles: tuple[Role, ...]) -> None:
        pairs: list[tuple[DelayedScaling, Role]] = [
            (s, role) for s in self.scalings for role in roles
        ]
        largest = torch.stack([s.history[role][0] for s, role in pairs])
        if self.group is not None and self.group.size() > 1:
            torch.distributed.all_reduce(
                largest, op=torch.distributed.ReduceOp.MAX, group=self.group
            )
        for (scaling, role), amax in zip(pairs, largest, strict=True):
            scaling.update(role, amax)


class Fp8Linear(torch.autograd.Function):
    """y = q(x) q(W)^T + bias with three FP8 products, in the place of Megatron's linear function.

    x [S, B, K] (or [T, K]; S/TP under sequence parallel, where it is gathered before it is rounded,
    as Transformer Engine does) -> [S, B, N]. Outputs and gradients have the dtype of x; the sums
    are fp32. Collectives are those of megatron-core's function.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: Scaling,
        done: Callable[[], None] | None,
        all_reduce: bool,
        sequence_parallel: bool,
        group: Any,
    ) -> torch.Tensor:
        if sequence_parallel:
            x = _gathered(x, group)
        flat = x.reshape(-1, x.shape[-1])
        rounded = scaling("input", flat, "columns")
        rounded_weight = scaling("weight", weight, "both")
        ctx.save_for_backward(flat if scaling.rounds_again else rounded, rounded_weight)
        ctx.scaling, ctx.done, ctx.group, ctx.shape, ctx.dtype = (
            scaling,
            done,
            group,
            x.shape,
            x.dtype,
        )
        ctx.all_reduce, ctx.sequence_parallel = all_reduce, sequence_parallel
        ctx.weight_dtype, ctx.has_bias = weight.dtype, bias is not None
        out = (rounded @ rounded_weight.t()).to(x.dtype)
        out = out if bias is None else out + bias
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore
        kept, rounded_weight = ctx.saved_tensors
        scaling, group = ctx.scaling, ctx.group
        flat = grad.reshape(-1, grad.shape[-1])
        rounded = scaling("gradient", flat, "columns")
        grad_x = (rounded @ rounded_weight).to(ctx.dtype).view(ctx.shape)
        if ctx.all_reduce:
            torch.distributed.all_reduce(grad_x, group=group)
        elif ctx.sequence_parallel:
            grad_x = _scattered(grad_x, group)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            if scaling.rounds_again:
                rounded = scaling("gradient", flat, "rows")
                kept = scaling("input", kept, "rows")
            grad_weight = (rounded.t() @ kept).to(ctx.weight_dtype)
        if ctx.has_bias:
            grad_bias = flat.sum(0)
        if ctx.done is not None:
            ctx.done()
        return grad_x, grad_weight, grad_bias, *[None] * 5


def _gathered(x: torch.Tensor, group: Any) -> torch.Tensor:
    """[S/TP, ...] of every rank -> [S, ...]."""
    full = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    torch.distributed.all_gather_into_tensor(full, x.contiguous(), group=group)
    return full


def _scattered(x: torch.Tensor, group: Any) -> torch.Tensor:
    """[S, ...], summed over the ranks -> this rank's [S/TP, ...]."""
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    torch.distributed.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part


def linear_forward(scaling: Scaling, updates: DelayedUpdates | None) -> Callable[..., torch.Tensor]:
    """A function for `_forward_impl` of megatron-core's Column- and RowParallelLinear."""

    def forward(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **_: Any,
    ) -> torch.Tensor:
        assert not gradient_accumulation_fusion, "there is no fused emulation"
        done = None
        if updates is not None:
            assert isinstance(scaling, DelayedScaling)
            updates.before(scaling)
            done = _after(updates, scaling)
        return Fp8Linear.apply(  # pyright: ignore
            input, weight, bias, scaling, done, allreduce_dgrad, sequence_parallel, tp_group
        )

    return forward


def _after(updates: DelayedUpdates, scaling: DelayedScaling) -> Callable[[], None]:
    return lambda: updates.after_backward(scaling)
