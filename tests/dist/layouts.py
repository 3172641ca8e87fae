"""Trajectories of a small student under any layout, for tests and tools/layout_table.py."""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tests.dist.models import VOCAB, save_tiny

STEPS = 4


class Layout(NamedTuple):
    world: int
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    distributed: bool = True  # the optimizer's state
    context: int = 1
    virtual: int = 1
    expert: int = 1
    tokens: int = 0  # of a packed row; 0: padded samples
    samples: int = 2  # of a padded micro-batch


SINGLE = Layout(1, distributed=False)
# An objective with every family: the loss on wrong samples, a policy gradient, samples of others.
MIXED = {
    "loss": "k2", "only": "wrong", "coef": 0.5, "coef_end": 0.1, "coef_steps": 3, "rl": "ppo",
    "sft_coef": 0.3, "replay": "dph_js", "replay_coef": 0.2, "entropy_coef": 0.1,
}  # fmt: skip
LAYOUTS = {
    "one-by-one": Layout(1, distributed=False, samples=1),  # the same rank in another order
    "tp2": Layout(2, tensor=2, distributed=False),
    "tp2-sp": Layout(2, tensor=2, sequence=True),
    "pp2": Layout(2, pipeline=2, distributed=False),
    "dp2-zero1": Layout(2),
    "tp2-pp2-sp-zero1": Layout(4, tensor=2, pipeline=2, sequence=True),
    "tp2-dp2-sp-zero1": Layout(4, tensor=2, sequence=True),
    "pp2-dp2-zero1": Layout(4, pipeline=2),
    "cp2": Layout(2, context=2),
    "cp2-plain": Layout(2, context=2, distributed=False),
    "cp4": Layout(4, context=4),
    "cp2-tp2": Layout(4, context=2, tensor=2),
    "cp2-tp2-sp": Layout(4, context=2, tensor=2, sequence=True),
    "cp2-pp2": Layout(4, context=2, pipeline=2),
    "cp2-dp2": Layout(4, context=2),
    "pp2-vpp2": Layout(2, pipeline=2, virtual=2),
    "pp2-vpp2-tp2-sp": Layout(4, pipeline=2, virtual=2, tensor=2, sequence=True),
    "pp2-vpp2-cp2": Layout(4, pipeline=2, virtual=2, context=2),
    "packed": Layout(1, tokens=32),
    "packed-tp2-sp": Layout(2, tensor=2, sequence=True, tokens=32),
    "packed-pp2": Layout(2, pipeline=2, tokens=32),
    "packed-cp2": Layout(2, context=2, tokens=32),
    "packed-dp2": Layout(2, tokens=32),
    "packed-cp2-tp2-sp": Layout(4, context=2, tensor=2, sequence=True, tokens=40),
    "packed-pp2-vpp2-dp2": Layout(4, pipeline=2, virtual=2, tokens=32),
    "packed-cp2-pp2": Layout(4, context=2, pipeline=2, tokens=32),
}

# Of a mixture of experts.
EXPERT_LAYOUTS = {
    "ep2": Layout(2, expert=2),
    "ep2-plain": Layout(2, expert=2, distributed=False),
    "ep2-tp2-sp": Layout(2, expert=2, tensor=2, sequence=True),
    "ep4-tp2-dp2-sp": Layout(4, expert=4, tensor=2, sequence=True),
    "ep2-dp4": Layout(4, expert=2),
    "ep2-pp2": Layout(4, expert=2, pipeline=2),
    "ep2-pp2-vpp2": Layout(4, expert=2, pipeline=2, virtual=2),
    "ep2-cp2": Layout(2, expert=2, context=2),
    "packed-ep2": Layout(2, expert=2, tokens=32),
    "packed-ep2-cp2-pp2": Layout(4, expert=2, context=2, pipeline=2, tokens=32),
}


def checkpoints(root: Path, tied: bool) -> tuple[str, str]:
    """Student and teacher, unequal in width and depth, written under `root`."""
    wide = {"hidden_size": 96, "num_hidden_layers": 8}
    return (
        str(save_tiny(root / "student", "qwen3", tied=tied)),
        str(save_tiny(root / "teacher", "qwen3", tied=not tied, seed=11, **wide)),
    )


def samples(step, count=8):
    """`count` random samples whose prompts and responses have unequal lengths."""
    import random

    from megaopd.data.types import Prompt, Sample

    rng = random.Random(step)
    made = []
    for i in range(count):
        ids = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 6) + rng.randint(1, 9))]
        cut = rng.randint(1, len(ids) - 1)
        prompt = Prompt(f"{step}/{i}", tuple(ids[:cut]), "", None, "", {})
        log_probs = tuple(-rng.uniform(3, 6) for _ in ids[cut:])  # about log(1 / VOCAB)
        made.append(Sample(prompt, tuple(ids[cut:]), log_probs, "stop", 0))
    return made


def told(made, objective):
    """Samples as a run hands them over: pairs share a prompt, every third is right, and where the
    objective has terms for them two were written by others."""
    from dataclasses import replace

    from megaopd.objectives.weights import weigh

    made = [
        replace(s, prompt=replace(s.prompt, id=f"p{i // 2}"), reward=float(i % 3 == 0))
        for i, s in enumerate(made)
    ]
    if objective.sft_coef:
        made[1] = replace(made[1], kind="sft", log_probs=None)
    if objective.replay:
        made[-1] = replace(made[-1], kind="replay", log_probs=None)
    return weigh(made, objective)[0]


