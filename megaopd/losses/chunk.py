"""One chunk of vocabulary-sharded logits: statistics -> loss -> d loss / d logits.

Used by dense.py (logits are given) and by fused_head.py (logits are made chunk by chunk), so there
is one place where a loss is defined. With s, t the scaled student and teacher logits, m their
maximum:

    Z_s = sum e^(s-m_s)                     Z_t = sum e^(t-m_t)
    d_s = sum e^(s-m_s) [(s-m_s)-(t-m_t)]   rkl = d_s/Z_s - log Z_s + log Z_t
    d_t = sum e^(t-m_t) [(t-m_t)-(s-m_s)]   fkl = d_t/Z_t - log Z_t + log Z_s
    a_s = sum e^(s-m_s) (s-m_s)             entropy of p = log Z_s - a_s/Z_s    (a_t likewise)
    y_s = s[label] - m_s                    log p(label) = y_s - log Z_s        (y_t likewise)

The combined differences d_s, d_t keep the digits that two separate cross-entropies lose. All sums
of a chunk travel in one SUM collective, both maxima in one MAX: 4 bytes a token and scalar (rkl
with statistics: 2 + 7 of them, 36 B/token in fp32). The gradient needs no communication.

A new loss is a new entry in DIVERGENCES. Shapes: C rows, Vp local ids (padding already sliced off).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megaopd.errors import UserError
from megaopd.losses.vocab_parallel import Shard, all_reduce_max_, all_reduce_sum_

Moments = dict[str, Tensor]  # name -> [C]

# A chunk is worked on in blocks of rows, so that the temporaries (some five of a block's size) stay
# small next to the chunk's logits: within a CPU's cache, and large enough to fill a GPU.
BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 23}
DEFAULT_CHUNK = 1024

STATS = ("student_log_prob", "teacher_log_prob", "student_entropy", "teacher_entropy")


@dataclass(frozen=True)
class Kind:
    """One loss: the sums it needs, its value from them, and its gradient on a block of rows."""

    moments: tuple[str, ...]
    value: Callable[[Moments], Tensor]
    # (s, t, moments, scale_C) of a block -> overwrites s with scale * d value / d s
    gradient_: Callable[[Tensor, Tensor | None, Moments, Tensor], None]
    uses_teacher: bool = True
    uses_labels: bool = False
    # temperature^2 keeps the size of a divergence's gradient; a log-prob must stay one.
    tau_squared: bool = True


@dataclass(frozen=True)
class Plan:
    """What to compute on each chunk. Static: the same for every chunk and on every rank."""

    kind: Kind
    shard: Shard
    temperature: float = 1.0
    softcap: float | None = None
    stats: tuple[str, ...] = ()
    chunk_size: int = DEFAULT_CHUNK

    @property
    def moment_names(self) -> tuple[str, ...]:
        """The rows of the SUM collective: what the loss needs, then what the statistics need."""
        names = dict.fromkeys(self.kind.moments)
        for stat in self.stats:
            names.update(dict.fromkeys(_STAT_MOMENTS[stat]))
        return tuple(names)

    @property
    def needs_teacher(self) -> bool:
        return any(name.endswith("_t") for name in self.moment_names)

    def loss_of(self, moments: Moments) -> Tensor:
        """Per-token loss [C], temperature factor included."""
        value = self.kind.value(moments)
        return value * self.temperature**2 if self.kind.tau_squared else value


def scale_logits_(logits_CVp: Tensor, plan: Plan) -> Tensor:
    """In place: soft-cap c*tanh(z/c), then 1/temperature. Both models get the same treatment."""
    if plan.softcap is not None:
        logits_CVp.div_(plan.softcap).tanh_().mul_(plan.softcap)
    return logits_CVp if plan.temperature == 1.0 else logits_CVp.div_(plan.temperature)


def chunk_moments(s: Tensor, t: Tensor | None, labels: Tensor | None, plan: Plan) -> Moments:
    """All scalars of a chunk, complete on every rank: one MAX and one SUM collective.

    s, t [C, Vp] are read only. Returns m_s (and m_t) and plan.moment_names, each [C].
    """
    pair = {"m_s": s} if t is None else {"m_s": s, "m_t": t}
    maxima = torch.stack([_row_max(x) for x in pair.values()])
    moments: Moments = dict(zip(pair, all_reduce_max_(maxima, plan.shard.group), strict=True))
    names = plan.moment_names
    sums = s.new_empty(len(names), s.shape[0])
    for rows in _row_blocks(s):
        block = _block_sums(s, t, moments, names, rows)
        for i, name in enumerate(names):
            if name in block:
                sums[i, rows] = block[name]
    for i, name in enumerate(names):
        if name in ("y_s", "y_t"):
            assert labels is not None
            mask, value = plan.shard.gather_owned(s if name == "y_s" else _need(t), labels)
            sums[i] = torch.where(mask, value - moments["m" + name[1:]], 0.0)
    moments.update(zip(names, all_reduce_sum_(sums, plan.shard.group), strict=True))
    return moments


def chunk_gradient_(
    s: Tensor, t: Tensor | None, labels: Tensor | None, moments: Moments, coef: Tensor, plan: Plan
) -> None:
    """Overwrites s [C, Vp] with coef_C * d loss / d logits (before scale_logits_). Local."""
    tau = plan.temperature
    scale = coef * (tau if plan.kind.tau_squared else 1.0 / tau)
    owned = plan.shard.owned(labels) if plan.kind.uses_labels and labels is not None else None
    for rows in _row_blocks(s):
        block = s[rows]
        slope = None
        if plan.softcap is not None:
            slope = (block * (tau / plan.softcap)).square_().neg_().add_(1.0)
        local = {name: value[rows] for name, value in moments.items()}
        plan.kind.gradient_(block, None if t is None else t[rows], local, scale[rows])
        if owned is not None and plan.shard.valid:
            mask, column = owned
            hit = torch.where(mask[rows], -scale[rows], 0.0)
            block.scatter_add_(1, column[rows][:, None], hit[:, None])
        if slope is not None:
            block.mul_(slope)


def chunk_stats(moments: Moments, plan: Plan) -> Tensor:
    """[len(plan.stats), C], in the order of plan.stats; temperature included, no temperature^2."""
    rows = []
    for stat in plan.stats:
        log_z = moments["z_" + stat[0]].log()
        if stat.endswith("entropy"):
            rows.append(log_z - moments["a_" + stat[0]] / moments["z_" + stat[0]])
        else:
            rows.append(moments["y_" + stat[0]] - log_z)
    return torch.stack(rows) if rows else moments["m_s"].new_empty(0, *moments["m_s"].shape)


def choose_stats(wanted: bool, has_teacher: bool, has_labels: bool) -> tuple[str, ...]:
    """Log-probs need labels, and the teacher's rows a teacher."""
    return tuple(
        stat
        for stat in STATS
        if wanted
        and (has_teacher or stat.startswith("student"))
        and (has_labels or stat.endswith("entropy"))
    )


