"""Alarms on the metrics of a run: signs that an objective does something other than it should."""

from collections.abc import Callable, Mapping, Sequence

Metrics = Mapping[str, float]

MASS_FALL = 0.15
LEAST_ESS = 0.5
MOST_K3 = 0.05  # bf16 engines measure below 1e-3


def _mass_fell(first: Metrics, now: Metrics) -> str:
    name = "mass_student"
    if name not in first or name not in now or first[name] - now[name] <= MASS_FALL:
        return ""
    return (
        f"the student's mass on the support fell from {first[name]:.2f} to {now[name]:.2f}: it "
        "moves to tokens that the loss does not see, as with the biased variant unnorm"
    )


def _few_samples(first: Metrics, now: Metrics) -> str:
    ess = min(now.get("tis/ess", 1.0), now.get("rollout_ess", 1.0))
    if ess >= LEAST_ESS:
        return ""
    return (
        f"importance weights leave {ess:.2f} of the samples' worth: engine and trainer disagree "
        "on the sampled tokens"
    )


def _engine_strays(first: Metrics, now: Metrics) -> str:
    k3 = now.get("rollout_k3", 0.0)
    if k3 <= MOST_K3:
        return ""
    return (
        f"k3 between the engine's and the trainer's log-probs is {k3:.3g}: tokens were sampled by "
        "much older weights (rollout.staleness), or by weights that are not this run's"
    )


# name -> rule: (first step's metrics, this step's) -> what is wrong, or "".
ALARMS: dict[str, Callable[[Metrics, Metrics], str]] = {
    "mass_student": _mass_fell,
    "ess": _few_samples,
    "rollout_k3": _engine_strays,
}


def new_alarms(history: Sequence[Metrics]) -> dict[str, str]:
    """Alarms by name that the last step raises and none before it did: each once a run.

    history: the metrics of every step so far, in order.
    """
    if not history:
        return {}
    first, found = history[0], {}
    for name, rule in ALARMS.items():
        text = rule(first, history[-1])
        if text and not any(rule(first, earlier) for earlier in history[:-1]):
            found[name] = text
    return found