def build(paths, layout, steps=STEPS, dtype="float32", lr=1e-2, **values):
    """(grid, student, teacher or None) under `layout`; values: of the objective.

    A target that needs a base model finds it as student.base_model: the initial student.
    """
    from megaopd.models.arch import architecture, padded_vocab, read_hf_config
    from megaopd.models.config import ModelConfig
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import make_grid
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.student import Student
    from megaopd.trainer.teacher import Teacher

    grid = make_grid(parallel_config(layout))
    student_path, teacher_path = paths
    arch = architecture(read_hf_config(student_path))
    # Adam divides the smallest gradients by themselves, so that rounding noise becomes a full step;
    # a larger eps keeps the comparison about the gradients.
    optim = OptimConfig(
        lr=lr, weight_decay=0.1, clip_grad=0.5, eps=1e-5, distributed=layout.distributed
    )
    objective = ObjectiveConfig(chunk_size=7, **values)
    student = Student(
        ModelConfig(path=student_path, dtype=dtype), arch, grid, objective, optim, total_steps=steps
    )

    def frozen(path):
        return Teacher(
            ModelConfig(path=path, dtype=dtype),
            architecture(read_hf_config(path)),
            grid,
            vocab_rows=padded_vocab(arch.vocab, layout.tensor, 8),
        )

    mixture = objective.target in ("geometric", "linear")
    student.base_model = frozen(student_path) if mixture else None
    teacher = frozen(teacher_path) if objective.needs_teacher else None
    return grid, student, teacher


def batch(step, grid, layout, student, count=8):
    """The micro-batches of one step."""
    from megaopd.trainer.batch import make_micro_batches

    objective = student.objectives
    made = samples(step, count)
    return make_micro_batches(
        told(made, objective) if objective.needs_rewards else made,
        grid=grid,
        micro_batch_size=1 if layout.tokens else layout.samples,
        micro_batch_tokens=layout.tokens,
        pad_id=0,
        loss_agg=student.objective.loss_agg,
    )


def trajectory(paths, layout, fault="", steps=STEPS, **values):
    """[(loss, grad_norm, ...)] of `steps` steps, and the sum of every exported weight.

    values: dtype, lr, and those of the objective, whose list and importance metrics are the
    numbers after the first two.
    """
    layout = Layout(*layout)
    undo = plant(fault)
    grid, student, teacher = build(paths, layout, steps, **values)
    curve = []
    for step in range(steps):
        metrics = student.update(
            batch(step, grid, layout, student), teacher, reference=student.base_model, step=step
        )
        names = [n for n in metrics if n in student.objective.list_statistics or "tis/" in n]
        curve.append((metrics["loss"], metrics["grad_norm"], *[metrics[n] for n in names]))
    weights = {n: float(t.double().abs().sum()) for n, t in student.weights()}
    undo()
    return curve, weights


def parallel_config(layout):
    from megaopd.parallel import ParallelConfig

    return ParallelConfig(
        layout.tensor,
        layout.pipeline,
        virtual=layout.virtual,
        context=layout.context,
        expert=layout.expert,
        sequence=layout.sequence,
    )


def plant(fault):
    """Break one thing that a layout needs; a function that mends it."""
    import sys

    import torch
    from megatron.core.distributed import finalize_model_grads  # noqa: F401  (loads the module)
    from megatron.core.transformer import transformer_layer

    from megaopd.models import segments
    from megaopd.trainer import batch, optim

    reduction = sys.modules["megatron.core.distributed.finalize_model_grads"]
    finalize, whole, offset = (
        optim._finalize,
        segments._whole,
        transformer_layer.get_transformer_layer_offset,
    )

    def scaled(*args, **kwargs):
        finalize(*args, **kwargs)
        for chunk in args[1]:
            chunk.scale_gradients(0.5)

    def without_others(x, bounds, group):
        """Keys and values of the other ranks without a gradient to them."""
        everyone = whole(x.detach(), bounds, group)
        own = segments.zigzag(bounds, group.rank(), group.size())
        return everyone.index_copy(0, own, x)

    def halves(bounds, rank, size):
        """Contiguous parts, as if the split were not a zigzag."""
        parts = [
            torch.arange(a + rank * (b - a) // size, a + (rank + 1) * (b - a) // size)
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts)

    def one_sequence(bounds, rank, size):
        return [(a, b, 0) for a, b in pairwise(bounds)]

    breaks = {
        "": None,
        "sequence-parallel norm": (
            reduction,
            "_allreduce_non_tensor_model_parallel_grads",
            lambda *a, **k: None,
        ),
        "tied embedding": (reduction, "_allreduce_word_embedding_grads", lambda *a, **k: None),
        "data-parallel scale": (optim, "_finalize", scaled),
        "key gradients not summed": (segments, "_whole", without_others),
        "positions not zigzag": (batch, "zigzag", halves),
        "packed sequences see each other": (segments, "_runs", one_sequence),
        "every chunk the first": (
            transformer_layer,
            "get_transformer_layer_offset",
            lambda config, vp_stage=None, pp_rank=None: offset(config, vp_stage and 0, pp_rank),
        ),
    }[fault]
    if breaks is None:
        return lambda: None
    module, name, broken = breaks
    sound = getattr(module, name)
    setattr(module, name, broken)
    return lambda: setattr(module, name, sound)


def differences(reference, other):
    """Largest relative difference of loss and of gradient norm, and of any weight's size."""
    (curve, weights), (other_curve, other_weights) = reference, other
    loss = max(abs(a[0] / b[0] - 1) for a, b in zip(curve, other_curve, strict=True))
    norm = max(abs(a[1] / b[1] - 1) for a, b in zip(curve, other_curve, strict=True))
    if weights.keys() != other_weights.keys():
        return loss, norm, float("inf")
    size = max(abs(weights[n] / other_weights[n] - 1) for n in weights)
    return loss, norm, size
