"""Layouts that divide the models and fit the memory, fastest estimate first; why others fail."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from megaopd.errors import UserError
from megaopd.parallel import ParallelConfig
from megaopd.plan.communication import step_traffic
from megaopd.plan.hardware import GIB, Gpu
from megaopd.plan.job import Job, misfit
from megaopd.plan.memory import StageMemory, stage_memory, teacher_memory
from megaopd.plan.times import Seconds, estimate

MICRO_BATCHES = (1, 2, 4, 8)
MOST_CONTEXT = 8


@dataclass(frozen=True)
class Found:
    """One layout with its plan."""

    job: Job
    memory: list[StageMemory]
    seconds: Seconds

    @property
    def fullest(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def settings(self) -> list[str]:
        """As overrides of a configuration."""
        layout, job = self.job.student.layout, self.job
        parts = {name: getattr(layout, name) for name in ("tensor", "pipeline", "context")}
        parts |= {"virtual": layout.virtual, "expert": layout.expert}
        texts = [f"parallel.{name}={size}" for name, size in parts.items() if size > 1]
        texts += ["parallel.sequence=true"] if layout.sequence else []
        texts.append(f"student.recompute={job.student.recompute}")
        return [*texts, f"trainer.micro_batch_size={job.micro_batch}"]


@dataclass
class Search:
    """What a search over layouts has found."""

    gpu: Gpu
    fits: list[Found] = field(default_factory=list)
    too_large: list[Found] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)  # of layouts that cannot be built

    def near_misses(self, count: int = 5) -> list[Found]:
        """The smallest that do not fit, one for each tensor x pipeline x context x expert."""
        seen: dict[tuple[int, ...], Found] = {}
        for found in sorted(self.too_large, key=lambda f: f.fullest.total):
            layout = found.job.student.layout
            key = (layout.tensor, layout.pipeline, layout.context, layout.expert)
            if not any(self._same(key, fit) for fit in self.fits):
                seen.setdefault(key, found)
        return list(seen.values())[:count]

    @staticmethod
    def _same(key: tuple[int, ...], found: Found) -> bool:
        layout = found.job.student.layout
        return key == (layout.tensor, layout.pipeline, layout.context, layout.expert)


def evaluate(job: Job, gpu: Gpu, *, all_stages: bool = True) -> Found:
    """The plan of one layout; the student's fullest stage is the first or the last."""
    ends = sorted({0, job.student.layout.pipeline - 1})
    stages = range(job.student.layout.pipeline) if all_stages else ends
    memory = [stage_memory(job, stage, reserve=gpu.reserve) for stage in stages]
    memory += _own_ranks(job, gpu)
    return Found(job, memory, estimate(job, gpu, step_traffic(job)))


def _own_ranks(job: Job, gpu: Gpu) -> list[StageMemory]:
    """The stages of a teacher on ranks of its own; [] where it has none."""
    if not job.teacher or not job.teacher_world:
        return []
    stages = range(job.teacher.layout.pipeline)
    return [teacher_memory(job, stage, reserve=gpu.reserve) for stage in stages]


def search(job: Job, gpu: Gpu) -> Search:
    """Every layout of both models together on job.world ranks; of the student alone where the
    teacher has a layout of its own.

    Tensor parallel stays inside a node, sequence parallel goes with it, and the sizes are powers of
    two or divisors of the layers.
    """
    result = Search(gpu)
    if any(stage.total > gpu.memory for stage in _own_ranks(job, gpu)):
        # No layout of the student's helps.
        result.too_large.append(evaluate(job, gpu))
        return result
    for layout in _layouts(job, gpu):
        tried = job.with_layout(layout)
        reasons = (misfit(side, job.world) for side in tried.together)
        reason = next(filter(None, reasons), "")
        if reason:
            result.reasons[reason] += 1
            continue
        for variant in _variants(tried):
            found = evaluate(variant, gpu, all_stages=False)
            if found.fullest.total <= gpu.memory:
                result.fits.append(found)
            else:
                result.too_large.append(found)
    result.fits.sort(key=lambda found: found.seconds.total)
    return result


def _layouts(job: Job, gpu: Gpu) -> Iterator[ParallelConfig]:
    layers = job.student.arch.layers
    experts = max(side.model.experts for side in job.together)
    for tensor in _powers(min(gpu.per_node, job.world)):
        for pipeline in sorted({*_powers(job.world), *_divisors(layers, job.world // tensor)}):
            for context in _powers(MOST_CONTEXT):
                model = tensor * pipeline * context
                if model > job.world or job.world % model:
                    continue
                rest = job.world // pipeline
                for expert in _powers(min(rest, experts)) if experts else (1,):
                    for virtual in (1, 2, 4) if pipeline > 1 else (1,):
                        yield ParallelConfig(
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual=virtual,
                            context=context,
                            expert=expert,
                            sequence=tensor > 1,
                            pad_multiple=job.student.layout.pad_multiple,
                        )


def _variants(job: Job) -> Iterator[Job]:
    """Micro-batches and recomputation; interleaving wants micro-batches in rounds of the stages."""
    layout = job.student.layout
    for micro in MICRO_BATCHES:
        if micro > 1 and job.samples < micro * job.student.data(job.world):
            continue
        tried = replace(job, micro_batch=micro)
        if layout.virtual > 1 and tried.micro_batches % layout.pipeline:
            continue
        for recompute in ("none", "full"):
            yield replace(tried, student=replace(tried.student, recompute=recompute))


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())] if most else []


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, most + 1) if number % n == 0]


def distinct(found: list[Found], count: int) -> list[Found]:
    """The best of each tensor x pipeline x context x expert, best first."""
    kept: dict[tuple[int, ...], Found] = {}
    for one in found:
        layout = one.job.student.layout
        key = (layout.tensor, layout.pipeline, layout.context, layout.expert)
        kept.setdefault(key, one)
    return list(kept.values())[:count]


def why_too_large(found: Found, gpu: Gpu) -> str:
    """What fills the memory of the fullest stage."""
    stage = found.fullest
    where = f" on {stage.name} of its own ranks" if stage.own else ""
    parts = {
        "weights": stage.weights,
        "gradients": stage.gradients,
        "optimizer": stage.optimizer,
        "teacher's weights": stage.teacher_weights,
        "teacher's hidden states": stage.hidden,
        f"the {stage.worst} phase": max(stage.phases.values()) - stage.hidden,
        "rollout engine": stage.rollout,
    }
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    text = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    over = (stage.total - gpu.memory) / GIB
    return f"{over:.1f} GiB too much{where} ({text} GiB)"


def best(result: Search) -> Found:
    """The first that fits. UserError, with the nearest, where none does."""
    if result.fits:
        return result.fits[0]
    near = result.near_misses(1)
    detail = why_too_large(near[0], result.gpu) if near else "; ".join(result.reasons)
    fix = "use more or larger GPUs, shorter sequences, or fewer samples a step"
    if near and near[0].fullest.own:
        fix = "raise teacher_parallel.ranks, tensor, pipeline or expert"
    raise UserError(
        f"no layout fits: the nearest has {detail}",
        expected=f"at most {result.gpu.memory / GIB:.0f} GiB on every rank",
        fix=fix,
    )
