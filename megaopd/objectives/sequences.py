"""What an objective asks of whole sequences, and where that is refused.

returns: the log-ratios of the tokens that follow; rl = dpg: the sample's weight under the posterior
that rewards make of the initial policy; rl_weigh: where in its response the teacher likes a token.
All are known before the update, from one forward pass of the student and one of the teacher
(trainer/sequences.py).
"""

from typing import TYPE_CHECKING

from megaopd.errors import UserError

if TYPE_CHECKING:
    from megaopd.objectives.spec import ObjectiveConfig

# Losses whose gradient is that of the next token's reverse KL: the returns complete it.
REVERSE = ("rkl", "k1_reward", "k2", "k3pp", "pg", "vopd")


def check_sequences(o: "ObjectiveConfig") -> None:
    """Refuse what the numbers of whole sequences cannot stand beside.

    Raises:
        UserError: what was given, what was expected, and why.
    """
    if o.returns:
        _check_returns(o)
    if o.rl == "dpg":
        _check_posterior(o)
    if not 0 < o.rl_weigh_clip < 1:
        raise UserError(
            f"objective.rl_weigh_clip = {o.rl_weigh_clip}",
            expected="above 0 and below 1: how far from 1 the factor of an advantage may go",
            fix="set objective.rl_weigh_clip=0.2",
        )


def _check_returns(o: "ObjectiveConfig") -> None:
    if o.loss not in REVERSE or o.second_loss not in ("", *REVERSE):
        wrong = o.loss if o.loss not in REVERSE else o.second_loss
        raise UserError(
            f"objective.returns = {o.returns} with objective.loss = {wrong}",
            expected=f"one of {', '.join(map(repr, REVERSE))}: the returns are the part of reverse "
            "KL that the next token's leaves out",
            fix="set objective.loss=rkl, or remove objective.returns",
        )
    if o.temperature != 1.0 or o.target != "teacher":
        raise UserError(
            f"objective.returns = {o.returns} with objective.temperature = {o.temperature}, "
            f"objective.target = {o.target}",
            expected="temperature 1 and the teacher itself: the returns are log-probs of sampled "
            "tokens under the two models' own laws",
            fix="set objective.temperature=1.0 and objective.target=teacher",
        )


def _check_posterior(o: "ObjectiveConfig") -> None:
    if not o.reward_scale > 0:
        raise UserError(
            f"objective.reward_scale = {o.reward_scale}",
            expected="above 0: the posterior is proportional to initial x exp(reward / scale)",
            fix="set objective.reward_scale=0.05",
        )
    if o.distils:
        raise UserError(
            f"objective.rl = dpg with objective.loss = {o.loss}",
            expected="loss = none: the teacher is the initial policy, of which the posterior is "
            "made, and forward KL to the posterior is the whole objective",
            fix="set objective.loss=none, or objective.rl=ppo",
        )
