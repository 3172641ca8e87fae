"""All terms of a loss on one chunk of raw logits: soft-cap, temperature, targets, then the passes.

Shapes: C rows, Vp local ids (padding already sliced off), n terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.chunk import Batch, ChunkLoss, Listed, run_chunk
from megaopd.losses.kernels import native
from megaopd.losses.plan import Plan, is_pld, make_plans
from megaopd.losses.remote import Known
from megaopd.losses.sinkhorn import sinkhorn_chunk
from megaopd.losses.targets import apply_target_
from megaopd.losses.terms import Term, check_positive
from megaopd.losses.vocab_parallel import Shard, group_size

# Elements of a chunk's logits: large enough for efficient products, small enough to forget.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
MIN_CHUNK = 128
COUPLED_ROWS = 128  # of a loss on whole chunks: few enough for all pairs of them

LIST_STATS = ("mass_student", "mass_teacher", "bucket_kl", "overlap", "teacher_rank")


@dataclass(frozen=True)
class Engine:
    """What to compute on each chunk; made once a call, the same on every rank."""

    terms: tuple[Term, ...]
    plans: tuple[Plan, ...]
    shard: Shard
    softcaps: tuple[float | None, float | None, float | None]  # of student, teacher and base
    chunk_size: int

    @property
    def inline(self) -> bool:
        """Kernels scale the logits as they read them: the buffers keep the products' precision."""
        return self.plans[0].inline

    @property
    def coupled(self) -> bool:
        """Whether the rows of a chunk mean something to each other."""
        return any(plan.coupled for plan in self.plans)

    def logits_dtype(self, weight: Tensor) -> torch.dtype:
        """Of a chunk's logits: as the products give them where kernels do the rest, else wide."""
        if weight.dtype == torch.float64:
            return torch.float64
        return weight.dtype if self.inline else torch.float32

    @property
    def needs_base(self) -> bool:
        return any(plan.target.needs_base for plan in self.plans)

    def run(
        self,
        s: Tensor,
        t: Tensor | None,
        base: Tensor | None,
        batch: Batch,
        weights: Tensor,
        want_grad: bool,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | Listed | None, Tensor | None]:
        """(values [n, C], stats, D, scale) with d loss / d logits = D * scale[:, None].

        s, t, base [C, Vp]: raw logits, overwritten; D lies in one of them. weights [n, C].
        """
        slope = None
        for x, softcap in zip((s, t, base), self.softcaps, strict=True):
            if softcap is not None and x is not None and not self.inline:
                x.div_(softcap).tanh_()
                if x is s and want_grad:
                    slope = 1 - x * x
                x.mul_(softcap)
        values = weights.new_zeros(len(self.terms), s.shape[0])
        stats: dict[str, Tensor] = {}
        total, scale = None, None
        for i, plan in enumerate(self.plans):
            laws = (s, t, base)
            if i + 1 < len(self.plans):
                laws = tuple(None if x is None else x.clone() for x in laws)
            mine = torch.stack([weights[row] for row in plan.rows]) if plan.rows else weights[:0]
            grad_too = want_grad and bool(plan.rows)
            out = _run_plan(plan, *laws, batch, mine, grad_too)  # pyright: ignore
            for row, value in zip(plan.rows, out.values, strict=True):
                values[row] = value
            stats |= out.stats
            if isinstance(out.grad, Listed) and (len(self.plans) > 1 or slope is not None):
                out.grad = out.grad.dense(s.shape[1])
            if out.grad is None:
                continue
            if len(self.plans) == 1:
                total, scale = out.grad, out.scale
                continue
            assert not isinstance(out.grad, Listed) and not isinstance(total, Listed)
            grad = out.grad if out.scale is None else out.grad.mul_(out.scale[:, None])
            total = grad if total is None else total.add_(grad)
        if slope is not None and isinstance(total, Tensor):
            total.mul_(slope)
        return values, stats, total, scale


def make_engine(
    terms: Sequence[Term],
    shard: Shard,
    *,
    softcaps: tuple[float | None, float | None, float | None],
    chunk_size: int | None,
    stats: bool,
    stats_k: int | None,
    has_teacher: bool,
    has_base: bool,
    has_labels: bool,
    vocab_size: int | None,
    like: Tensor,
    known: Known | None = None,
) -> Engine:
    """Checks what users set, and chooses the chunk.

    softcaps: of student, teacher and base; has_teacher: its logits are given; known: what a teacher
    elsewhere gave instead (remote.py).
    """
    if not terms:
        raise UserError("no terms", expected="at least one", fix="pass a Divergence")
    for softcap in softcaps:
        check_positive("softcap", softcap)
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"chunk_size={chunk_size}", expected="at least 1", fix="leave it out")
    vocab = vocab_size if vocab_size is not None else shard.width * group_size(shard.group)
    if known is not None and stats_k is not None:
        raise UserError(
            f"stats_k={stats_k} with a teacher known on a list",
            expected="no stats_k: the statistics are those of the list",
            fix="leave stats_k out",
        )
    plans = make_plans(
        terms,
        shard,
        stats=stats,
        stats_k=stats_k,
        has_teacher=has_teacher,
        has_labels=has_labels,
        vocab=vocab,
        known=known,
    )
    # Kernels that scale what they read know one soft-cap.
    inline = _inline(plans, like) and (softcaps[0] == softcaps[1] or not has_teacher)
    plans = [replace(p, softcap=softcaps[0], inline=inline) for p in plans]
    coupled = any(plan.coupled for plan in plans)
    chunk = chunk_size or (COUPLED_ROWS if coupled else default_chunk(shard, like.device))
    engine = Engine(tuple(terms), tuple(plans), shard, softcaps, chunk)
    if engine.needs_base != has_base:
        raise UserError(
            "base logits" if has_base else "no base logits",
            expected="none: no target uses them"
            if has_base
            else "the base model of the geometric or linear target",
            fix="pass base hidden states and weight exactly where a Target needs them",
        )
    return engine


def _inline(plans: Sequence[Plan], like: Tensor) -> bool:
    """One pass over logits that no target mixes: nothing but the kernels needs them scaled."""
    plan = plans[0]
    ops = native(like) if plan.fused else None
    plain = len(plans) == 1 and plan.target.kind == "teacher" and not plan.coupled
    tempered_pld = plan.temperature != 1.0 and any(map(is_pld, plan.terms))
    return getattr(ops, "SCALES", False) and plain and not tempered_pld


def default_chunk(shard: Shard, device: torch.device) -> int:
    """Rows whose logits fill CHUNK_ELEMENTS, a multiple of MIN_CHUNK."""
    rows = CHUNK_ELEMENTS[device.type] // max(1, shard.width)
    return max(MIN_CHUNK, rows // MIN_CHUNK * MIN_CHUNK)


def _run_plan(
    plan: Plan,
    s: Tensor,
    t: Tensor | None,
    base: Tensor | None,
    batch: Batch,
    weights: Tensor,
    want_grad: bool,
) -> ChunkLoss:
    if plan.temperature != 1.0 and not plan.inline:
        for x in (t, base) if any(map(is_pld, plan.terms)) else (s, t, base):
            if x is not None:
                x.div_(plan.temperature)
    if t is not None:
        apply_target_(plan.target, t, base, batch.labels, plan.shard)
    if plan.coupled:
        assert t is not None
        return sinkhorn_chunk(plan, s, t, weights, want_grad)
    return run_chunk(plan, s, t, batch, weights, want_grad)
