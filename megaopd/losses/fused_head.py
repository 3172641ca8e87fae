"""Losses at the output layer: hidden states in, scalar out, one chunk of logits at a time.

The vocabulary-sharded output layers of student and teacher are applied to a chunk of rows, the
chunk's losses and their gradient in the logits are computed in place (engine.py), and the gradients
of hidden states and weight are accumulated at once, in forward: four matrix products in all.
Backward multiplies by the upstream scalar and communicates nothing. Logits memory: [C, Vp] for the
student and for the teacher; nothing grows with T but hidden states and a few scalars a token.

Where the weight gradient goes:
  autograd   a [Vp, H] buffer, handed to autograd in backward, times the upstream scalar
  main_grad  straight into weight.main_grad (Megatron's fused accumulation): no buffer of its own
             (a bf16 weight makes one chunk's product in bf16 on the way to an fp32 main_grad). The
             gradient is there before backward runs, so the upstream scalar must be exactly 1;
             anything else raises. Nothing is written where gradients are off.

Arithmetic: matrix products in the weight's dtype, everything else in fp32 (fp64 for fp64 weights);
the weight gradient is accumulated in fp32.

Sequence parallel: rank r holds rows [r*T/R, (r+1)*T/R) of hidden states. A chunk takes C/R rows of
every rank (all-gather), its hidden gradient goes back to them (reduce-scatter), token weights and
labels are permuted alike; nothing gathers all T. The hidden gradient's collective of a chunk runs
while the next chunk is computed.

Shapes: T tokens, C rows of a chunk, R tensor-parallel ranks, H and Ht hidden, Vp = V/R local ids,
n terms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.engine import make_engine
from megaopd.losses.head_pass import HeadPass, Law, fused_head
from megaopd.losses.remote import ListedTeacher
from megaopd.losses.sampled import ESTIMATORS
from megaopd.losses.terms import CrossEntropy, Divergence, Sampled, Target, Term, divergence_term
from megaopd.losses.vocab_parallel import Group, Shard, group_size

PER_TOKEN = {"old_log_prob", "advantage", "baseline", "importance_weight"}


@dataclass(frozen=True)
class FusedLoss:
    """loss: scalar, carries the gradient. per_token [T] and stats (name -> [T]): detached.

    All are complete and the same on every tensor-parallel rank, in full-sequence order. terms:
    each objective's own per-token values, name -> [T]; per_token is their plain sum.
    """

    loss: Tensor
    per_token: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """A term and its weights [T]: coefficient x mask x importance weight / denominator."""

    term: Term
    token_weights: Tensor


@dataclass(frozen=True)
class OutputLayer:
    """A frozen model at the output layer: hidden [T, Ht] (T/R rows with sequence parallel), weight
    [Vp, Ht] on the student's vocabulary partition, bias [Vp] or None; its logits' soft-cap."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | Literal["student's"] | None = "student's"


def fused_linear_objectives(
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    teacher: OutputLayer | ListedTeacher | None,
    objectives: Mapping[str, Objective],
    *,
    base: OutputLayer | None = None,
    labels: Tensor | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    vocab_size: int | None = None,
    group: Group = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
    into_main_grad: bool = False,
    return_stats: bool = False,
    stats_k: int | None = None,
) -> FusedLoss:
    """sum over objectives and tokens of w_t L_t, in one pass over the logits.

    Each term (a divergence, a sampled-token term, cross-entropy, entropy) has its own token_weights
    [T]; they share the matrix products. Terms with the same temperature, target and list share all
    scalars too; each other law costs a copy of the chunk's logits. teacher: a model, or log-probs
    of a few tokens from elsewhere (remote.py). labels [T]: sampled or supervised tokens; inputs:
    what sampled terms take besides (old_log_prob, advantage, ...), [T] each. With sequence_parallel
    all of these still have T rows, hidden states T/R. softcap c: the student's z is c tanh(z/c),
    and so are the other models' unless they have a soft-cap of their own.

    Gradients: hidden (summed over `group`; with sequence_parallel its own rows), weight, bias.
    Collectives per chunk: chunk.py's; for the hidden gradient an all-reduce of [C, H] (sequence
    parallel: all-gathers, a reduce-scatter). return_stats: evaluate.py's quantities by name, [T]
    each; stats_k: on the student's top-k where no objective has a list of its own.
    Raises UserError for terms, shapes and options that do not fit together.
    """
    ranks, names = group_size(group) if sequence_parallel else 1, list(objectives)
    _check_shapes(hidden_TH, weight_VpH, ranks, teacher, base, objectives, labels, inputs or {})
    _check_inputs([one.term for one in objectives.values()], inputs or {})
    engine = make_engine(
        [objectives[n].term for n in names],
        Shard.of(weight_VpH.shape[0], group, vocab_size),
        softcaps=(softcap, _softcap(teacher, softcap), _softcap(base, softcap)),
        chunk_size=chunk_size,
        stats=return_stats,
        stats_k=stats_k,
        has_teacher=isinstance(teacher, OutputLayer),
        has_base=base is not None,
        has_labels=labels is not None,
        vocab_size=vocab_size,
        like=weight_VpH,
        known=teacher.known if isinstance(teacher, ListedTeacher) else None,
    )
    wide = torch.float64 if weight_VpH.dtype == torch.float64 else torch.float32
    weights = torch.stack([objectives[n].token_weights.detach().to(wide) for n in names])
    numbers = _numbers(inputs or {}, teacher, engine.shard, vocab_size, wide)
    laws = _frozen(teacher), _frozen(base)
    want_grad = torch.is_grad_enabled()  # always off inside an autograd.Function, so asked here
    passed = HeadPass(engine, ranks, want_grad, into_main_grad, laws, weights, labels, numbers)
    loss, per_token, stats = fused_head(hidden_TH, weight_VpH, bias, passed)
    total = per_token[0] if len(names) == 1 else per_token.sum(0)
    return FusedLoss(loss, total, stats, dict(zip(names, per_token, strict=True)))


