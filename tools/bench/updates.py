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
    world: int = 1
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

    def side(hidden: int) -> Side:
        return Side(
            as_model(case.config(hidden=hidden), name=case.name),
            case.layout,
            itemsize=4 if case.dtype == "float32" else 2,
            recompute=case.recompute if hidden == case.hidden else "none",  # pyright: ignore
        )

    return Job(
        student=side(case.hidden),
        teacher=side(case.teacher_hidden) if case.teacher_hidden else None,
        world=case.world,
        samples=case.samples,
        sequence=case.sequence,
        rows=case.response,
        micro_batch=case.micro_batch,
        chunk=case.chunk,
        spec="local",
        distributed=case.distributed,
    )


def measure_update(case: Case) -> dict[str, Any]:
    """Live tensor bytes of this rank in the second of two updates; in an initialised world.

    The second: Adam's moments exist only after the first. Everything that the run allocates is
    counted, from the first weight on.
    """
    from megaopd.parallel import make_grid

    grid = make_grid(case.layout)
    with _checkpoints(case, grid) as paths, LiveStorages() as live:
        student, teacher, micro_batches = _build(case, grid, paths)
        student.update(micro_batches, teacher)
        with _marked(live, student, teacher):
            live.mark("before")
            student.update(micro_batches, teacher)
            live.mark("after")
    order = ["before", "passes", "optimizer"]
    return {
        "rank": grid.rank,
        "stage": grid.pp_rank,
        "resident": live.at["before"],
        "peak": max(live.peaks[name] for name in order if name in live.peaks),
        "phases": {name: live.peaks[name] for name in order if name in live.peaks},
        "hidden": live.at["passes"] - live.at["before"],
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


def _build(case: Case, grid: Any, paths: dict[str, str]) -> tuple[Any, Any, Any]:
    import torch

    from megaopd.data.types import Prompt, Sample
    from megaopd.models.arch import architecture, padded_vocab, read_hf_config
    from megaopd.models.config import ModelConfig
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.trainer.batch import make_micro_batches
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.student import Student
    from megaopd.trainer.teacher import Teacher

    loss = "rkl" if case.teacher_hidden else "sft"
    models = {}
    for who, path in paths.items():
        recompute: Any = case.recompute if who == "student" else "none"
        dtype: Any = case.dtype
        config = ModelConfig(path=path, dtype=dtype, recompute=recompute)
        models[who] = config, architecture(read_hf_config(path))
    student = Student(
        *models["student"], grid, ObjectiveConfig(loss=loss, chunk_size=case.chunk),
        OptimConfig(lr=1e-4, distributed=case.distributed), vocab=case.vocab,
    )  # fmt: skip
    rows = padded_vocab(case.vocab, grid.tp_size, 8)
    teacher = Teacher(*models["teacher"], grid, vocab_rows=rows) if "teacher" in models else None
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
def _checkpoints(case: Case, grid: Any) -> Iterator[dict[str, str]]:
    """Random checkpoints of rank 0, on every rank, while the block runs."""
    from megaopd.parallel import broadcast_object

    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        paths = {}
        for who, hidden in (("student", case.hidden), ("teacher", case.teacher_hidden)):
            if hidden:
                paths[who] = str(Path(folder, who))
                if grid.rank == 0:
                    _write_checkpoint(case.config(hidden=hidden), paths[who])
        yield broadcast_object(paths)
        grid.barrier()


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
    from megaopd.plan.memory import stage_memory

    found = measure_update(case)
    plan = stage_memory(planned(case), found["stage"])
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
        "error": error,
        "measured": {k: found[k] for k in ("resident", "peak", "phases", "hidden")},
        "predicted": predicted,
    }
