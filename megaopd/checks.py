"""What of a whole configuration does not go together: of one section with another.

Part of schema.Config's own checks; each of these says got, expected and the fix.
"""

from typing import TYPE_CHECKING

from megaopd.errors import UserError
from megaopd.objectives.validate import needs

if TYPE_CHECKING:
    from megaopd.schema import Config


def check_reference(config: "Config") -> None:
    """A base model exactly where a target mixes one with the teacher."""
    wanted = config.objective.target in ("geometric", "linear")
    if wanted and (not config.reference.path or config.remote_teacher.addresses):
        raise UserError(
            f"objective.target = {config.objective.target} "
            + ("with a teacher on servers" if config.reference.path else "without reference.path"),
            expected="the whole law of the teacher and of a base model, beside the student",
            fix="set reference.path and teacher.path, or objective.target=teacher",
        )
    if config.reference.path and not wanted:
        raise UserError(
            f"reference.path = {config.reference.path} with objective.target = "
            f"{config.objective.target}",
            expected="no reference: it would be ignored",
            fix="set objective.target=geometric, or remove [reference]",
        )


def check_skills(config: "Config") -> None:
    """Skills are known when a step's samples are there: not to servers that score as they come."""
    if config.data.teacher_sees == "skill" and config.remote_teacher.addresses:
        raise UserError(
            "data.teacher_sees = skill with remote_teacher.addresses",
            expected="a teacher in this job: Skill-SD's is the student of the last step",
            fix="set teacher.kind=periodic teacher.sync_every=1, and remove [remote_teacher]",
        )


def check_teacher_mix(config: "Config") -> None:
    """A teacher that the embedded engine can hold a copy of, and weights for what it draws."""
    share, teacher, o = config.rollout.teacher_mix, config.teacher, config.objective
    if not share:
        return
    for wrong, fix in (
        (not config.on_policy and f"objective.loss = {o.loss}", "a loss on the student's samples"),
        (not teacher.path and "no teacher.path", "teacher.path"),
        (
            teacher.placement != "same" and f"teacher.placement = {teacher.placement}",
            "teacher.placement=same",
        ),
        (teacher.offload and "teacher.offload = true", "teacher.offload=false"),
        (
            config.data.teacher_sees and f"data.teacher_sees = {config.data.teacher_sees}",
            "data.teacher_sees=''",
        ),
        # Its weights of whole samples are those of the student's own.
        (o.rl == "dpg" and "objective.rl = dpg", "objective.rl=ppo"),
    ):
        if wrong:
            raise UserError(
                f"rollout.teacher_mix = {share} with {wrong}",
                expected="samples, and a frozen teacher beside the student that reads its prompts",
                fix=f"set {fix}, or rollout.teacher_mix=0",
            )
    losses = [o, *([o.at(o.second_from)] if o.second_loss else [])]
    if any(needs(one).ratio for one in losses) and o.tis != "token":
        raise UserError(
            f"rollout.teacher_mix = {share} with objective.tis = {o.tis}",
            expected="importance weights of each token: the sampled ones are not the student's own",
            fix="set objective.tis=token",
        )


def check_updates(config: "Config") -> None:
    """Several optimizer steps per rollout only of rollouts, and of equal parts of them."""
    trainer, prompts = config.trainer, config.rollout.prompts_per_step
    if trainer.updates > 1 and not config.on_policy:
        raise UserError(
            f"trainer.mini_batches = {trainer.mini_batches}, epochs = {trainer.epochs} with "
            f"objective.loss = {config.objective.loss}",
            expected="1 and 1: examples are no rollouts, and more steps on fewer of them are the "
            "same",
            fix="lower rollout.prompts_per_step and raise run.steps instead",
        )
    if prompts % trainer.mini_batches:
        raise UserError(
            f"trainer.mini_batches = {trainer.mini_batches} with rollout.prompts_per_step = "
            f"{prompts}",
            expected="a divisor: each part has whole prompts, and as many as the others",
            fix="set rollout.prompts_per_step="
            f"{-(-prompts // trainer.mini_batches) * trainer.mini_batches}",
        )


def check_term_norms(config: "Config") -> None:
    """Passes whose gradients are only measured must leave no trace in the run."""
    if config.trainer.term_norms_every and config.student.fp8 == "delayed":
        raise UserError(
            f"trainer.term_norms_every = {config.trainer.term_norms_every} with "
            "student.fp8 = delayed",
            expected="a recipe without a history: every pass enters it",
            fix="set student.fp8=current or blockwise, or trainer.term_norms_every=0",
        )


def check_mix(config: "Config") -> None:
    """Samples that a term looks at, and a term whose samples are there."""
    o, mix = config.objective, config.mix
    given = mix.source or mix.student_share < 1
    if not mix.student_share:
        check_answers(config)
    if o.loss == "sft":
        if given and (mix.source in ("", "answers") or mix.kind != "sft"):
            raise UserError(
                f"mix.source = {mix.source!r}, mix.kind = {mix.kind} with objective.loss = sft",
                expected="a file of `megaopd sample` to train on, or no [mix]",
                fix="remove [mix]: the data's answers are trained on without it",
            )
        return
    if given and o.tis != "off":
        raise UserError(
            f"[mix] with objective.tis = {o.tis}",
            expected="tis = off: samples of others have no log-probs of the student's engine",
            fix="set objective.tis=off",
        )
    if mix.student_share < 1 and o.returns:
        raise UserError(
            f"mix.student_share = {mix.student_share} with objective.returns = {o.returns}",
            expected="the student's own samples: returns are those of its own law",
            fix="remove objective.returns, or set mix.student_share=1",
        )
    if mix.student_share < 1 and not o.is_divergence:
        raise UserError(
            f"mix.student_share = {mix.student_share} with objective.loss = {o.loss}",
            expected="a divergence: an estimator needs the student's own samples",
            fix="set objective.loss=jsd, or mix.student_share=1",
        )
    if mix.source and mix.kind == "sft" and not o.sft_coef:
        raise UserError(
            f"mix.source = {mix.source} with objective.sft_coef = 0",
            expected="a term that looks at them",
            fix="set objective.sft_coef=1.0",
        )
    if mix.source not in ("", "answers") and not mix.per_step:
        raise UserError(
            f"mix.source = {mix.source} without mix.per_step",
            expected="how many of its responses join a step",
            fix="set mix.per_step=16",
        )
    if bool(o.replay) != (bool(mix.source) and mix.kind == "replay"):
        raise UserError(
            f"objective.replay = {o.replay!r} with mix.source = {mix.source!r}, mix.kind = "
            f"{mix.kind}",
            expected="both a term for replayed samples and such samples, or neither",
            fix="set objective.replay=dph_forward, mix.kind=replay and mix.source to a file of "
            "`megaopd sample` by the teacher",
        )


def check_answers(config: "Config") -> None:
    """Nothing that needs samples where the loss is taken on the data's answers alone."""
    o, wrong = config.objective, ""
    if o.needs_rewards:
        wrong = "rewards: objective." + ("rl" if o.rl else "only" if o.only else "weigh")
    elif config.mix.source:
        wrong = f"other responses: mix.source = {config.mix.source}"
    if wrong:
        raise UserError(
            f"mix.student_share = 0 with {wrong}",
            expected="a divergence on the data's answers alone: nothing is sampled or scored",
            fix="remove it, or raise mix.student_share",
        )
