"""Rotary position embeddings: what a Hugging Face config says of them, and their frequencies.

megatron-core computes one kind with fixed constants (llama3) and another through attributes of its
config (yarn); here the frequencies of every kind are made, and build.py sets them in its modules.

Sources: llama3, Llama 3.1; yarn, Peng et al. 2023 (arXiv 2309.00071).
"""

import math
from dataclasses import dataclass
from typing import Any

from megaopd.errors import UserError

KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """One kind of rotary embedding; what a kind does not use keeps its neutral value."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0  # how much longer the context became
    low_freq: float = 1.0  # llama3
    high_freq: float = 4.0  # llama3
    original: int = 8192  # llama3, yarn: the context before it became longer
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the range of dimensions in whole numbers
    magnitude: float = 1.0  # yarn: cosine and sine are multiplied by it
    score_factor: float = 1.0  # yarn with multi-latent attention: the softmax scale is, too

    def frequencies(self, dim: int) -> Any:
        """[dim / 2] fp32: radians a position, of each pair of dimensions."""
        import torch

        plain = self.theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            turns = self.original * plain / (2 * math.pi)
            kept = ((turns - self.low_freq) / (self.high_freq - self.low_freq)).clamp(0, 1)
        elif self.kind == "yarn":
            kept = 1 - self._ramp(dim)
        else:
            return plain
        return kept * plain + (1 - kept) * plain / self.factor

    def _ramp(self, dim: int) -> Any:
        """[dim / 2]: 0 where the frequency stays, 1 where it is divided by the factor."""
        import torch

        def dimension(turns: float) -> float:
            return (
                dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            )

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        steps = torch.arange(dim // 2, dtype=torch.float32)
        return ((steps - low) / max(high - low, 0.001)).clamp(0, 1)


def read_rope(
    given: dict[str, Any], *, theta: float, max_positions: int, where: str, latent: bool = False
) -> Rope:
    """A config's rope_parameters (transformers 5) or rope_scaling.

    Args:
        theta: what the config says outside of `given`.
        latent: multi-latent attention, whose softmax scale yarn changes.

    Raises:
        UserError: a kind that is not computed here, or one that lacks numbers, by name.
    """
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in KINDS:
        raise UserError(
            f"{where}: rope scaling {kind}",
            expected="one of " + ", ".join(KINDS),
            fix="remove the scaling, where the model is to see no longer context than at first",
        )
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor={given['partial_rotary_factor']}",
            expected="all of a head's dimensions rotated",
        )
    theta = float(given.get("rope_theta") or theta)
    if kind == "default":
        return Rope(theta)
    needed = {"linear": ["factor"], "yarn": ["factor"]}.get(
        kind, ["factor", "low_freq_factor", "high_freq_factor"]
    )
    missing = [key for key in needed if not given.get(key)]
    if missing:
        raise UserError(
            f"{where}: rope scaling {given}", expected=f"{kind} with {', '.join(missing)}"
        )
    factor = float(given["factor"])
    original = int(given.get("original_max_position_embeddings") or max_positions)
    if kind == "linear":
        return Rope(theta, kind, factor)
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        return Rope(theta, kind, factor, low, high, original)
    return _yarn(given, theta, factor, original, latent)


def _yarn(given: dict[str, Any], theta: float, factor: float, original: int, latent: bool) -> Rope:
    mscale, mscale_all = given.get("mscale"), given.get("mscale_all_dim")
    magnitude = given.get("attention_factor")
    if magnitude is None:
        both = mscale and mscale_all
        magnitude = _mscale(factor, mscale) / _mscale(factor, mscale_all) if both else None
    return Rope(
        theta,
        "yarn",
        factor,
        original=original,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
        magnitude=float(magnitude if magnitude is not None else _mscale(factor, 1.0)),
        score_factor=_mscale(factor, mscale_all) ** 2 if latent and mscale_all else 1.0,
    )


def _mscale(factor: float, mscale: float | None) -> float:
    return 0.1 * (mscale or 0.0) * math.log(factor) + 1.0 if factor > 1 else 1.0
