"""From loss masks to token weights: a reduction, decided before the first micro-batch.

The loss of an optimizer step is sum_t w_t L_t over every token of every micro-batch and
data-parallel rank, and nothing is divided afterwards. So the caller passes the masks of ALL samples
of the step, and hands each micro-batch its rows of the result.

Shapes: N samples, S positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megaopd.errors import UserError

LOSS_AGG = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def loss_weights(
    loss_mask: Sequence[Tensor] | Tensor,
    *,
    loss_agg: str = "token-mean",
    sample_weights: Tensor | None = None,
    max_length: int | None = None,
    num_samples: int | None = None,
    denominator: float | None = None,
) -> Tensor:
    """Weights [N, S] in fp32 with which the token losses of a step are summed.

    With m the mask, n_i = sum_t m_it, N the number of samples (or num_samples):
      token-mean               m_it / sum_jt m_jt      (denominator replaces the sum)
      seq-mean-token-mean      m_it / (N n_i)
      seq-mean-token-sum       m_it / N
      seq-mean-token-sum-norm  m_it / (N max_length)
    sample_weights [N] multiplies the rows and does not enter a denominator. A sample without tokens
    has weight 0 and still counts in N. A step without tokens gives zeros.

    loss_mask: [N, S] of 0/1, or a list of N vectors, padded on the right with 0.
    Raises UserError for an unknown loss_agg and for an option that this loss_agg does not use.
    """
    _check(loss_agg, max_length, num_samples, denominator)
    mask = _padded(loss_mask)
    tokens = mask.sum(1, keepdim=True)
    samples = num_samples if num_samples is not None else mask.shape[0]
    if loss_agg == "token-mean":
        bottom = tokens.sum() if denominator is None else tokens.new_tensor(denominator)
    elif loss_agg == "seq-mean-token-mean":
        bottom = tokens * samples
    elif loss_agg == "seq-mean-token-sum":
        bottom = tokens.new_tensor(samples)
    else:
        bottom = tokens.new_tensor(samples * (max_length or 0))
    weights = torch.where(mask > 0, mask / bottom, 0.0)
    if sample_weights is not None:
        if sample_weights.shape != mask.shape[:1]:
            raise UserError(
                f"sample_weights of shape {list(sample_weights.shape)}",
                expected=f"[{mask.shape[0]}], one number a sample",
                fix="repeat a per-prompt weight for each of its samples",
            )
        weights = weights * sample_weights.to(weights)[:, None]
    return weights.float()


def _check(
    loss_agg: str, max_length: int | None, num_samples: int | None, denominator: float | None
) -> None:
    if loss_agg not in LOSS_AGG:
        raise UserError(
            f"loss_agg={loss_agg!r}",
            expected="one of " + ", ".join(map(repr, LOSS_AGG)),
            fix="'token-mean' is the default",
        )
    norm, mean = loss_agg == "seq-mean-token-sum-norm", loss_agg == "token-mean"
    used = {"max_length": norm, "num_samples": not mean, "denominator": mean}
    values = {"max_length": max_length, "num_samples": num_samples, "denominator": denominator}
    for name, value in values.items():
        if value is not None and not used[name]:
            raise UserError(
                f"{name}={value} with loss_agg={loss_agg!r}",
                expected=f"no {name}: this reduction does not use it",
                fix=f"remove {name} or choose another loss_agg",
            )
        if value is not None and not value > 0:
            raise UserError(f"{name}={value}", expected="a number > 0", fix=f"set {name} > 0")
    if norm and max_length is None:
        raise UserError(
            "loss_agg='seq-mean-token-sum-norm' without max_length",
            expected="the constant that sums are divided by",
            fix="pass max_length, for instance the longest response allowed",
        )


def _padded(loss_mask: Sequence[Tensor] | Tensor) -> Tensor:
    """[N, S] of 0.0 and 1.0 in fp64: exact counts whatever the number of tokens."""
    if isinstance(loss_mask, Tensor):
        mask = loss_mask
    elif loss_mask:
        mask = torch.nn.utils.rnn.pad_sequence(list(loss_mask), batch_first=True)
    else:
        mask = torch.zeros(0, 0)
    if mask.dim() != 2:
        raise UserError(
            f"loss_mask of shape {list(mask.shape)}", expected="[N, S]", fix="one row a sample"
        )
    return mask.ne(0).double()
