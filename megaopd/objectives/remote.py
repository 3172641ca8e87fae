"""What a teacher on servers is asked for, and which objectives it cannot serve.

A server scores given tokens: it answers with log-probs, never with hidden states. So of METHODS
18's payloads it gives B, log-probs of a list of tokens at each position with the mass outside it,
and C, the sampled token's log-prob. Importable without torch.
"""

from megaopd.errors import UserError
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.objectives.validate import check_run, needs


def remote_payload(objective: ObjectiveConfig) -> str:
    """The least that suffices: "sampled" or "topk"; "hidden" where servers do not suffice."""
    enough = needs(objective).payloads
    return next((name for name in ("sampled", "topk") if name in enough), "hidden")


def check_remote(
    objective: ObjectiveConfig, *, log_probs: bool, top_ids: int | None = None
) -> None:
    """Refuse an objective that a teacher on servers, or the rest of the run, cannot serve.

    Args:
        log_probs: whether the samples carry the log-probs that they were drawn with.
        top_ids: how many of the student's most probable ids each position of a sample carries;
            None: the run decides later.

    Raises:
        UserError: what was given, what was expected, and why.
    """
    o = objective
    payload = remote_payload(o)
    if payload == "hidden":
        raise UserError(
            f"{_culprit(o)} with a teacher on servers",
            expected="a loss on a list of tokens or on the sampled token: a server gives log-probs "
            "of a few tokens, and this needs the teacher's whole law",
            fix="set objective.support and objective.k, take objective.loss=k2 or pg, or load the "
            "teacher beside the student (teacher.path)",
        )
    check_run(o, log_probs=log_probs, payload=payload)
    if o.needs_teacher and o.temperature != 1.0:
        raise UserError(
            f"objective.temperature = {o.temperature} with a teacher on servers",
            expected="1.0: servers score at temperature 1 whatever is asked, and log-probs of "
            "another one need a sum over the whole vocabulary",
            fix="set objective.temperature=1.0, or load the teacher beside the student",
        )
    if o.lists_of_student and top_ids is not None and top_ids < o.own_k:
        raise UserError(
            f"samples with {top_ids} of the student's most probable ids, and a loss on "
            f"{o.own_k} of them",
            expected=f"{o.own_k} ids at each position: the teacher is asked about those",
            fix=f"have the rollout engine report {o.own_k} ids (SamplingParams.top_ids), or set "
            "objective.support=teacher_topk",
        )


def _culprit(o: ObjectiveConfig) -> str:
    """The setting that needs the teacher's whole law."""
    if o.stats_k:
        return f"objective.stats_k = {o.stats_k}"
    if o.sinkd_coef:
        return f"objective.sinkd_coef = {o.sinkd_coef}"
    if o.target == "tempered":
        return "objective.target = tempered"
    if o.resolved_baseline:
        return f"objective.loss = {o.loss} with objective.baseline = {o.resolved_baseline}"
    return f"objective.loss = {o.loss}"
