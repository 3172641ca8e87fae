"""The chunk loop of fused_head.py as one autograd function, and where its gradients go.

Shapes: T tokens, C rows of a chunk, R tensor-parallel ranks, H hidden, Vp = V/R local ids, n terms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.chunk import Batch, Listed
from megaopd.losses.engine import Engine
from megaopd.losses.vocab_parallel import all_gather_rows, group_size, start_sum_rows

LISTED_ELEMENTS = 1 << 20  # of the products over a list that exist at once


@dataclass(frozen=True)
class Law:
    """hidden [T, Ht], weight [Vp, Ht], bias [Vp] or None of one model."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class HeadPass:
    """All that is not differentiated: the engine, frozen models, weights [n, T], labels, inputs.

    A chunk seen as [ranks, T/ranks] is a range of columns: all of one row without sequence
    parallel, the same slice of every rank's rows with it. One spelling serves both.
    """

    engine: Engine
    ranks: int
    want_grad: bool
    into_main_grad: bool
    laws: tuple[Law | None, ...]
    weights: Tensor
    labels: Tensor | None
    inputs: Mapping[str, Tensor]

    @property
    def group(self) -> Any:
        return self.engine.shard.group

    def chunks(self, local_rows: int) -> list[slice]:
        step = max(1, self.engine.chunk_size // self.ranks)
        if self.engine.coupled and local_rows:  # a chunk of few rows would be another loss
            step = -(-local_rows // -(-local_rows // step))
        return [slice(a, min(a + step, local_rows)) for a in range(0, local_rows, step)]

    def take(self, full: Tensor, rows: slice) -> Tensor:
        """full [..., T] -> [..., C]."""
        view = full.unflatten(-1, (self.ranks, full.shape[-1] // self.ranks))
        return view[..., rows].flatten(-2)

    def put(self, full: Tensor, rows: slice, chunk: Tensor) -> None:
        """full [..., T], chunk [..., C]."""
        view = full.view(*full.shape[:-1], self.ranks, full.shape[-1] // self.ranks)
        view[..., rows] = chunk.unflatten(-1, (self.ranks, rows.stop - rows.start))

    def gather(self, local: Tensor, rows: slice) -> Tensor:
        return all_gather_rows(local[rows], self.group) if self.ranks > 1 else local[rows]


def fused_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, passed: HeadPass
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, per-token values [n, T], statistics by name)."""
    stats: dict[str, Tensor] = {}
    if passed.into_main_grad and passed.want_grad and weight.requires_grad:
        _check_main_grad(weight)
    loss, values = _FusedHead.apply(hidden, weight, bias, passed, stats)
    return loss, values, stats


def _check_main_grad(weight: Tensor) -> None:
    main = getattr(weight, "main_grad", None)
    if main is None or main.shape != weight.shape:
        shape = None if main is None else list(main.shape)
        raise UserError(
            f"into_main_grad with weight.main_grad {shape}",
            expected=f"a buffer of shape {list(weight.shape)}",
            fix="wrap the model in Megatron's DistributedDataParallel, or leave into_main_grad off",
        )


class _Head:
    """One model's output layer: logits of a chunk in a buffer that is made once."""

    def __init__(self, law: Law, engine: Engine, rows: int, dtype: torch.dtype) -> None:
        self.hidden = law.hidden
        self.weight = law.weight[: engine.shard.valid]
        self.bias = None if law.bias is None else law.bias[: engine.shard.valid]
        self.buffer = torch.empty(rows, engine.shard.valid, dtype=dtype, device=law.weight.device)

    def logits(self, hidden_CH: Tensor) -> Tensor:
        out = self.buffer[: hidden_CH.shape[0]]
        hidden_CH = hidden_CH.to(self.weight.dtype)
        if self.weight.dtype == out.dtype:
            torch.mm(hidden_CH, self.weight.t(), out=out)
        else:
            out.copy_(hidden_CH @ self.weight.t())
        return out if self.bias is None else out.add_(self.bias)


class _Gradients:
    """Gradients of hidden states, weight and bias, accumulated chunk by chunk; None: not needed."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, passed: HeadPass, need: tuple[bool, ...]
    ) -> None:
        self.passed, self.source = passed, weight[: passed.engine.shard.valid]
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.hidden = torch.empty_like(hidden) if need[0] else None
        self.weight, self.main = None, None
        if need[1] and passed.into_main_grad:
            self.main = weight.main_grad  # pyright: ignore[reportAttributeAccessIssue]
        elif need[1]:
            # Not zeroed: the first chunk writes it.
            self.weight = torch.empty_like(weight, dtype=wide)
            self.weight[passed.engine.shard.valid :] = 0
        self._written = self.weight is None
        self.bias = weight.new_zeros(weight.shape[0], dtype=wide) if need[2] else None
        self._work: Any = None
        self._flight: tuple[Tensor, Tensor, slice] | None = None

    def add(self, grad: Tensor, scale: Tensor | None, hidden_CH: Tensor, rows: slice) -> None:
        """grad [C, Vp] * scale [C] is d loss / d logits.

        The factor goes where it is cheapest: to the [C, H] side of the products in fp32, into the
        cast that a narrower weight needs anyway.
        """
        weight = self.source
        if self.bias is not None:
            ones = torch.ones_like(grad[:, 0]) if scale is None else scale
            self.bias[: weight.shape[0]] += torch.mv(grad.t(), ones.to(grad.dtype))
        if grad.dtype != weight.dtype:
            grad = (grad if scale is None else grad.mul_(scale[:, None])).to(weight.dtype)
            scale = None
        if self.hidden is not None:
            dh = grad @ weight
            self._send(dh if scale is None else dh.mul_(scale[:, None]), rows)
        target = self.main if self.main is not None else self.weight
        if target is not None:
            own = target[: weight.shape[0]]
            hidden_CH = hidden_CH.to(weight.dtype)
            if scale is not None:
                hidden_CH = (hidden_CH * scale[:, None]).to(weight.dtype)
            if not self._written and own.dtype == weight.dtype:
                torch.mm(grad.t(), hidden_CH, out=own)
                self._written = True
            elif own.dtype == weight.dtype:
                own.addmm_(grad.t(), hidden_CH)
            else:
                self._zero()
                own.add_(grad.t() @ hidden_CH)

    def add_listed(
        self, grad: Listed, scale: Tensor | None, hidden_CH: Tensor, rows: slice
    ) -> None:
        """The same where dz is 0 but on a list: products over K columns instead of Vp."""
        values = grad.values if scale is None else grad.values * scale[:, None]
        if self.bias is not None:
            self.bias.index_add_(0, grad.columns.flatten(), values.flatten())
        if self.hidden is not None:
            weights = values.to(self.source.dtype)
            dh = F.embedding_bag(grad.columns, self.source, mode="sum", per_sample_weights=weights)
            self._send(dh, rows)
        self._zero()
        target = self.main if self.main is not None else self.weight
        if target is not None:
            step = max(1, LISTED_ELEMENTS // (values.shape[1] * hidden_CH.shape[1]))
            for a in range(0, values.shape[0], step):
                part = slice(a, a + step)
                outer = values[part, :, None] * hidden_CH[part, None, :].to(values.dtype)
                target.index_add_(
                    0, grad.columns[part].flatten(), outer.flatten(0, 1).to(target.dtype)
                )

    def _send(self, dh: Tensor, rows: slice) -> None:
        """Sums the hidden gradient over the group while the next chunk is computed."""
        assert self.hidden is not None
        self.wait()
        group = self.passed.group
        if group_size(group) == 1:
            self.hidden[rows] = dh
            return
        self._work, result = start_sum_rows(dh, group, scatter=self.passed.ranks > 1)
        self._flight = (result, dh, rows)  # dh must outlive the collective

    def _zero(self) -> None:
        if not self._written and self.weight is not None:
            self.weight.zero_()
        self._written = True

    def finish(self) -> None:
        self.wait()
        self._zero()

    def wait(self) -> None:
        if self._work is not None and self._flight is not None and self.hidden is not None:
            self._work.wait()
            self.hidden[self._flight[2]] = self._flight[0]
        self._work = self._flight = None


class _FusedHead(torch.autograd.Function):
    """Losses and gradients in forward; backward is a multiplication by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        passed: HeadPass,
        stats: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        engine, chunks = passed.engine, passed.chunks(hidden.shape[0])
        dtype = engine.logits_dtype(weight)
        rows = passed.ranks * max((c.stop - c.start for c in chunks), default=0)
        laws = (Law(hidden, weight, bias), *passed.laws)
        heads = [None if law is None else _Head(law, engine, rows, dtype) for law in laws]
        need = tuple(passed.want_grad and n for n in ctx.needs_input_grad[:3])
        grads = _Gradients(hidden, weight, passed, need)
        values = torch.empty_like(passed.weights)
        for c in chunks:
            h = passed.gather(hidden, c)
            logits = [
                None if x is None else x.logits(passed.gather(x.hidden, c)) for x in heads[1:]
            ]
            assert heads[0] is not None
            s = heads[0].logits(h)
            batch = Batch(
                None if passed.labels is None else passed.take(passed.labels, c),
                {name: passed.take(x, c) for name, x in passed.inputs.items()},
            )
            weights = passed.take(passed.weights, c)
            value, found, dz, scale = engine.run(s, *logits, batch, weights, any(need))  # pyright: ignore
            passed.put(values, c, value)
            for name, x in found.items():
                passed.put(stats.setdefault(name, torch.empty_like(values[0])), c, x)
            if isinstance(dz, Listed):
                grads.add_listed(dz, scale, h, c)
            elif dz is not None:
                grads.add(dz, scale, h, c)
        grads.finish()
        # Not saved_tensors: backward scales them in place, so as not to hold two weight gradients.
        ctx.grads = [grads.hidden, grads.weight, grads.bias]
        ctx.weight, ctx.main_grad = weight, grads.main is not None
        ctx.mark_non_differentiable(values)
        ctx.set_materialize_grads(False)
        # A masked token may have an infinite value: 0 * inf must be 0. (Its hidden state must be
        # finite all the same: a NaN would reach the weight gradient through the products.)
        loss = torch.where(passed.weights == 0, 0.0, passed.weights * values).sum()
        return loss, values

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, weight = upstream[0], ctx.weight
        if scale is None:
            return (None,) * 5
        if ctx.grads is None:
            raise RuntimeError("a fused loss gives its gradients once: backward() was called twice")
        # Always multiplied: asking whether the scale is 1 would wait for the device.
        out = [None if x is None else x.mul_(scale) for x in ctx.grads]
        ctx.grads = None
        out[1:] = [None if x is None else x.to(weight.dtype) for x in out[1:]]
        if ctx.main_grad:
            out[1] = _main_grad_dummy(weight, scale)
        return (*out, None, None)


def _main_grad_dummy(weight: Tensor, scale: Tensor) -> Tensor | None:
    """What autograd is given for a weight whose gradient is already in main_grad.

    Megatron's hooks want a param.grad, and do not read it where grad_added_to_main_grad is set, so
    memory that nobody writes will do. They do read that of a tied embedding (zero_out_wgrad), which
    adds its own gradient to it: zeros. Other weights have no hooks and get nothing.
    """
    message = "the fused loss wrote weight.main_grad in forward: its upstream gradient must be 1"
    torch._assert_async((scale == 1).all(), message)  # pyright: ignore[reportPrivateImportUsage]
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    if getattr(weight, "zero_out_wgrad", False):
        return weight.new_zeros(1, 1).expand_as(weight)
    return torch.empty_like(weight)