def divergence_kind(kind: str, support: str) -> Kind:
    """The registry's entry, or a UserError that lists what exists."""
    if support != "full":
        raise UserError(f"support={support!r}", expected="'full'", fix="use support='full'")
    if kind not in DIVERGENCES:
        raise UserError(
            f"kind={kind!r}",
            expected="one of " + ", ".join(map(repr, DIVERGENCES)),
            fix="'rkl' is KL(student||teacher), 'fkl' is KL(teacher||student)",
        )
    return DIVERGENCES[kind]


def make_plan(
    kind: Kind,
    shard: Shard,
    *,
    temperature: float,
    softcap: float | None = None,
    stats: tuple[str, ...] = (),
    chunk_size: int | None = None,
) -> Plan:
    """Checks the scalars that users set."""
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise UserError(f"{name}={value}", expected="a number > 0", fix=f"set {name} > 0")
    chunk_size = DEFAULT_CHUNK if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise UserError(f"chunk_size={chunk_size}", expected="at least 1", fix="try 1024")
    return Plan(kind, shard, temperature, softcap, stats, chunk_size)


def _need(t: Tensor | None) -> Tensor:
    assert t is not None, "this loss needs teacher logits"
    return t


def _row_max(x: Tensor) -> Tensor:
    if x.shape[1] == 0:  # a shard that holds nothing but padding
        return x.new_full(x.shape[:1], -torch.inf)
    return x.amax(1)


