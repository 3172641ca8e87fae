"""What is measured: inputs, the bare matrix products, and our losses as a table.

Shapes: T tokens, H hidden, V vocabulary, Vp = V/TP ids of this rank, C rows of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.losses import fused_linear_divergence
from megaopd.losses.engine import default_chunk
from megaopd.losses.vocab_parallel import Shard

from .measure import storage_bytes


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement; student and teacher have the same hidden size.

    chunk: tokens whose logits are held at once; 0 is the losses' own choice, until resolved().
    """

    tokens: int
    hidden: int
    vocab: int
    chunk: int = 0

    def resolved(self, ranks: int) -> "Shape":
        """With the chunk that the losses take on this number of ranks."""
        shard = Shard.of(self.vocab // ranks, None, None)
        chunk = self.chunk or default_chunk(shard, torch.device("cpu"))
        return replace(self, chunk=min(chunk, self.tokens))

    def chunks(self) -> list[slice]:
        return [
            slice(a, min(a + self.chunk, self.tokens)) for a in range(0, self.tokens, self.chunk)
        ]

    def logits_bytes(self, ranks: int) -> int:
        """One fp32 tensor of all tokens' logits on a rank."""
        return self.tokens * self.vocab // ranks * 4


@dataclass
class Inputs:
    """hidden and weight are leaves that want gradients; weights are this rank's rows of V."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    token_weights: Tensor
    labels: Tensor
    rank: int = 0
    ranks: int = 1
    group: Any = None

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, rank: int = 0, ranks: int = 1) -> "Inputs":
        """The same for every rank but for the slice of the vocabulary.

        Logits have a standard deviation of 3, and the teacher's are the student's with noise, so
        that the divergences are those of two related models. Every token weighs 1/T: the only
        weighting that all implementations can express.
        """
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=generator) * scale

        t, h, v = shape.tokens, shape.hidden, shape.vocab
        shard = slice(rank * v // ranks, (rank + 1) * v // ranks)
        hidden, weight = normal(t, h), normal(v, h, scale=3 / h**0.5)
        teacher_hidden = hidden + normal(t, h, scale=0.3)
        teacher_weight = weight + normal(v, h, scale=0.3 / h**0.5)
        return cls(
            shape,
            hidden.to(dtype).requires_grad_(),
            weight[shard].to(dtype, copy=True).requires_grad_(),
            teacher_hidden.to(dtype),
            teacher_weight[shard].to(dtype, copy=True),
            torch.full((t,), 1 / t, dtype=torch.promote_types(dtype, torch.float32)),
            torch.randint(0, v, (t,), generator=generator),
            rank,
            ranks,
        )

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None
        if hasattr(self.weight, "main_grad"):
            self.weight.main_grad.zero_()

    def make_main_grad(self) -> None:
        """The buffer that Megatron keeps for a weight, once for all methods."""
        if not hasattr(self.weight, "main_grad"):
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            self.weight.main_grad = torch.zeros_like(self.weight, dtype=wide, requires_grad=False)


@dataclass
class Outcome:
    """What a forward pass returns: the loss to call backward() on, and whatever else it made."""

    loss: Tensor
    extras: list[Tensor] = field(default_factory=list)


Forward = Callable[[], Outcome]


@dataclass(frozen=True)
class Method:
    """An implementation of one objective; `note` says which, for the reader of the document.

    `objective` holds keywords of megaopd.losses.reference.divergence. `logits_copies`: how many
    fp32 tensors of all tokens' logits live at once, roughly. `partial_loss`: each rank's loss is a
    part of a sum over ranks. `main_grad`: the weight gradient goes to weight.main_grad, a buffer
    that is there before, as for the bare products.
    """

    name: str
    objective: dict[str, Any]
    build: Callable[[Inputs], Forward]
    note: str = ""
    ours: bool = False
    tensor_parallel: bool = True
    logits_copies: int = 0
    partial_loss: bool = False
    main_grad: bool = False


CASES: dict[str, dict[str, Any]] = {
    "rkl": {"kind": "rkl"},
    "fkl": {"kind": "fkl"},
    "jsd": {"kind": "jsd", "beta": 0.5},
    "skew_fkl": {"kind": "skew_fkl", "alpha": 0.1},
    "skew_rkl": {"kind": "skew_rkl", "alpha": 0.1},
    "rkl_top20_tail": {"kind": "rkl", "support": "student_topk", "k": 20, "variant": "tail"},
    "rkl_top20_sg": {"kind": "rkl", "support": "student_topk", "k": 20, "variant": "sg"},
    "kl_top64": {"kind": "fkl", "support": "teacher_topk", "k": 64, "variant": "renorm"},
}


def our_methods() -> list[Method]:
    """Each case without and with statistics ("+stats"), and accumulating into main_grad."""
    methods = []
    for name, objective in CASES.items():
        note = ", ".join(str(value) for value in objective.values())
        plain = Method(name, objective, _ours(objective, stats=False), note, ours=True)
        methods.append(plain)
        methods.append(replace(plain, name=f"{name}+stats", build=_ours(objective, stats=True)))
        into = _ours(objective, stats=False, main_grad=True)
        methods.append(replace(plain, name=f"{name}>main_grad", build=into, main_grad=True))
    return methods


def _ours(
    objective: dict[str, Any], stats: bool, main_grad: bool = False
) -> Callable[[Inputs], Forward]:
    def build(inputs: Inputs) -> Forward:
        if main_grad:
            inputs.make_main_grad()

        def forward() -> Outcome:
            result = fused_linear_divergence(
                inputs.hidden,
                inputs.weight,
                inputs.teacher_hidden,
                inputs.teacher_weight,
                token_weights=inputs.token_weights,
                labels=inputs.labels if stats else None,
                return_stats=stats,
                group=inputs.group,
                chunk_size=inputs.shape.chunk,
                into_main_grad=main_grad,
                **objective,
            )
            return Outcome(result.loss, [result.per_token, *result.stats.values()])

        return forward

    return build


class Products:
    """The four matrix products that no implementation can do without, and nothing else.

    A chunk: student logits, teacher logits, hidden gradient, accumulation of the weight gradient.
    All results go into buffers that are made once; the "gradient" of the logits is the logits.
    summed: each chunk's hidden gradient is summed over the ranks meanwhile, as a vocabulary
    split must do without sequence parallel.
    """

    def __init__(self, inputs: Inputs, chunked: bool, summed: bool = False) -> None:
        self.group, self.summed = inputs.group, summed
        tokens = inputs.shape.tokens
        self.chunks = inputs.shape.chunks() if chunked else [slice(0, tokens)]
        self.hidden, self.weight = inputs.hidden.detach(), inputs.weight.detach()
        self.teacher_hidden, self.teacher_weight = inputs.teacher_hidden, inputs.teacher_weight
        rows = max(c.stop - c.start for c in self.chunks)
        self.student = self.hidden.new_empty(rows, self.weight.shape[0])
        self.teacher = torch.empty_like(self.student)
        self.hidden_gradient = torch.empty_like(self.hidden)
        self.weight_gradient = torch.zeros_like(self.weight)

    def __call__(self) -> None:
        sums = []
        for c in self.chunks:
            rows = c.stop - c.start
            s, t, h = self.student[:rows], self.teacher[:rows], self.hidden[c]
            torch.mm(h, self.weight.t(), out=s)
            torch.mm(self.teacher_hidden[c], self.teacher_weight.t(), out=t)
            torch.mm(s, self.weight, out=self.hidden_gradient[c])
            if self.summed:
                part = self.hidden_gradient[c]
                sums.append(dist.all_reduce(part, group=self.group, async_op=True))
            self.weight_gradient.addmm_(s.t(), h)
        for one in sums:
            one.wait()

    def memory(self) -> dict[str, int]:
        """Bytes of the buffers, in the keys of a record."""
        outputs = storage_bytes([self.hidden_gradient, self.weight_gradient])
        logits = storage_bytes([self.student, self.teacher])
        return {"peak_bytes": logits + outputs, "output_bytes": outputs}
