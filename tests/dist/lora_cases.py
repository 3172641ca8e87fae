"""What the ranks of test_lora.py and test_recompute.py run."""

import multiprocessing

import torch

from tests.dist.layouts import SINGLE, Layout, batch, parallel_config
from tests.dist.models import VOCAB, tokens

RANK, ALPHA = 4, 8.0
STEPS = 4


def make_student(
    paths, layout, *, lora=True, steps=STEPS, recompute="none", dtype="float32", **optim
):
    """(student, teacher, grid) of a layout."""
    from megaopd.models.arch import architecture, padded_vocab, read_hf_config
    from megaopd.models.config import LoraConfig, ModelConfig
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import make_grid
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.student import Student
    from megaopd.trainer.teacher import Teacher

    layout = Layout(*layout)
    grid = make_grid(parallel_config(layout))
    archs = [architecture(read_hf_config(path)) for path in paths]
    student = Student(
        ModelConfig(path=paths[0], recompute=recompute, dtype=dtype),
        archs[0],
        grid,
        ObjectiveConfig(chunk_size=7),
        OptimConfig(
            **{"lr": 1e-2, "weight_decay": 0.1, "clip_grad": 0.5, "eps": 1e-5, **optim},
            distributed=layout.distributed,
        ),
        total_steps=steps,
        lora=LoraConfig(rank=RANK, alpha=ALPHA) if lora else None,
    )
    model = ModelConfig(path=paths[1], dtype=dtype)
    teacher = Teacher(model, archs[1], grid, vocab_rows=padded_vocab(VOCAB, layout.tensor, 8))
    return student, teacher, grid


def train(student, teacher, grid, steps, layout=SINGLE):
    """[(loss, gradient norm)] of the given steps."""
    curve = []
    for step in steps:
        metrics = student.update(batch(step, grid, Layout(*layout), student), teacher)
        curve.append((metrics["loss"], metrics["grad_norm"]))
    return curve


def sizes(student):
    """(curve, name -> sum of sizes) as test_trajectory.differences compares them."""
    return {n: float(t.double().abs().sum()) for n, t in student.weights()}


def trajectory(paths, layout, **options):
    """The curve of STEPS steps, and the size of every exported weight."""
    student, teacher, grid = make_student(paths, layout, **options)
    return train(student, teacher, grid, range(STEPS), layout), sizes(student)


def memory(paths, layout):
    """Bytes of a LoRA student: what is frozen, what is trained, and what hangs on it."""
    student, teacher, grid = make_student(paths, layout)
    train(student, teacher, grid, range(1))
    from megaopd.models.lora import is_adapter
    from megaopd.trainer.offload import gradient_tensors, optimizer_tensors

    named = list(student.model.named_parameters())
    frozen = [p for name, p in named if not is_adapter(name)]
    trained = [p for name, p in named if is_adapter(name)]
    return {
        "frozen": sum(p.numel() for p in frozen),
        "trained": sum(p.numel() for p in trained),
        "with gradient": sum(hasattr(p, "main_grad") or p.grad is not None for p in frozen),
        "gradients": sum(t.numel() for t in gradient_tensors(student.wrapped)),
        "optimizer": sum(t.numel() for t in optimizer_tensors(student.optimizer)),
        "names": [name for name, _ in named if is_adapter(name)],
    }


def fill_b(student, seed=3):
    """Give every B values that do not depend on the layout."""
    from megaopd.models.lora import adapters

    for index, adapter in enumerate(adapters(student.model)):
        layer = index // 4 + student.grid.pp_rank * 2
        generator = torch.Generator().manual_seed(seed + 10 * layer + index % 4)
        tp = student.grid.tp_size
        rows = adapter.b.shape[0] * (tp if adapter.column else 1)
        full = torch.randn(rows, RANK, generator=generator) * 0.05
        if adapter.name == "linear_fc1":  # [gate; up] per rank
            halves = [half.chunk(tp)[student.grid.tp_rank] for half in full.chunk(2)]
            full = torch.cat(halves)
        elif adapter.column:
            full = full.chunk(tp)[student.grid.tp_rank]
        adapter.b.data.copy_(full)


