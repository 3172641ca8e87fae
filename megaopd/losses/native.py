"""The passes of blocks.py by fused kernels (losses/kernels/), behind the same interface.

A kernel reads each logit once a pass and keeps nothing in between: the gradient is made anew from
the logits, so neither buffer is overwritten before it. It comes out complete (scale None).

Shapes: C rows, Vp local ids (padding already sliced off); row vectors [C].
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megaopd.losses.blocks import Blocks, Coefs, Norm
from megaopd.losses.divergences import KINDS
from megaopd.losses.kernels import native
from megaopd.losses.plan import Plan
from megaopd.losses.terms import Divergence


def make_blocks(
    plan: Plan, s: Tensor, t: Tensor | None, want_grad: bool, head_max: Sequence[Tensor] | None
) -> "Blocks | NativeBlocks":
    """The fastest backend for these buffers."""
    ops = native(s) if plan.fused else None
    if ops is not None:
        return NativeBlocks(ops, plan, s, t, want_grad)
    program = plan.program if want_grad else "none"
    unit = len(plan.terms) == 1
    return Blocks(s, t, program, plan.complete and want_grad, unit, head_max)


class NativeBlocks:
    """moments, divergence_sums and gradient on one chunk; see Blocks for what they return."""

    def __init__(
        self,
        ops: ModuleType,
        plan: Plan,
        s: Tensor,
        t: Tensor | None,
        want_grad: bool,
    ) -> None:
        self.ops, self.s, self.t = ops, s, t
        self.scaling: dict[str, Any] = {}
        if plan.inline:
            self.scaling = {"softcap": plan.softcap, "inv_temperature": 1.0 / plan.temperature}
        term = plan.terms[0] if plan.terms else None  # none: statistics alone
        # One pass for all, where the kernels have it and no other shard or term takes part.
        fused = want_grad and plan.complete and hasattr(ops, "complete_") and term.kind in KINDS  # pyright: ignore
        self.whole = term if fused and isinstance(term, Divergence) else None
        self.zero = plan.program == "zero"
        self._values: Tensor | None = None
        self.offsets = s.new_empty(0)

    def moments(self, names: Sequence[str]) -> Tensor:
        if self.s.shape[1] == 0:
            laws = 1 if self.t is None else 2
            shape = (laws, self.s.shape[0])
            self.offsets = self.s.new_full(shape, -torch.inf, dtype=torch.float32)
            return self.offsets.new_zeros(len(names), self.s.shape[0])
        if self.whole is not None:
            term = self.whole
            self.offsets, sums, self._values = self.ops.complete_(
                self.s, self.t, term.kind, term.parameter, names
            )
            return sums
        self.offsets, sums = self.ops.local_moments(self.s, self.t, names, **self.scaling)
        return sums

    def divergence_sums(self, norm: Norm, coefs: Coefs) -> Tensor:
        if self._values is not None:
            return torch.stack([self._values, torch.zeros_like(self._values)])
        return self.ops.divergence_sums(self.s, self.t, _tuple(norm), coefs.parts, **self.scaling)

    def gradient(self, norm: Norm, coefs: Coefs) -> tuple[Tensor, Tensor | None]:
        if self.zero or self.s.shape[1] == 0:
            return self.s.zero_(), None
        if self.whole is None:
            self.ops.gradient_(
                self.s,
                self.t,
                _tuple(norm),
                p_coef=coefs.p,
                pd_coef=coefs.pd,
                px_coef=coefs.px,
                q_coef=coefs.q,
                parts=coefs.parts,
                **self.scaling,
            )
        return self.s, None


def _tuple(norm: Norm) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return norm.m_s, norm.log_z_s, norm.m_t, norm.log_z_t
