"""What a transformer layer keeps for its backward pass, module by module, and what it works with.

Two tables of the same kind, read off the code: `local` (megatron-core's local layer spec with
models/spec.py's RMSNorm and models/attention.py on torch's CPU kernels) and `te` (Transformer
Engine's modules and megatron-core's fused SwiGLU on a GPU). Only the first is measured
(docs/planner.json).

Shapes: t tokens of a micro-batch on one context rank, ts = t/TP under sequence parallel and t
without; H hidden, Q and K columns of the query and key heads of a tensor rank, F of its MLP.
Bytes everywhere; e of an activation. `saved` tensors are freed once the earliest module that holds
them has run backward; `backward` is what exists besides saved tensors at the worst moment of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megaopd.plan.job import Job, Side, Spec

# Tokens of the busiest expert rank over the mean: an assumption, not a measurement.
IMBALANCE = 1.2
# torch.get_rng_state() on a CPU: what a recomputed block keeps beside its input, four times.
RNG_STATE = 5056


@dataclass(frozen=True)
class Module:
    """One step of a layer."""

    name: str
    saved: dict[str, float] = field(default_factory=dict)  # tensor -> bytes
    forward: float = 0.0  # beside what is saved, at the worst moment of its forward pass
    backward: float = 0.0
    flow: float = 0.0  # what it hands to the next module, where nobody saves that


@dataclass(frozen=True)
class Sizes:
    """The quantities of the tables for one model and one micro-batch."""

    t: int
    ts: int
    e: int
    hidden: int
    query: int  # of this tensor rank
    key: int
    ffn: int
    heads: int
    kv_heads: int
    batch: int
    rope: int  # bytes of one [S, 1, 1, D] table of cosines in the activations' type
    sequence_parallel: bool
    qk_norm: bool
    context: int

    @classmethod
    def of(cls, job: Job, side: Side) -> "Sizes":
        arch, tensor = side.arch, side.tensor
        t = job.tokens(side)
        return cls(
            t=t,
            ts=t // side.ranks_of_sequence,
            e=side.itemsize,
            hidden=arch.hidden,
            query=side.model.query // tensor,
            key=side.model.key // tensor,
            ffn=arch.ffn // tensor,
            heads=arch.heads // tensor,
            kv_heads=arch.kv_heads // tensor,
            batch=job.micro_batch,
            rope=job.padded_sequence // side.layout.context * arch.head_dim * side.itemsize,
            sequence_parallel=side.layout.sequence,
            qk_norm=arch.qk_norm,
            context=side.layout.context,
        )

    @property
    def stream(self) -> int:
        """The residual stream, [ts, H]."""
        return self.ts * self.hidden * self.e

    @property
    def full(self) -> int:
        """[t, H]: the input of a split product, gathered under sequence parallel."""
        return self.t * self.hidden * self.e

    @property
    def gathered(self) -> int:
        """An extra [t, H] that only sequence parallel makes."""
        return self.full if self.sequence_parallel else 0

    def wide(self, columns: float) -> float:
        """[t, columns] of activations."""
        return self.t * columns * self.e

    @property
    def mixed(self) -> float:
        """Queries, keys and values as the one product gives them."""
        return self.wide(self.query + 2 * self.key)


def layer_modules(job: Job, side: Side, *, sparse: bool = False) -> list[Module]:
    """The modules of one layer in forward order, under job.spec."""
    sizes = Sizes.of(job, side)
    attention = _attention(sizes, job.spec)
    mlp = _experts(sizes, side, job.spec) if sparse else _mlp(sizes, job.spec)
    return [*attention, *mlp]


def _norm(name: str, source: str, sizes: Sizes, spec: Spec) -> Module:
    """RMSNorm of the residual stream; its output is saved by the product that follows."""
    stream, rows = float(sizes.stream), 4.0 * sizes.ts
    if spec == "te":
        return Module(name, {source: stream, f"{name}.rstd": rows}, backward=2 * stream)
    # torch's composite RMSNorm works in fp32: for bf16 it keeps a wide copy of its input instead of
    # the input, and always the normalised rows. Backward: four temporaries of pow, mean and mul.
    wide = 4.0 * sizes.ts * sizes.hidden
    held = source if sizes.e == 4 else f"{name}.fp32"
    saved = {held: wide, f"{name}.rstd": rows, f"{name}.normal": wide}
    return Module(name, saved, forward=stream + wide, backward=2 * stream + 4 * wide)


def _head_norms(sizes: Sizes, spec: Spec) -> Module:
    """Norms of the query and key heads."""
    query, key = sizes.wide(sizes.query), sizes.wide(sizes.key)
    rstd = 4 * sizes.t * (sizes.heads + sizes.kv_heads)
    if spec == "te":
        held = {"query": query, "qkv": sizes.mixed, "qk_norm.rstd": rstd}
        return Module("qk_norm", held, backward=2 * (query + key))
    wide = sizes.t * (sizes.query + sizes.key) * 4
    saved: dict[str, float] = {"qk_norm.normal": wide, "qk_norm.rstd": rstd}
    saved |= {"query": query, "qkv": sizes.mixed} if sizes.e == 4 else {"qk_norm.fp32": wide}
    return Module("qk_norm", saved, forward=2 * wide, backward=query + 2 * key + 4 * wide)


def _attention(sizes: Sizes, spec: Spec) -> list[Module]:
    stream, hidden = sizes.stream, sizes.hidden
    query, key, mixed = sizes.wide(sizes.query), sizes.wide(sizes.key), sizes.mixed
    weight = sizes.e * hidden * (sizes.query + 2 * sizes.key)
    # The query heads of grouped-query attention are no view of the product's output: a copy.
    modules = [
        _norm("input_norm", "input", sizes, spec),
        Module(
            "qkv",
            {"input_norm.out": stream},
            forward=mixed,
            backward=stream + mixed + sizes.full + weight,
            flow=mixed + query,
        ),
    ]
    if sizes.qk_norm:
        modules.append(_head_norms(sizes, spec))
    tables: dict[str, float] = {"rope": 4.0 * sizes.rope} if spec == "local" else {}
    lse = 4 * sizes.t * sizes.heads
    core = {"rotated": query + key, "qkv": mixed, "context": query, "lse": lse}
    ring = 4 * 2 * key if sizes.context > 1 else 0  # keys and values of the neighbours, in flight
    return [
        *modules,
        Module(
            "rope",
            tables,
            forward=mixed + 4 * query,
            backward=stream + 3 * query + 2 * key,
            flow=query + key,
        ),
        Module(
            "core_attention",
            core,
            forward=ring,
            backward=stream + 2 * query + 2 * key + ring,
        ),
        Module(
            "proj",
            {"context": query},
            forward=stream + sizes.gathered + (query if sizes.batch > 1 else 0),
            backward=stream + sizes.gathered + 2 * query + sizes.e * hidden * sizes.query,
            flow=stream,
        ),
    ]


def _mlp(sizes: Sizes, spec: Spec) -> list[Module]:
    stream, hidden = sizes.stream, sizes.hidden
    one, weight = sizes.wide(sizes.ffn), sizes.e * hidden * sizes.ffn
    if spec == "local":
        # silu(gate), up + 0.0 and their product are tensors of their own.
        activation = Module(
            "swiglu",
            {"fc1": 2 * one, "silu": one, "up": one},
            forward=one,
            backward=stream + 3 * one,
        )
    else:
        activation = Module("swiglu", {"fc1": 2 * one}, forward=one, backward=stream + 3 * one)
    scattered = stream if sizes.sequence_parallel else 0
    return [
        _norm("mlp_norm", "middle", sizes, spec),
        Module(
            "fc1",
            {"mlp_norm.out": stream},
            forward=2 * one,
            backward=stream + max(4 * one, 2 * one + sizes.full + scattered + 2 * weight),
        ),
        activation,
        Module(
            "fc2",
            {"product": one},
            forward=stream + sizes.gathered,
            backward=stream + sizes.gathered + one + weight,
            flow=stream,
        ),
    ]


def _experts(sizes: Sizes, side: Side, spec: Spec) -> list[Module]:
    """Router, all-to-all, and the experts' products. No tensor rank splits an expert: each routes
    its ts tokens, and gets as many rows on average for the experts that it holds."""
    experts, stream, spread = side.arch.experts, sizes.stream, sizes.ts
    assert experts is not None
    sent = spread * experts.top_k * sizes.hidden * sizes.e
    rows = sent * IMBALANCE
    one = spread * experts.top_k * IMBALANCE * experts.ffn * sizes.e
    # Logits, probabilities as they were and turned, two maps; indices, fp32 weights and counts.
    router = spread * (10 * experts.count + 24 * experts.top_k)
    shared = sizes.wide(experts.shared_ffn / side.tensor)
    held = experts.count / side.layout.expert
    weight = 2.0 * sizes.e * sizes.hidden * experts.ffn
    kept = {"expert.in": rows, "expert.fc1": 2 * one, "expert.product": one, "shared": 3 * shared}
    if spec == "te":
        weight *= 1.5 * held  # the grouped product gives all of them at once
        backward = stream + 2 * rows + 3 * one + weight
    else:
        # silu(gate), up + 0.0 and the product before it is weighted are tensors of their own; one
        # expert after the other.
        kept |= {"expert.silu": one, "expert.up": one, "expert.plain": one}
        backward = stream + 2 * rows + sent + (2 * rows + 5 * one) / held + weight
    dispatched = Module(
        "dispatch",
        {"mlp_norm.out": stream, "router": router},
        forward=sent + rows,
        backward=stream + sent + rows,
    )
    grouped = Module("experts", kept, forward=2 * rows, backward=backward, flow=stream)
    return [_norm("mlp_norm", "middle", sizes, spec), dispatched, grouped]


def saved_bytes(modules: Sequence[Module]) -> float:
    """Of one layer and micro-batch, each tensor once."""
    tensors: dict[str, float] = {}
    for module in modules:
        tensors |= module.saved
    return sum(tensors.values())


def backward_peak(modules: Sequence[Module]) -> float:
    """Bytes at the worst moment of a layer's backward pass, its own saved tensors included."""
    return max(saved_bytes(modules[: i + 1]) + m.backward for i, m in enumerate(modules))


def forward_peak(modules: Sequence[Module]) -> float:
    """The same of its forward pass with gradients."""
    return max(saved_bytes(modules[: i + 1]) + m.forward + m.flow for i, m in enumerate(modules))


def inference_peak(job: Job, side: Side, *, sparse: bool = False) -> float:
    """Bytes beside the weights at the worst moment of a layer without gradients.

    The stage's and the layer's input, the stream after attention, the normalised stream, and the
    widest part of the MLP or of the attention.
    """
    sizes = Sizes.of(job, side)
    one, stream = sizes.wide(sizes.ffn), sizes.stream
    if sparse:
        _, dispatch, grouped = _experts(sizes, side, job.spec)
        mlp = dispatch.saved["router"] + saved_bytes([grouped]) + grouped.forward
    else:
        mlp = one * (5 if job.spec == "local" else 3)
    query, key = sizes.wide(sizes.query), sizes.wide(sizes.key)
    attention = sizes.mixed + 3 * query + key
    return 4 * stream + sizes.gathered + max(mlp, attention)
