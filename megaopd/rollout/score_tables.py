"""What is asked of a teacher's server about one sequence, and how its answer is read. No network.

SGLang scores given tokens with max_new_tokens = 0: row s of the sequence predicts token s + 1, and
`logprob_start_len` = s returns one entry for each token from s on, the first of them empty. With
the last prompt token as start, entry j + 1 belongs to response token j.

    sampled   input_token_logprobs       [log q, id, text] a position
    teacher   input_top_logprobs         k pairs a position; base64 of two arrays where the release
                                         has return_flat_raw_top_logprobs_b64 (11 B an entry
                                         instead of 31, and nothing to parse)
    student   input_token_ids_logprobs   one flat list of ids a request, for every position of it

The last one makes a support of the student expensive: a request over L positions whose supports
have U ids together answers with L x U numbers, of which L x K were wanted. So the response is cut
into pieces, each a request of its own that ends where the piece ends (its prefix is in the server's
radix cache). See `plan_pieces`. With K = 20 that is still some 250 B an id, against 11 of a
teacher's list: prefer those where the loss allows it.

Shapes: R response tokens, K entries of a list, U ids of a piece.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megaopd.data.types import LOG_PROB_CEILING
from megaopd.errors import UserError
from megaopd.losses.remote import ABSENT
from megaopd.rollout.http import BadAnswer

Array = np.ndarray[Any, Any]
# One more request costs about as much as this many more entries: of 300, 1000, 3000 and 10000 the
# fastest, on one core for server and client (16 samples of 512 tokens, 20 ids each).
REQUEST_ENTRIES = 1000


@dataclass(frozen=True)
class ScoreRequest:
    """A response that the teacher is to score behind its own prompt, which may be longer.

    k: length of the teacher's own list at each position; 0: none. top_ids: the ids that the teacher
    is asked about at each response position, () where nothing is; None: none. Not both.
    """

    name: str  # for messages
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    k: int = 0
    top_ids: tuple[tuple[int, ...], ...] | None = None

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class TokenScores:
    """log_q [R] of the sampled tokens, NaN where the server gave none; ids, list_log_q [R, K]."""

    log_q: Array
    ids: Array | None = None  # int32, ABSENT where there is no entry
    list_log_q: Array | None = None  # float32

    @property
    def valid(self) -> Array:
        """[R]: positions with all that was asked for."""
        found = np.isfinite(self.log_q)
        return found if self.ids is None else found & (self.ids != ABSENT).any(1)


@dataclass(frozen=True)
class Piece:
    """Response positions [start, stop) that are asked about together, and all their ids."""

    start: int
    stop: int
    ids: tuple[int, ...]

    @property
    def entries(self) -> int:
        return (self.stop - self.start) * len(self.ids)


@dataclass(frozen=True)
class Job:
    """One sequence of one call to /generate."""

    name: str
    input_ids: tuple[int, ...]
    start: int  # logprob_start_len
    k: int = 0
    ids: tuple[int, ...] = field(default=(), repr=False)

    @property
    def kind(self) -> tuple[bool, bool]:
        """Jobs of one call must ask for the same fields."""
        return bool(self.k), bool(self.ids)


def whole_job(request: ScoreRequest) -> Job:
    """The sampled tokens' log-probs, and the teacher's own lists."""
    tokens = request.prompt_ids + request.response_ids
    return Job(request.name, tokens, len(request.prompt_ids) - 1, request.k)


def piece_job(request: ScoreRequest, piece: Piece) -> Job:
    tokens = request.prompt_ids + request.response_ids[: piece.stop]
    start = len(request.prompt_ids) - 1 + piece.start
    return Job(request.name, tokens, start, ids=piece.ids)


def plan_pieces(request: ScoreRequest, *, max_union: int, max_entries: int) -> list[Piece]:
    """Cut the response so that few requests answer with few entries that nobody wanted.

    Cost model: a piece of L positions with U ids costs C + L U with C = REQUEST_ENTRIES. A piece
    grows while its mean cost a position falls, U' - U <= C / (L (L + 1)), and U' <= max_union.
    Where each position brings d ids of its own, that is up to L = sqrt(C / d): 7 positions for 20
    new ids each. A position without ids (an injected token) ends a piece.

    Raises:
        UserError: more than max_entries in all, or one position with more than max_union ids.
    """
    assert request.top_ids is not None
    longest = max(map(len, request.top_ids), default=0)
    if longest > max_union:
        raise UserError(
            f"{request.name}: {longest} ids at one position",
            expected=f"at most {max_union} (remote_teacher.max_union)",
            fix="lower objective.k, or set objective.support=teacher_topk",
        )
    pieces: list[Piece] = []
    start, union = 0, set[int]()
    for position, ids in enumerate([*request.top_ids, ()]):
        grown, length = union.union(ids), position - start
        if union:
            worth = REQUEST_ENTRIES / (length * (length + 1))
            new = len(grown) - len(union)
            if not ids or new > worth or len(grown) > max_union:
                pieces.append(Piece(start, position, tuple(sorted(union))))
                union = set()
        if not union:
            start, grown = position, set(ids)
        union = grown
    _check_total(request, pieces, max_entries)
    return pieces


def _check_total(request: ScoreRequest, pieces: Sequence[Piece], max_entries: int) -> None:
    total = sum(piece.entries for piece in pieces)
    if total <= max_entries:
        return
    wanted = sum(map(len, request.top_ids or ()))
    raise UserError(
        f"{request.name}: {total:,} log-probs in {len(pieces)} requests for the {wanted:,} of the "
        "student's supports",
        expected=f"at most {max_entries:,} a sample (remote_teacher.max_entries): a server takes "
        "one list of ids a request, for all its positions",
        fix="set objective.support=teacher_topk, lower objective.k, or raise "
        f"remote_teacher.max_entries to {total}",
    )


def read_whole(meta: Mapping[str, Any], request: ScoreRequest, vocab: int) -> TokenScores:
    """The answer to `whole_job`.

    Raises:
        BadAnswer: other tokens or lengths than were sent, or a log-prob above 0.
    """
    rows = meta.get("input_token_logprobs") or []
    count = len(request.response_ids)
    if len(rows) != count + 1:
        raise BadAnswer(f"{len(rows)} log-probs for {count + 1} tokens")
    for token, row in zip(request.response_ids, rows[1:], strict=True):
        # 0.5.23 reports the vocabulary's last id as 0; the log-prob is the right one's.
        if row[1] != token and not (row[1] == 0 and token == vocab - 1):
            raise BadAnswer(f"a log-prob of token {row[1]} where {token} was sent")
    log_q = _checked([row[0] for row in rows[1:]])
    if not request.k:
        return TokenScores(log_q)
    ids, list_log_q = _read_top(meta, count, request.k)
    return TokenScores(log_q, ids, list_log_q)


def _read_top(meta: Mapping[str, Any], count: int, k: int) -> tuple[Array, Array]:
    """ids, log q [R, K] of the teacher's own lists, from either form of the answer."""
    if "input_top_logprobs_val_flat_b64" in meta:
        shape = tuple(meta["input_top_logprobs_shape"])
        if shape != (count, k) or meta["input_top_logprobs_null_prefix"] != 1:
            raise BadAnswer(f"lists of shape {shape} for {count} tokens and k = {k}")
        ids, log_q = (
            np.frombuffer(
                base64.b64decode(meta[f"input_top_logprobs_{name}_flat_b64"]),
                np.dtype(meta[f"input_top_logprobs_{name}_flat_b64_dtype"]).newbyteorder("<"),
            ).reshape(shape)
            for name in ("idx", "val")
        )
        return ids.astype(np.int32), _checked(log_q)
    rows = (meta.get("input_top_logprobs") or [])[1:]
    if len(rows) != count or any(row is None or len(row) != k for row in rows):
        raise BadAnswer(f"lists for {len(rows)} of {count} tokens, or not of {k} entries")
    table = np.array([[entry[:2] for entry in row] for row in rows], dtype=np.float64)
    table = table.reshape(count, k, 2)
    return table[..., 1].astype(np.int32), _checked(table[..., 0])