def fused_linear_divergence(
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    teacher_hidden_THt: Tensor,
    teacher_weight_VpHt: Tensor,
    *,
    token_weights: Tensor,
    kind: str,
    support: str | None = None,
    k: int | None = None,
    variant: str | None = None,
    temperature: float = 1.0,
    beta: float | None = None,
    alpha: float | None = None,
    target: Target | None = None,
    base: OutputLayer | None = None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    group: Group = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
    into_main_grad: bool = False,
    return_stats: bool = False,
) -> FusedLoss:
    """sum_t w_t L_t of student p = softmax(f(h W')/tau) from teacher q = softmax(f(h_t W_t')/tau).

    The divergences are those of vocab_parallel_divergence, with the same keywords; rkl for
    instance: L = tau^2 KL(p||q), dL/dz = tau p (log p - log q - KL(p||q)). f is the identity, or
    softcap*tanh(z/softcap) for both models. token_weights [T] hold mask, importance weight and
    denominator, known before the pass; rows of weight 0 add nothing (they must be finite). `k` with
    support "full" is the list of the statistics. The rest is as in fused_linear_objectives.
    """
    term, stats_k = divergence_term(
        return_stats, k, kind=kind, support=support, variant=variant,
        temperature=temperature, alpha=alpha, beta=beta, target=target or Target(),
    )  # fmt: skip
    return fused_linear_objectives(
        hidden_TH,
        weight_VpH,
        OutputLayer(teacher_hidden_THt, teacher_weight_VpHt),
        {"loss": Objective(term, token_weights)},
        base=base,
        labels=labels,
        vocab_size=vocab_size,
        group=group,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        softcap=softcap,
        bias=bias,
        into_main_grad=into_main_grad,
        return_stats=return_stats,
        stats_k=stats_k,
    )


def fused_linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    labels_T: Tensor,
    *,
    token_weights: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: Group = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
    into_main_grad: bool = False,
    return_stats: bool = False,
) -> FusedLoss:
    """sum_t -w_t log p(label_t): supervised fine-tuning. dL/dz = (p - e_label) / tau.

    A label outside the vocabulary (an ignore index) gives an arbitrary finite per-token value: its
    weight must be 0. No temperature^2. return_stats adds student_log_prob and student_entropy.
    Collectives per chunk: one all-gather (12 B a token and rank in fp32; 16 with statistics);
    hidden states as in fused_linear_objectives.
    """
    return fused_linear_objectives(
        hidden_TH,
        weight_VpH,
        None,
        {"loss": Objective(CrossEntropy(temperature=temperature), token_weights)},
        labels=labels_T,
        vocab_size=vocab_size,
        group=group,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        softcap=softcap,
        bias=bias,
        into_main_grad=into_main_grad,
        return_stats=return_stats,
    )


