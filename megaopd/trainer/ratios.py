"""How far the student has gone from the weights that sampled, as clipped policy gradients see it.

Shapes: T the rows of a micro-batch that the loss looks at.
"""

from collections.abc import Mapping
from typing import Any

from megaopd.losses.importance import bounded_exp
from megaopd.losses.sampled import unclipped
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.trainer.batch import MicroBatch

RATIO_SUMS = ("ratio_clipped", "ratio_k3")


def watches_ratio(objective: ObjectiveConfig) -> bool:
    """Whether a term of it clips a ratio. At another temperature the pass has other log-probs."""
    clips = objective.loss == "pg" and (objective.clip_low or objective.clip_high)
    return bool(objective.rl or clips) and objective.temperature == 1.0


def ratio_rows(
    objective: ObjectiveConfig, micro: MicroBatch, rows: Mapping[str, Any]
) -> dict[str, Any]:
    """[T] each: 1 where the clip takes a token's slope, and k3 of the old law from the new one.

    rows: student_log_prob [T], and teacher_log_prob where there is a teacher. Of `rl` where both it
    and the loss clip.
    """
    import torch

    if not watches_ratio(objective) or "student_log_prob" not in rows:
        return {}
    o, log_p = objective, rows["student_log_prob"].double()
    old = log_p if micro.old_log_probs_T is None else micro.old_log_probs_T.double()
    diff = log_p - old  # 0 where nothing has moved yet
    found = {"ratio_k3": bounded_exp(diff) - 1 - diff}
    if o.rl:
        none = micro.advantage_T is None
        advantage = torch.zeros_like(diff) if none else micro.advantage_T.double()
        bounds = (1 - o.rl_clip_low, 1 + o.rl_clip_high, o.dual_clip)
        if o.rl == "trrd":
            diff = log_p - o.mix * old - (1 - o.mix) * rows["teacher_log_prob"].double()
    else:
        advantage = rows["teacher_log_prob"].double() - old
        bounds = (1 - (o.clip_low or torch.inf), 1 + (o.clip_high or torch.inf))
    cut = ~unclipped(bounded_exp(diff), advantage, *bounds) & (advantage != 0)
    return {**found, "ratio_clipped": cut.double()}
