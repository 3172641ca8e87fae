"""Numbers of whole sequences: what a token's policy gradient is weighted by.

With l_t = log p(y_t) - log q(y_t), all detached and at the weights that sampled y:

    reweighting      w_t = clip(2 sigmoid(z_t sign A), 1 - eps, 1 + eps), z_t the log-ratio less its
                     mean over the response, in its standard deviations           (OPSD in GRPO)
    returns          R_t = sum_{u > t} -l_u, or its mean over those u                    (MiniLLM)
    posterior        w = exp(log pi_0(y) - log p(y) + r / b), over its mean in the group  (GDC/DPG)

Reverse KL of whole sequences is the sum over tokens of the next token's KL, which is exact in the
token, and of a policy gradient on what the token brings about:

    grad KL(p(y)||q(y)) = E_p[ sum_t grad KL(p_t||q_t) - R_t grad log p(y_t) ]

The mean in place of the sum keeps long responses from outweighing short ones, and is no gradient of
that divergence any more. Forward KL to the posterior P(y) = pi_0(y) e^{r/b} / Z(x) is

    grad KL(P||p) = -E_p[ w grad log p(y) ] = -E_p[ (w - 1) grad log p(y) ],  w = P(y) / p(y)

where Z(x), one number a prompt, is estimated by the mean of the unnormalised w over the prompt's
own samples: biased by O(1/G) for G samples, and without a state. Nothing here communicates.

Shapes: n samples, L positions; N samples of a step. Sources: arXiv 2306.08543, 2205.11275.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RETURNS = ("mean", "sum")


def returns_to_go(log_ratio_nL: Tensor, mask_nL: Tensor, how: str) -> Tensor:
    """R [n, L] float64 of what follows each token, 0 where mask is 0 and at a sample's last token.

    Args:
        log_ratio_nL: log q(y_t) - log p(y_t).
        mask_nL: tokens that count; the others neither get nor give anything.
        how: one of RETURNS.
    """
    mask = mask_nL.bool()
    own = torch.where(mask, log_ratio_nL.double(), 0.0)
    after = _from_here_on(own) - own
    if how == "mean":
        count = mask.double()
        after = after / (_from_here_on(count) - count).clamp_min(1.0)
    return torch.where(mask, after, 0.0)


def posterior_weights(log_weight_N: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """w [N] float64: exp(log_weight) over its mean in each group of samples; 0 outside of them.

    Args:
        log_weight_N: log pi_0(y) - log p(y) + r / b.
        groups: places of the samples of each prompt.
    """
    found = torch.zeros_like(log_weight_N, dtype=torch.float64)
    for group in groups:
        places = torch.tensor(list(group), device=log_weight_N.device)
        found[places] = log_weight_N[places].double().softmax(0) * len(places)
    return found


def advantage_weights(
    log_ratio_nL: Tensor, mask_nL: Tensor, advantage_n: Tensor, clip: float
) -> Tensor:
    """w [n, L] float64, 1 where mask is 0, and where a response has no spread.

    Args:
        log_ratio_nL: log q(y_t) - log p(y_t).
        mask_nL: tokens that count.
        advantage_n: of whole samples; its sign turns the teacher's preference round.
    """
    mask = mask_nL.bool()
    own = torch.where(mask, log_ratio_nL.double(), 0.0)
    count = mask.sum(1, keepdim=True).clamp_min(1)
    centred = torch.where(mask, own - own.sum(1, keepdim=True) / count, 0.0)
    spread = (centred.square().sum(1, keepdim=True) / count).sqrt()
    z = torch.where(spread > 1e-8, centred / spread.clamp_min(1e-8), 0.0)
    weight = 2 * torch.sigmoid(z * advantage_n.double().sign()[:, None])
    return torch.where(mask, weight.clamp(1 - clip, 1 + clip), 1.0)


def _from_here_on(x_nL: Tensor) -> Tensor:
    return x_nL.flip(1).cumsum(1).flip(1)
