"""Everything that a run needs, read, checked and built before anything is trained."""

from megaopd.data.prompts import PromptStream
from megaopd.errors import UserError
from megaopd.inputs import checked_models, eos_ids, held_out, reference_model
from megaopd.mixing import Mixture
from megaopd.models.arch import padded_vocab
from megaopd.parallel import make_grid
from megaopd.parts import Parts
from megaopd.sampler import make_sampler
from megaopd.schema import Config
from megaopd.trainer.remote_teacher import RemoteTeacher
from megaopd.trainer.student import Student
from megaopd.trainer.teacher import Teacher
from megaopd.trainer.teachers.build import make_router, make_teacher
from megaopd.worlds import Bridge


def build_parts(config: Config, *, training: bool = True, bridge: Bridge | None = None) -> Parts:
    """Read, check and build everything that a run needs; a collective.

    Args:
        bridge: to the teacher's own ranks (`teacher_ranks`).
        training: open the run directory and resume; otherwise the student is only evaluated.

    Raises:
        UserError: any input that does not fit, before weights are loaded.
    """
    tokenizer, arch, frozen = checked_models(config)
    base = reference_model(config, tokenizer)
    archs = [arch, *(a for _, a in frozen.values()), *([base] if base is not None else [])]
    prompts = PromptStream(config.data, tokenizer)
    if config.teacher.kind == "previous_epoch" and not prompts.size:
        raise UserError(
            f"teacher.kind = previous_epoch with the endless prompts of {config.data.source}",
            expected="prompts that come again",
            fix="set data.num_prompts, or teacher.kind=periodic",
        )
    grid = make_grid(config.parallel, seed=config.run.seed + 1234)
    vocab = min(a.vocab for a in archs)
    rows = max(padded_vocab(a.vocab, grid.tp_size, config.student.vocab_multiple) for a in archs)
    student = Student(
        config.student,
        arch,
        grid,
        config.objective,
        config.optim if training else None,
        total_steps=config.run.steps,
        vocab=vocab,
        vocab_rows=rows,
        lora=config.lora,
    )
    teacher = make_teacher(
        config.teacher, config.teacher_parallel, frozen, grid, student, config.student, bridge
    )
    reference = None
    if base is not None:
        reference = Teacher(
            config.reference,
            base,
            grid,
            offload=config.reference.offload,
            vocab_rows=student.vocab_rows,
        )
    remote = None
    if config.remote_teacher.addresses:
        remote = RemoteTeacher(config.remote_teacher, config.objective, grid, tokenizer=tokenizer)
    parts = Parts(
        config=config,
        grid=grid,
        tokenizer=tokenizer,
        eos_ids=eos_ids(config, tokenizer),
        prompts=prompts,
        student=student,
        teacher=teacher,
        reference=reference,
        router=make_router(config.teachers),
        remote=remote,
        sampler=make_sampler(
            config, grid, tokenizer, prompts, student, teacher, remote, training=training
        ),
        training=training,
        held_out=held_out(config, tokenizer),
        mixture=Mixture(config, tokenizer, vocab, training=training),
    )
    if training:
        parts.start()
    return parts