def _row_blocks(x: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS[x.device.type] // max(1, x.shape[1]))
    for a in range(0, x.shape[0], step):
        yield slice(a, min(a + step, x.shape[0]))


def _weighted(e: Tensor, d: Tensor) -> Tensor:
    """e * d where 0 * inf is 0: a token of probability zero contributes nothing.

    A NaN among the logits is not hidden: it is in Z as well, and every result is divided by Z.
    """
    return (e * d).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _block_sums(
    s: Tensor, t: Tensor | None, moments: Moments, names: tuple[str, ...], rows: slice
) -> Moments:
    x = s[rows] - moments["m_s"][rows, None]
    e_s = x.exp()
    sums = {"z_s": e_s.sum(1)}
    if "a_s" in names:
        sums["a_s"] = _weighted(e_s, x).sum(1)
    if t is None:
        return sums
    y = t[rows] - moments["m_t"][rows, None]
    e_t = y.exp()
    sums["z_t"] = e_t.sum(1)
    if "a_t" in names:
        sums["a_t"] = _weighted(e_t, y).sum(1)
    d = x.sub_(y)
    if "d_s" in names:
        sums["d_s"] = _weighted(e_s, d).sum(1)
    if "d_t" in names:
        sums["d_t"] = -_weighted(e_t, d).sum(1)
    return sums


def _rkl(m: Moments) -> Tensor:
    return m["d_s"] / m["z_s"] - m["z_s"].log() + m["z_t"].log()


def _rkl_gradient_(s: Tensor, t: Tensor | None, m: Moments, scale: Tensor) -> None:
    # p (rho - rkl), and rho - rkl = (s-m_s) - (t-m_t) - d_s/Z_s: the normalisers cancel.
    s.sub_(m["m_s"][:, None])
    d = s - _need(t)
    d.add_((m["m_t"] - m["d_s"] / m["z_s"])[:, None])
    torch.mul(s.exp_(), d, out=s)
    s.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    s.mul_((scale / m["z_s"])[:, None])


def _fkl(m: Moments) -> Tensor:
    return m["d_t"] / m["z_t"] - m["z_t"].log() + m["z_s"].log()


def _fkl_gradient_(s: Tensor, t: Tensor | None, m: Moments, scale: Tensor) -> None:
    q = (_need(t) - m["m_t"][:, None]).exp_().mul_((scale / m["z_t"])[:, None])
    s.sub_(m["m_s"][:, None]).exp_().mul_((scale / m["z_s"])[:, None]).sub_(q)


def _cross_entropy(m: Moments) -> Tensor:
    return m["z_s"].log() - m["y_s"]


def _cross_entropy_gradient_(s: Tensor, t: Tensor | None, m: Moments, scale: Tensor) -> None:
    # p only; chunk_gradient_ subtracts the one-hot on the rank that owns the label.
    s.sub_(m["m_s"][:, None]).exp_().mul_((scale / m["z_s"])[:, None])


_STAT_MOMENTS = {
    "student_log_prob": ("z_s", "y_s"),
    "teacher_log_prob": ("z_t", "y_t"),
    "student_entropy": ("z_s", "a_s"),
    "teacher_entropy": ("z_t", "a_t"),
}

DIVERGENCES: dict[str, Kind] = {
    "rkl": Kind(("z_s", "z_t", "d_s"), _rkl, _rkl_gradient_),
    "fkl": Kind(("z_s", "z_t", "d_t"), _fkl, _fkl_gradient_),
}

CROSS_ENTROPY = Kind(
    ("z_s", "y_s"),
    _cross_entropy,
    _cross_entropy_gradient_,
    uses_teacher=False,
    uses_labels=True,
    tau_squared=False,
)
