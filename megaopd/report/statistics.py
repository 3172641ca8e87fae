"""Figures with intervals, of what a model answered. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist, fmean

RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """A mean over prompts with its 95% interval."""

    value: float
    low: float
    high: float
    prompts: int  # that it is a mean of


def figure(values: Sequence[float], *, seed: int = 0) -> Figure:
    """The mean of one value a prompt, with its interval.

    Of values that are all 0 or 1 Wilson's; of others the percentile bootstrap over prompts, which
    are what is drawn again, because the samples of one prompt are not independent.
    """
    import numpy as np

    assert values, "a figure of nothing"
    if set(values) <= {0.0, 1.0}:
        return Figure(fmean(values), *wilson(int(sum(values)), len(values)), len(values))
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Figure(float(array.mean()), float(low), float(high), len(array))


def wilson(solved: int, count: int) -> tuple[float, float]:
    """The 95% score interval of a share, solved / count (Wilson 1927).

    Where all or none are solved it still has a width; the bootstrap's has none.
    """
    z = NormalDist().inv_cdf(0.975)
    share, shrink = solved / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / shrink
    half = z * sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / shrink
    return max(centre - half, 0.0), min(centre + half, 1.0)


def reward_columns(rewards: Sequence[float | None]) -> dict[str, list[float]]:
    """A value for each response: its reward (`accuracy`), and 1 where it has none (`unscored`).

    Of responses that could be scored. An episode that failed has no reward and counts as 0: without
    it the others' mean would be too high. `unscored` is there only where one is missing; {} of
    responses without any reward.
    """
    missing = [float(reward is None) for reward in rewards]
    if all(missing):
        return {}
    found = {"accuracy": [reward or 0.0 for reward in rewards]}
    return found | ({"unscored": missing} if any(missing) else {})


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Probability that k of a prompt's samples, drawn without replacement, hold a solved one.

    1 - C(n - c, k) / C(n, k): unbiased for pass@k of the model, where 1 - (1 - c/n)^k is not
    (Chen et al. 2021, arXiv 2107.03374).
    """
    assert 0 <= solved <= samples and 1 <= k <= samples, (samples, solved, k)
    return 1.0 - comb(samples - solved, k) / comb(samples, k)


def repetition(token_ids: Sequence[int], n: int = 3) -> float:
    """Share of a response's n-grams that stood in it before; 0 where it is shorter than n."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def by_prompt(values: Sequence[float], per_prompt: int) -> list[float]:
    """Means of `per_prompt` consecutive values."""
    assert len(values) % per_prompt == 0
    return [fmean(values[i : i + per_prompt]) for i in range(0, len(values), per_prompt)]
