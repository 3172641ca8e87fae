"""One chunk of a vocabulary shard in plain torch: local sums in, d loss / d logits out.

Everything that touches all C x Vp numbers is here (and, for CUDA, in kernels/): chunk.py only
handles a few numbers a token. The work goes through the chunk in blocks of rows small enough to
stay in a CPU's cache, with in-place operations on the two logits buffers and a few block-sized
scratch buffers; on two cores' worth of cache that is what decides the time.

The gradient of every loss has the form (x = log p, y = log q, complete over all shards)

    dz_v = p (p_coef + pd_coef (s - t) + px_coef x) + q_coef q + sum_i coef_i G_i(x, y)

with one coefficient a row. A program says which of these occur, so that the buffers can be reused:

    zero     nothing (losses that live on a list of tokens alone)
    p        cross-entropy, sampled terms, top-k with a tail bucket
    rkl      p and pd: after the sums, buffers hold e^s and e^s (s - t)
    fkl      p and q:  after the sums, buffers hold e^s and e^t
    general  anything else: recomputed from the logits

Exponentials are taken without subtracting the row's maximum, which saves two passes; where a sum
leaves [1/LIMIT, LIMIT], the block is done again with the maximum as offset. Offsets are part of the
result, so shards and blocks may differ in them.

Shapes: C rows, Vp local ids (padding sliced off); row vectors [C].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaopd.losses.divergences import KINDS, Laws

# Elements of a block: what a core's cache holds of some five buffers; on CUDA enough to fill it.
BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
SCALE_FLOOR = 1e-20
LIMIT = 1e15  # a row's sum of exponentials; its square and the products with it stay in fp32
LOG_LIMIT = 34.0

Part = tuple[str, float, Tensor]  # kind, parameter, coefficient [C]


@dataclass
class Norm:
    """log p = s - m_s - log_z_s, log q = t - m_t - log_z_t; [C] each, complete over all shards."""

    m_s: Tensor
    log_z_s: Tensor
    m_t: Tensor | None = None
    log_z_t: Tensor | None = None

    def rows(self, rows: slice) -> "Norm":
        pick = (self.m_s, self.log_z_s, self.m_t, self.log_z_t)
        return Norm(*(None if x is None else x[rows] for x in pick))  # pyright: ignore


@dataclass
class Coefs:
    """Row coefficients of the gradient; None: the term does not occur."""

    p: Tensor
    pd: Tensor | None = None
    px: Tensor | None = None
    q: Tensor | None = None
    parts: list[Part] = field(default_factory=list)


class Blocks:
    """The passes over one chunk: moments, then (general) divergence_sums, then gradient.

    s and t are overwritten. `complete`: no other shard exists, and nothing but the one divergence
    of unit weight enters the gradient, so that rkl and fkl finish each block while it is in cache.
    unit: one term of unit weight alone. head_max: largest logit [C] of each law among the tokens
    that were taken out of s and t (topk.py); offsets are then large enough for those as well.
    """

    def __init__(
        self,
        s: Tensor,
        t: Tensor | None,
        program: str,
        complete: bool = False,
        unit: bool = False,
        head_max: Sequence[Tensor] | None = None,
    ) -> None:
        self.s, self.t = s, t
        self.unit, self.head_max = unit, head_max
        self.program = program
        self.complete = complete and program in ("rkl", "fkl")
        self.step = max(1, BLOCK_ELEMENTS[s.device.type] // max(1, s.shape[1]))
        self.offsets = s.new_zeros(1 if t is None else 2, s.shape[0])
        self._scratch = [s.new_empty(min(self.step, s.shape[0]), s.shape[1]) for _ in range(3)]
        self._stored = False  # divergence_sums left p in s and sum coef G in t

    def moments(self, names: Sequence[str]) -> Tensor:
        """[len(names), C] sums over this shard relative to self.offsets.

        z_s = sum e^(s-m_s)   d_s = sum e^(s-m_s) (s-t)   a_s = sum e^(s-m_s) s
        q_s = sum e^2(s-m_s)  r_s = sum e^2(s-m_s) (s-t)  and z_t, d_t, a_t likewise.
        """
        sums = self.s.new_zeros(len(names), self.s.shape[0])
        if self.s.shape[1] == 0:
            self.offsets.fill_(-torch.inf)
            return sums
        body = {"rkl": self._rkl, "fkl": self._fkl, "p": self._p}.get(self.program, self._read)
        for rows in self._blocks():
            found = body(rows, names)
            for i, name in enumerate(names):
                sums[i, rows] = found[name]
        return sums

    def divergence_sums(self, norm: Norm, coefs: Coefs) -> Tensor:
        """[len(parts) + 1, C]: sum p f(r) of each part; last the sum of every coef G.

        Leaves p in s and all of the gradient but p_coef p in t.
        """
        sums = self.s.new_zeros(len(coefs.parts) + 1, self.s.shape[0])
        for rows in self._blocks():
            laws = self._laws(rows, norm)
            total = torch.zeros_like(laws.p)
            for i, (kind, parameter, coef) in enumerate(coefs.parts):
                term, g = KINDS[kind].pair(laws, parameter)
                sums[i, rows] = term.sum(1)
                total.addcmul_(g, coef[rows, None])
            sums[-1, rows] = total.sum(1)
            self._add_linear(total, laws, coefs, rows)
            assert self.t is not None
            self.s[rows], self.t[rows] = laws.p, total
        self._stored = True
        return sums

    def gradient(self, norm: Norm, coefs: Coefs) -> tuple[Tensor, Tensor | None]:
        """(D, scale [C] or None) with dz = D * scale; D lies in one of the logits buffers."""
        if self.program == "zero" or self.s.shape[1] == 0:
            return self.s.zero_(), None
        if self.program == "general":
            return self._general_gradient(norm, coefs), None
        scale = (self.offsets[0] - norm.m_s - norm.log_z_s).exp()
        # A shard whose logits all lie far below another's: its factor would underflow.
        low = scale < SCALE_FLOOR
        rest = torch.where(low, scale, 1.0) if bool(low.any()) else None
        scale = scale if rest is None else torch.where(low, 1.0, scale)
        return self._finish(norm, coefs, scale, rest), scale

    def _finish(self, norm: Norm, coefs: Coefs, scale: Tensor, rest: Tensor | None) -> Tensor:
        """D of the programs that stored e^s; `rest` is the part of e^s's factor not in scale."""
        p = coefs.p if rest is None else coefs.p * rest
        if self.program == "p":
            return (self.s if self.t is None else self.t).mul_(p[:, None])
        if self.complete:
            return self.s
        assert self.t is not None
        if self.program == "rkl":  # s: e (s - t), t: e
            assert coefs.pd is not None
            pd = coefs.pd if rest is None else coefs.pd * rest
            return self._combine(self.s, pd, self.t, p, self.unit and rest is None)
        assert coefs.q is not None and norm.m_t is not None and norm.log_z_t is not None
        q = coefs.q * (self.offsets[1] - norm.m_t - norm.log_z_t).exp() / scale
        return self._combine(self.s, p, self.t, q, self.unit and rest is None)

    def _combine(self, a: Tensor, a_coef: Tensor, b: Tensor, b_coef: Tensor, unit: bool) -> Tensor:
        """In place a * a_coef + b * b_coef, block by block; unit: a_coef is 1."""
        for rows in self._blocks():
            if not unit:
                a[rows].mul_(a_coef[rows, None])
            a[rows].addcmul_(b[rows], b_coef[rows, None])
        return a

    def _blocks(self) -> Iterator[slice]:
        for a in range(0, self.s.shape[0], self.step):
            yield slice(a, min(a + self.step, self.s.shape[0]))

    def _exp(self, x: Tensor, out: Tensor, law: int, rows: slice) -> tuple[Tensor, Tensor]:
        """(e^(x - offset) in `out`, its row sums); x is kept. The offset is 0 where it can be."""
        z = torch.exp(x, out=out).sum(1)
        low, high = torch.aminmax(z)
        top = None if self.head_max is None else self.head_max[law][rows]
        safe = bool(low > 1 / LIMIT) and bool(high < LIMIT)
        if not safe or (top is not None and not bool((top < LOG_LIMIT).all())):
            offset = x.amax(1) if top is None else torch.maximum(x.amax(1), top)
            self.offsets[law, rows] = offset
            z = torch.sub(x, offset[:, None], out=out).exp_().sum(1)
        return out, z

    def _teacher(self, rows: slice, names: Sequence[str], out: Tensor, tmp: Tensor) -> dict:
        """Sums of the teacher alone; e^t in out."""
        if self.t is None:
            return {}
        e, z = self._exp(self.t[rows], out, 1, rows)
        found = {"z_t": z}
        if "a_t" in names:
            found["a_t"] = torch.mul(e, self.t[rows], out=tmp).sum(1)
        return found

    def _student(self, e: Tensor, s: Tensor, names: Sequence[str], tmp: Tensor) -> dict:
        found = {}
        if "a_s" in names:
            found["a_s"] = torch.mul(e, s, out=tmp).sum(1)
        if "q_s" in names:
            found["q_s"] = torch.mul(e, e, out=tmp).sum(1)
        return found

    def _three(self, rows: slice) -> list[Tensor]:
        return [x[: rows.stop - rows.start] for x in self._scratch]

    def _rkl(self, rows: slice, names: Sequence[str]) -> dict:
        assert self.t is not None
        s, t = self.s[rows], self.t[rows]
        a, b, c = self._three(rows)
        found = self._teacher(rows, names, a, b)
        if "d_t" in names:
            found["d_t"] = torch.sub(t, s, out=b).mul_(a).sum(1)
        d = torch.sub(s, t, out=a)
        e, z = self._exp(s, b if self.complete else t, 0, rows)
        found |= self._student(e, s, names, c)
        torch.mul(d, e, out=s)
        if "r_s" in names:
            found["r_s"] = torch.mul(s, e, out=c).sum(1)
        found["z_s"], found["d_s"] = z, s.sum(1)
        if self.complete:
            s.addcmul_(e, (found["d_s"] / z).neg_()[:, None])
        return found

    def _fkl(self, rows: slice, names: Sequence[str]) -> dict:
        assert self.t is not None
        found = self._read(rows, names)
        e_t, e_s, _ = self._three(rows)
        if self.complete:
            ratio = found["z_s"] / found["z_t"]
            torch.addcmul(e_s, e_t, ratio.neg_()[:, None], out=self.s[rows])
        else:
            self.s[rows], self.t[rows] = e_s, e_t
        return found

    def _p(self, rows: slice, names: Sequence[str]) -> dict:
        found = self._read(rows, names)
        (self.s if self.t is None else self.t)[rows] = self._three(rows)[1]
        return found

    def _read(self, rows: slice, names: Sequence[str]) -> dict:
        """All sums; s and t are left as they are, e^t and e^s in the first two scratch buffers."""
        s = self.s[rows]
        a, b, c = self._three(rows)
        found = self._teacher(rows, names, a, c)
        if self.t is not None and "d_t" in names:
            found["d_t"] = torch.sub(self.t[rows], s, out=c).mul_(a).sum(1)
        e, found["z_s"] = self._exp(s, b, 0, rows)
        found |= self._student(e, s, names, c)
        if self.t is not None and "d_s" in names:
            found["d_s"] = torch.sub(s, self.t[rows], out=c).mul_(e).sum(1)
            if "r_s" in names:
                found["r_s"] = c.mul_(e).sum(1)
        return found

    def _laws(self, rows: slice, norm: Norm) -> Laws:
        n = norm.rows(rows)
        x = (self.s[rows] - n.m_s[:, None]).sub_(n.log_z_s[:, None])
        if self.t is None:
            return Laws(x, x, x.exp(), x)
        assert n.m_t is not None and n.log_z_t is not None
        y = (self.t[rows] - n.m_t[:, None]).sub_(n.log_z_t[:, None])
        return Laws.of(x, y)

    def _add_linear(self, out: Tensor, laws: Laws, coefs: Coefs, rows: slice) -> None:
        """out += p (pd (s - t) + px x) + q_coef q; s - t is still in the buffers here."""
        if coefs.pd is not None:
            assert self.t is not None
            d = (self.s[rows] - self.t[rows]).mul_(laws.p)
            out.addcmul_(d, coefs.pd[rows, None])
        if coefs.px is not None:
            out.addcmul_(laws.p * laws.x, coefs.px[rows, None])
        if coefs.q is not None:
            out.addcmul_(laws.q, coefs.q[rows, None])

    def _general_gradient(self, norm: Norm, coefs: Coefs) -> Tensor:
        if self._stored:
            assert self.t is not None
            return self.t.addcmul_(self.s, coefs.p[:, None])
        for rows in self._blocks():
            laws = self._laws(rows, norm)
            total = laws.p * coefs.p[rows, None]
            self._add_linear(total, laws, coefs, rows)
            self.s[rows] = total
        return self.s