def gradients(paths, layout):
    """(layer, name, factor) -> (values, gradient) of each adapter as a whole matrix."""
    import torch.distributed as dist

    from megaopd.models.lora import adapters

    student, teacher, grid = make_student(paths, layout, clip_grad=0.0)
    fill_b(student)
    micro_batches = batch(0, grid, SINGLE, student)
    student.accumulate(micro_batches, teacher)
    found = {}
    for index, adapter in enumerate(adapters(student.model)):
        layer = index // 4 + grid.pp_rank * 2
        for factor, dim in (("a", 1), ("b", 0)):
            parameter = getattr(adapter, factor)
            split = (factor == "b") == adapter.column
            for what, tensor in (("value", parameter.detach()), ("grad", parameter.main_grad)):
                shards = [torch.empty_like(tensor) for _ in range(grid.tp_size)]
                dist.all_gather(shards, tensor.contiguous(), group=grid.groups.tp)
                whole = torch.cat(shards, dim) if split else shards[0]
                if not split:
                    assert all(s.equal(shards[0]) for s in shards), (layer, adapter.name, what)
                if factor == "b" and adapter.name == "linear_fc1":
                    halves = [s.chunk(2) for s in shards]
                    whole = torch.cat([h[i] for i in range(2) for h in halves])
                found[layer, adapter.name, factor, what] = whole.clone()
    return found


def export(paths, layout, out):
    """Logits with adapters, without them, and of the base; writes the merged weights to `out`."""
    from megaopd.models.lora import adapters_off
    from megaopd.models.weights import export_hf
    from tests.dist.test_models import logits

    student, teacher, grid = make_student(paths, layout)
    ids = tokens()
    base = logits(student.model, ids, grid)
    train(student, teacher, grid, range(3))
    before = [p.detach().clone() for p in student.model.parameters()]
    on = logits(student.model, ids, grid)
    with adapters_off(student.model):
        off = logits(student.model, ids, grid)
    again = logits(student.model, ids, grid)
    assert on is None or again.equal(on)
    export_hf(student.weights(), out, side_files_from=paths[0], grid=grid)
    after = list(student.model.parameters())
    assert all(a.equal(b) for a, b in zip(before, after, strict=True)), "the live weights moved"
    rank_0 = {n: t.clone() for n, t in student.weights(only_rank_0=True)}
    return on, off, base, rank_0


def beside_and_folded(paths, layout):
    """Logits with adapters beside the layers, and with the same ones written into the weights."""
    from megaopd.models.lora import fold
    from tests.dist.test_models import logits

    student, _, grid = make_student(paths, layout)
    fill_b(student)
    beside = logits(student.model, tokens(), grid)
    fold(student.model)
    return beside, logits(student.model, tokens(), grid)


def resume(paths, layout, directory, *, save):
    """Save after two steps, or load and go on: (the last steps' curve, names in the checkpoint)."""
    from pathlib import Path

    from megaopd.trainer.checkpoint import Checkpoints

    # megatron-core's writer is a child process, which the pool's daemons may not have.
    multiprocessing.process.current_process()._config["daemon"] = False
    student, teacher, grid = make_student(paths, layout)
    checkpoints = Checkpoints(Path(directory), grid, keep=2)
    if save:
        train(student, teacher, grid, range(2))
        checkpoints.save(2, student, {}, Path(paths[0]))
        names = list(student.sharded_state(loading=False)["model"])
    else:
        checkpoints.load(2, student)
        names = []
    return train(student, teacher, grid, range(2, STEPS)), names


def as_base(path, base, layout):
    """The merged weights that a checkpoint of adapters gives where a model's path is wanted."""
    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.build import build_model
    from megaopd.models.config import ModelConfig
    from megaopd.models.convert import load_weights
    from megaopd.models.weights import WeightStream
    from megaopd.parallel import make_grid

    grid = make_grid(parallel_config(Layout(*layout)))
    arch = architecture(read_hf_config(base))
    config = ModelConfig(path=path)
    model = build_model(arch, config, grid)
    load_weights(model, config, arch, grid)
    assert not [n for n, _ in model.named_parameters() if "lora" in n]
    assert all(p.requires_grad for p in model.parameters())
    return {n: t.clone() for n, t in WeightStream(model, arch, grid)}


def initial_teacher(paths, layout, kind):
    """The curve of a student that is pulled back to where it began."""
    from megaopd.trainer.teachers.selves import InitialTeacher

    student, teacher, grid = make_student((paths[0], paths[0]), layout)
    fill_b(student)
    if kind == "adapters off":
        teacher = InitialTeacher(student)
    return train(student, teacher, grid, range(2), layout)
