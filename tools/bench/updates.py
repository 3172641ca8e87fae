"""Live tensors of real updates on a CPU, beside what megaopd/plan says about them.

A case is a dict of plain values, so that it travels to ranks and into JSON. Its models are random,
built by the real Student and Teacher from checkpoints on disk.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopd.parallel import ParallelConfig

from .measure import LiveStorages


@dataclass(frozen=True)
class Case:
    """One measured update. The teacher is another width of the same shape."""

    name: str
    layout: ParallelConfig
    world: int = 1  # of all ranks
    family: str = "Llama"
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 704
    vocab: int = 8192
    tied: bool = False
    teacher_hidden: int = 384  # 0: no teacher, cross-entropy
    sequence: int = 256
    response: int = 192
    micro_batch: int = 1
    samples: int = 4
    chunk: int = 0
    dtype: str = "float32"
    recompute: str = "none"
    distributed: bool = True
    experts: int = 0  # Qwen3Moe: of every layer; both models have them
    top_k: int = 2
    expert_ffn: int = 256
    teacher_layout: ParallelConfig | None = None  # its own; None: the student's
    teacher_ranks: int = 0  # of its own

    def config(self, *, hidden: int | None = None) -> dict[str, Any]:
        """A Hugging Face config.json."""
        hidden = hidden or self.hidden
        sparse = {
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.expert_ffn,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        return {
            **(sparse if self.experts else {}),
            "architectures": [f"{self.family}ForCausalLM"],
            "model_type": "qwen3_moe" if self.experts else self.family.lower(),
            "vocab_size": self.vocab,
            "hidden_size": hidden,
            "intermediate_size": self.ffn * hidden // self.hidden // 8 * 8,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": hidden // self.heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
        }


def planned(case: Case) -> Any:
    """The case as the planner sees it."""
    from megaopd.plan.job import Job, Side
    from megaopd.plan.models import as_model

    def side(hidden: int, layout: ParallelConfig) -> Side:
        return Side(
            as_model(case.config(hidden=hidden), name=case.name),
            layout,
            itemsize=4 if case.dtype == "float32" else 2,
            recompute=case.recompute if hidden == case.hidden else "none",  # pyright: ignore
        )

    own = case.teacher_layout or case.layout
    return Job(
        student=side(case.hidden, case.layout),
        teacher=side(case.teacher_hidden, own) if case.teacher_hidden else None,
        world=case.world - case.teacher_ranks,
        placement=_placement(case),
        teacher_world=case.teacher_ranks,
        samples=case.samples,
        sequence=case.sequence,
        rows=case.response,
        micro_batch=case.micro_batch,
        chunk=case.chunk,
        spec="local",
        distributed=case.distributed,
    )


def _placement(case: Case) -> Any:
    if case.teacher_ranks:
        return "separate"
    return "regrouped" if case.teacher_layout else "same"


def measure_update(case: Case) -> dict[str, Any]:
    """Live tensor bytes of this rank in the second of two updates; in an initialised world.

    The second: Adam's moments exist only after the first. Everything that the run allocates is
    counted, from the first weight on.
    """
    from megaopd.parallel import make_grid

    bridge = _join(case)
    if bridge is not None and bridge.is_teacher:
        return _measure_teacher(case, bridge)
    grid = make_grid(case.layout)
    with _checkpoints(case) as paths, LiveStorages() as live:
        student, teacher, micro_batches = _build(case, grid, paths, bridge)
        student.update(micro_batches, teacher)
        with _marked(live, student, teacher):
            live.mark("before")
            student.update(micro_batches, teacher)
            live.mark("after")
        if teacher is not None:
            teacher.close()
    order = ["before", "passes", "optimizer"]
    return {
        "rank": grid.rank,
        "stage": grid.pp_rank,
        "own": False,
        "resident": live.at["before"],
        "peak": max(live.peaks[name] for name in order if name in live.peaks),
        "phases": {name: live.peaks[name] for name in order if name in live.peaks},
        "hidden": live.at["passes"] - live.at["before"],
    }


def _join(case: Case) -> Any:
    """The worlds of a case whose teacher has ranks of its own, in place of the one there is."""
    import torch.distributed as dist

    from megaopd.worlds import join_worlds

    if not case.teacher_ranks:
        return None
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return join_worlds(case.teacher_ranks)


def _measure_teacher(case: Case, bridge: Any) -> dict[str, Any]:
    """Live tensor bytes of one of the teacher's ranks in the second of two requests."""
    from megaopd.trainer.teachers.ranks import Service, serve

    class Marked(Service):
        def answer(self, request: Any) -> None:
            live.mark("request")
            super().answer(request)

    with _checkpoints(case) as paths, LiveStorages() as live:
        layout = case.teacher_layout or case.layout
        service = serve({"": _model(case, paths, "teacher")}, layout, bridge, make=Marked)
    return {
        "rank": bridge.rank,
        "stage": service.grid.pp_rank,
        "own": True,
        "resident": live.at["request"],
        "peak": live.peaks["request"],
        "phases": {"before": live.peaks["request"]},
        "hidden": 0,
    }


