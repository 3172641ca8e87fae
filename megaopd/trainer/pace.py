"""How long each rank computes before it must wait for its replicas: who is slow, by name.

Ranks that work on one sequence (tensor, pipeline, context parallel) wait for one another in every
layer, so they show the same time: a slow GPU shows as a slow group against the other data-parallel
groups. The time ends where the gradients are summed over the replicas.
"""

import statistics
from typing import Any

from megaopd.parallel import gather_objects
from megaopd.platform import Stopwatch


class Pace:
    """Forward and backward of this rank's micro-batches, in seconds of the device.

    Args:
        config: the model's TransformerConfig, whose gradient reduction ends the time.
    """

    def __init__(self, config: Any) -> None:
        self._watch = Stopwatch()
        finalize = config.finalize_model_grads_func

        def stop_and_finalize(*args: Any, **kwargs: Any) -> Any:
            self._watch.stop()
            return finalize(*args, **kwargs)

        config.finalize_model_grads_func = stop_and_finalize

    def begin(self) -> None:
        """An update begins."""
        self._watch.start()

    def slowest(self) -> dict[str, float]:
        """pace/slowest_rank, and pace/slowest_ratio: its time over the median; a collective."""
        times = gather_objects(self._watch.seconds())
        worst = max(range(len(times)), key=times.__getitem__)
        ratio = times[worst] / max(statistics.median(times), 1e-9)
        return {"pace/slowest_rank": worst, "pace/slowest_ratio": ratio}