def fused_linear_log_prob(
    hidden_TH: Tensor,
    weight_VpH: Tensor,
    ids_T: Tensor,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """log p(id_t) of each token, [T], without gradient, for scoring; the same on every rank.

    Collectives per chunk: one all-gather (12 B a token and rank in fp32).
    """
    with torch.no_grad():
        scored = fused_linear_cross_entropy(
            hidden_TH,
            weight_VpH,
            ids_T,
            token_weights=torch.zeros(ids_T.shape, device=hidden_TH.device),
            temperature=temperature,
            vocab_size=vocab_size,
            group=group,
            chunk_size=chunk_size,
            sequence_parallel=sequence_parallel,
            softcap=softcap,
            bias=bias,
        )
    return -scored.per_token


def _check_shapes(
    hidden: Tensor,
    weight: Tensor,
    ranks: int,
    teacher: OutputLayer | ListedTeacher | None,
    base: OutputLayer | None,
    objectives: Mapping[str, Objective],
    labels: Tensor | None,
    inputs: Mapping[str, Tensor],
) -> None:
    vectors = {
        "token_weights" + (f" of {name}" if len(objectives) > 1 else ""): one.token_weights
        for name, one in objectives.items()
    }
    if weight.dtype == torch.float16 and weight.requires_grad:
        raise UserError(
            "a float16 output layer that wants a gradient",
            expected="bfloat16 or float32",
            fix="token weights of 1e-5 leave float16's range: train in bfloat16",
        )
    vectors |= dict(inputs) | ({} if labels is None else {"labels": labels})
    for name, x in vectors.items():
        _check_rows(name, x, hidden.shape[0] * ranks, ranks)
    if isinstance(teacher, ListedTeacher):
        for name, x in teacher.rows().items():
            _check_length(name, x, hidden.shape[0] * ranks, ranks)
    for name, layer in (("teacher", teacher), ("base", base)):
        if isinstance(layer, OutputLayer):
            _check_rows(f"{name}_hidden", layer.hidden, hidden.shape[0], ranks)
            _check_partition(name, layer.weight, weight)


def _numbers(
    inputs: Mapping[str, Tensor],
    teacher: OutputLayer | ListedTeacher | None,
    shard: Shard,
    vocab_size: int | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """What comes with a chunk's rows: sampled terms' inputs, and numbers of a listed teacher."""
    numbers = {name: x.detach().to(dtype) for name, x in inputs.items()}
    if isinstance(teacher, ListedTeacher):
        numbers |= teacher.inputs(vocab_size or shard.width * group_size(shard.group), dtype)
    return numbers


def _frozen(layer: OutputLayer | ListedTeacher | None) -> Law | None:
    if not isinstance(layer, OutputLayer):
        return None
    bias = None if layer.bias is None else layer.bias.detach()
    return Law(layer.hidden.detach(), layer.weight.detach(), bias)


def _softcap(layer: OutputLayer | ListedTeacher | None, students: float | None) -> float | None:
    own = layer.softcap if isinstance(layer, OutputLayer) else "student's"
    return students if isinstance(own, str) else own


def _check_partition(name: str, weight: Tensor, student: Tensor) -> None:
    if weight.shape[0] != student.shape[0]:
        raise UserError(
            f"the {name}'s output layer has {weight.shape[0]} ids on this rank",
            expected=f"{student.shape[0]}, as the student's",
            fix=f"load the {name}'s output layer on the student's vocabulary partition",
        )


def _check_inputs(terms: Sequence[Term], inputs: Mapping[str, Tensor]) -> None:
    """A misspelt name would be a term that is silently another one."""
    known: set[str] = set()
    for term in terms:
        if isinstance(term, Divergence) and term.variant == "sampled_tail":
            known.add("old_log_prob")
        if isinstance(term, Sampled) and term.estimator in ESTIMATORS:
            names = PER_TOKEN & set(ESTIMATORS[term.estimator].inputs)
            known |= {term.advantage if n == "advantage" else n for n in names}
    unknown = sorted(set(inputs) - known)
    if unknown:
        raise UserError(
            f"inputs {unknown}",
            expected=f"some of {sorted(known)}" if known else "none: no objective takes any",
            fix="the engine makes the teacher's log-prob itself; check the spelling of the others",
        )


def _check_rows(name: str, x: Tensor, rows: int, ranks: int) -> None:
    vector = not name.endswith("hidden")
    if vector and x.dim() != 1:
        raise UserError(f"{name} of shape {list(x.shape)}", expected="[T]", fix="flatten it")
    _check_length(name, x, rows, ranks)


def _check_length(name: str, x: Tensor, rows: int, ranks: int) -> None:
    if x.shape[0] != rows:
        raise UserError(
            f"{name} has {x.shape[0]} rows",
            expected=f"{rows}, from the hidden states" + (f" x {ranks} ranks" * (ranks > 1)),
            fix="token_weights and labels take the full sequence, hidden states this rank's part",
        )


__all__: Sequence[str] = [
    "FusedLoss",
    "Objective",
    "OutputLayer",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "fused_linear_log_prob",
    "fused_linear_objectives",
]
