"""What an objective does that is allowed and still likely to surprise."""

from megaopd.objectives.names import CLIPPED
from megaopd.objectives.spec import ObjectiveConfig


def warnings(
    objective: ObjectiveConfig,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    updates: int = 1,
    mixed: bool = False,
    answers: bool = False,
) -> list[str]:
    """What is allowed and still likely to surprise; temperature, top_p and top_k are the sampling
    law's.

    updates: optimizer steps per rollout.
    mixed: whether samples of others are there for objective.sft_coef. answers: whether the loss is
    taken on the data's answers alone.
    """
    o, found = objective, []
    if o.loss == "k3":
        found.append(
            "objective.loss = k3 has the value of reverse KL but the gradient of forward KL, "
            "KL(teacher || student); for reverse KL take k2, k3pp, k1_reward or pg"
        )
    if o.loss == "sinkd":
        found.append(
            "objective.loss = sinkd leaves open which token of a chunk has which law: without a "
            "loss on each token it need not learn; set objective.preset=sinkd, or "
            "objective.sinkd_coef beside fkl or rkl"
        )
    if o.variant == "unnorm":
        found.append(
            "objective.variant = unnorm is biased: it drives the student's mass out of the support"
        )
    if o.loss == "f_pg" and o.cap:
        found.append(f"objective.cap = {o.cap} makes the gradient of f_pg biased")
    if o.needs_teacher and (o.is_sampled or o.variant == "sampled_tail"):
        found += _law_warnings(o, temperature, top_p, top_k)
    if updates > 1 and o.loss in CLIPPED and not (o.clip_low and o.clip_high):
        found.append(
            f"objective.loss = {o.loss} without clip_low and clip_high follows its ratio to the "
            f"sampling weights wherever {updates} optimizer steps per rollout take it"
        )
    if updates == 1 and (o.clip_low or o.clip_high):
        found.append(
            "objective.clip_low and clip_high do nothing: with one optimizer step per rollout the "
            "ratio to the sampling weights is 1"
        )
    own = "on the student's own samples, whose likelihood has expected gradient 0 (sampling noise)"
    if answers:
        return found
    if o.sft_coef and not mixed:
        found.append(f"objective.sft_coef = {o.sft_coef} acts {own}")
    if o.target == "one_hot" and o.only != "right":
        found.append(f"objective.target = one_hot puts mass on labels that are {own}")
    return found


def _law_warnings(o: ObjectiveConfig, temperature: float, top_p: float, top_k: int) -> list[str]:
    what = f"objective.{'variant = sampled_tail' if o.is_divergence else f'loss = {o.loss}'}"
    law = []
    if temperature == 0:
        law.append("rollout.temperature = 0 samples nothing")
    elif temperature != 1.0 and o.tis == "off":
        law.append(f"rollout.temperature = {temperature} samples another law (see objective.tis)")
    if temperature != 0:
        law += [f"rollout.top_p = {top_p} never samples the rest"] * (top_p < 1)
        law += [f"rollout.top_k = {top_k} never samples the rest"] * (top_k > 0)
    return [
        f"{what} is unbiased for samples of the student's full law, but {text}: its gradient is "
        "biased; full and top-k divergences do not depend on this"
        for text in law
    ]