@contextlib.contextmanager
def _marked(live: LiveStorages, student: Any, teacher: Any) -> Iterator[None]:
    """Marks where the teacher has finished and where the optimizer begins."""

    def before(target: Any, name: str, mark: str) -> None:
        original: Callable[..., Any] = getattr(target, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            live.mark(mark)
            return original(*args, **kwargs)

        setattr(target, name, call)

    before(student.ddp, "zero_grad_buffer", "passes")
    before(student.optimizer, "step", "optimizer")
    yield
    del student.ddp.zero_grad_buffer, student.optimizer.step


def _model(case: Case, paths: dict[str, str], who: str) -> tuple[Any, Any]:
    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.models.config import ModelConfig

    recompute: Any = case.recompute if who == "student" else "none"
    dtype: Any = case.dtype
    config = ModelConfig(path=paths[who], dtype=dtype, recompute=recompute)
    return config, architecture(read_hf_config(paths[who]))


def _teacher(case: Case, grid: Any, paths: dict[str, str], bridge: Any) -> Any:
    from megaopd.models.arch import padded_vocab
    from megaopd.trainer.teacher import Teacher
    from megaopd.trainer.teachers.exchange import RegroupedTeacher
    from megaopd.trainer.teachers.ranks import SeparateTeacher
    from megaopd.worlds import second_layout

    if "teacher" not in paths:
        return None
    model = _model(case, paths, "teacher")
    rows = {"vocab_rows": padded_vocab(case.vocab, grid.tp_size, 8)}
    if bridge is not None:
        return SeparateTeacher(*model, grid, bridge, window=planned(case).window, **rows)
    if case.teacher_layout is not None:
        return RegroupedTeacher(*model, grid, second_layout(case.teacher_layout), **rows)
    return Teacher(*model, grid, **rows)


def _build(case: Case, grid: Any, paths: dict[str, str], bridge: Any) -> tuple[Any, Any, Any]:
    import torch

    from megaopd.data.types import Prompt, Sample
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.trainer.batch import make_micro_batches
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.student import Student

    loss = "rkl" if case.teacher_hidden else "sft"
    student = Student(
        *_model(case, paths, "student"), grid, ObjectiveConfig(loss=loss, chunk_size=case.chunk),
        OptimConfig(lr=1e-4, distributed=case.distributed), vocab=case.vocab,
    )  # fmt: skip
    teacher = _teacher(case, grid, paths, bridge)
    generator = torch.Generator().manual_seed(1)

    def sample(index: int) -> Sample:
        ids = torch.randint(0, case.vocab, (case.sequence,), generator=generator).tolist()
        cut = case.sequence - case.response
        prompt = Prompt(f"p{index}", tuple(ids[:cut]), "", None, "")
        return Sample(prompt, tuple(ids[cut:]), None, "length", weight_version=0)

    micro_batches = make_micro_batches(
        [sample(i) for i in range(case.samples)],
        grid=grid,
        micro_batch_size=case.micro_batch,
        pad_id=0,
        loss_agg="token-mean",
    )
    return student, teacher, micro_batches


@contextlib.contextmanager
def _checkpoints(case: Case) -> Iterator[dict[str, str]]:
    """Random checkpoints of rank 0, on every rank of this world, while the block runs."""
    import torch.distributed as dist

    from megaopd.parallel import broadcast_object

    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        paths = {}
        for who, hidden in (("student", case.hidden), ("teacher", case.teacher_hidden)):
            if hidden:
                paths[who] = str(Path(folder, who))
                if dist.get_rank() == 0:
                    _write_checkpoint(case.config(hidden=hidden), paths[who])
        yield broadcast_object(paths)
        dist.barrier()


def _write_checkpoint(config: dict[str, Any], folder: str) -> None:
    import torch
    import transformers

    torch.manual_seed(7)
    kind = {
        "Llama": transformers.LlamaConfig,
        "Qwen3": transformers.Qwen3Config,
        "Qwen3Moe": transformers.Qwen3MoeConfig,
    }
    options = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    made = kind[config["architectures"][0].removesuffix("ForCausalLM")](**options)
    transformers.AutoModelForCausalLM.from_config(made).float().save_pretrained(folder)


def compare(case: Case) -> dict[str, Any]:
    """Predicted and measured bytes of this rank, and the error of the predicted peak."""
    from megaopd.plan.memory import stage_memory, teacher_memory

    found = measure_update(case)
    plan = (teacher_memory if found["own"] else stage_memory)(planned(case), found["stage"])
    phases = plan.phases
    predicted = {
        "resident": plan.resident,
        "peak": plan.peak,
        "phases": {
            "before": plan.resident + phases["teacher"],
            "passes": plan.resident + max(phases["forward"], phases["backward"]),
            "optimizer": plan.resident + phases["optimizer"],
        },
        "hidden": plan.hidden,
        "worst": plan.worst,
    }
    error = plan.peak / found["peak"] - 1
    return {
        "rank": found["rank"],
        "stage": found["stage"],
        "own": found["own"],
        "error": error,
        "measured": {k: found[k] for k in ("resident", "peak", "phases", "hidden")},
        "predicted": predicted,
    }