def read_piece(meta: Mapping[str, Any], piece: Piece) -> Array:
    """[L, U] log q of the piece's ids, in their order."""
    rows = (meta.get("input_token_ids_logprobs") or [])[1:]
    if len(rows) != piece.stop - piece.start or any(len(row) != len(piece.ids) for row in rows):
        raise BadAnswer(f"{len(rows)} rows for positions {piece.start} to {piece.stop}")
    if any(entry[1] != token for entry, token in zip(rows[0], piece.ids, strict=True)):
        raise BadAnswer("log-probs of other ids than were asked about")
    return _checked([[entry[0] for entry in row] for row in rows])


def fill_lists(request: ScoreRequest, tables: Sequence[tuple[Piece, Array]]) -> tuple[Array, Array]:
    """ids, log q [R, K] at the student's ids, K the longest support; ABSENT elsewhere."""
    assert request.top_ids is not None
    shape = (len(request.response_ids), max(map(len, request.top_ids), default=0))
    ids, log_q = np.full(shape, ABSENT, np.int32), np.full(shape, np.nan, np.float32)
    for piece, table in tables:
        known = np.asarray(piece.ids, np.int32)
        for position in range(piece.start, piece.stop):
            mine = np.asarray(request.top_ids[position], np.int32)
            values = table[position - piece.start, np.searchsorted(known, mine)]
            ids[position, : len(mine)] = np.where(np.isfinite(values), mine, ABSENT)
            log_q[position, : len(mine)] = values
    return ids, log_q


def _checked(log_q: Any) -> Array:
    """float32, NaN where there is none; rounding above 0 is cut off.

    Raises:
        BadAnswer: above 0 by more than rounding.
    """
    values = np.asarray(log_q, dtype=np.float64)
    values = np.where(np.isfinite(values), values, np.nan)
    if (values > LOG_PROB_CEILING).any():
        raise BadAnswer(f"a log-prob of {np.nanmax(values)}")
    return np.minimum(values, 0.0).astype(np.float32)
