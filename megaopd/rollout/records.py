"""Between our records and SGLang's /generate: what a request says, and what an answer holds.

A response may come in several legs: a server that stops early (aborted at a sync, too slow, gone)
leaves what it has sampled, and the next request goes on from there. `Draft` joins them.

The reported log-probs. SGLang's own are those of the whole vocabulary after temperature; where the
law is cut (top-k, top-p, min-p) it reports those of the cut law too if asked for the sampling mask,
whose size is bounded (`Limits.mask_tokens`): a law that only top-p or min-p cuts is cut to that
many tokens besides. Top-k and top-p both look at the law after temperature, and a token must pass
both.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from operator import itemgetter
from typing import Any

from megaopd.data.types import LOG_PROB_CEILING, FinishReason, Sample, Span
from megaopd.errors import UserError
from megaopd.rollout.base import Request, SamplingParams
from megaopd.rollout.http import BadAnswer


class UnknownWeights(Exception):
    """Tokens that were sampled by weights which nobody verified.

    Attributes:
        tag: what the server calls them.
        current: whether the newest tokens are such: the server still holds these weights.
    """

    def __init__(self, tag: str, *, current: bool) -> None:
        super().__init__(f"it samples from weights {tag!r}, which were not verified")
        self.tag, self.current = tag, current


@dataclass(frozen=True)
class Limits:
    """What the model and all servers allow."""

    vocab: int
    max_positions: int  # prompt and response together
    mask_tokens: int  # tokens of a cut law whose log-probs are reported; 0: they are not
    seeded: bool  # the servers draw by the requests' seeds (--enable-deterministic-inference)


@dataclass(frozen=True, slots=True)
class Leg:
    """What one answer holds: lists over its tokens, in order."""

    tokens: Sequence[int]
    log_probs: Sequence[float]
    spans: Sequence[Span]
    top_ids: Sequence[tuple[int, ...]] | None
    end: FinishReason


@dataclass(slots=True)
class Draft:
    """The legs of one response, joined."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    top_ids: list[tuple[int, ...]] = field(default_factory=list)

    def extend(self, leg: Leg) -> None:
        """Append a leg; spans of the same weights that meet become one."""
        start = len(self.tokens)
        self.tokens.extend(leg.tokens)
        self.log_probs.extend(leg.log_probs)
        self.top_ids.extend(leg.top_ids or ())
        for span in leg.spans:
            begin = span.start + start
            if self.spans and self.spans[-1].version == span.version:
                begin = self.spans.pop().start
            self.spans.append(Span(span.version, begin, span.end + start))

    def sample(
        self, request: Request, params: SamplingParams, finish: FinishReason, *, version: int
    ) -> Sample:
        """The record.

        Args:
            version: the engine's current weights; named where there is no token that could say.
        """
        return Sample(
            prompt=request.prompt,
            response_ids=tuple(self.tokens),
            log_probs=tuple(self.log_probs),
            finish_reason=finish,
            weight_version=min((span.version for span in self.spans), default=version),
            index=request.index,
            spans=tuple(self.spans),
            top_ids=tuple(self.top_ids) if params.top_ids else None,
        )


def check_law(params: SamplingParams, limits: Limits) -> None:
    """Refuse a law that these servers cannot sample from, or not report the log-probs of.

    Raises:
        UserError: names the parameter.
    """
    if params.truncated and not limits.mask_tokens:
        raise UserError(
            "top_p, top_k or min_p with an SGLang that does not report log-probs of a cut law",
            expected="temperature alone, or a release that has return_sampling_mask",
            fix="upgrade SGLang, or leave rollout.top_p=1, rollout.top_k=0, rollout.min_p=0",
        )
    if params.truncated and params.top_k > max(limits.mask_tokens, 1) < limits.vocab:
        raise UserError(
            f"top_k = {params.top_k}",
            expected=f"at most {limits.mask_tokens}, of which SGLang reports log-probs",
            fix="lower rollout.top_k, or raise --sampling-mask-max-tokens in server.extra_args",
        )
    if params.truncated and params.min_p and limits.seeded:
        raise UserError(
            f"min_p = {params.min_p} with --enable-deterministic-inference",
            expected="no min_p: SGLang's seeded sampler ends the server there",
            fix="set rollout.min_p=0, or drop the flag",
        )


def generate_body(
    request: Request,
    params: SamplingParams,
    draft: Draft,
    *,
    rid: str,
    ends: Iterable[int],
    limits: Limits,
) -> dict[str, Any]:
    """The JSON of a /generate request for the rest of a response.

    Args:
        rid: no other one may begin with it: SGLang aborts by prefix.
        ends: ids that end a response; they are part of it.
    """
    law: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens - len(draft.tokens),
        "temperature": params.temperature,
        "stop_token_ids": sorted(ends),
    }
    if limits.seeded:
        law["sampling_seed"] = request.seed
    body: dict[str, Any] = {
        "rid": rid,
        "input_ids": [*request.prompt.token_ids, *draft.tokens],
        "sampling_params": law,
        "return_logprob": True,
        "logprob_start_len": -1,
    }
    if params.truncated:
        # A finite top_k always: SGLang reports the log-probs of a cut law of bounded size only.
        law["top_k"] = min(params.top_k or limits.vocab, limits.vocab, limits.mask_tokens)
        law["top_p"], law["min_p"] = params.top_p, params.min_p
        body["return_sampling_mask"] = True
    if params.top_ids:
        body["top_logprobs_num"] = params.top_ids
    return body


def read_leg(
    answer: Any, params: SamplingParams, versions: Mapping[str, int], *, unbroken: int | None = None
) -> Leg:
    """What an answer of /generate holds.

    Args:
        versions: of the tags that are verified on the server that answered.
        unbroken: the weights that the server held all the while, if it did; believed where a
            release reports no spans.

    Raises:
        BadAnswer: something is missing, of another length, or not a number.
        UnknownWeights: a tag is not in `versions`.
    """
    try:
        meta = answer["meta_info"]
        finish = meta["finish_reason"]
        end = finish["type"]
        tokens, log_probs, top_ids = _read_tokens(answer["output_ids"], meta, params, end)
        spans = _read_spans(meta, len(tokens), versions, unbroken)
        matched = finish.get("matched")
    except (KeyError, TypeError, IndexError, AttributeError) as err:
        raise BadAnswer(f"an answer without what was asked for ({err!r})") from err
    if end not in ("stop", "length", "abort") or isinstance(matched, str):
        raise BadAnswer(f"a response that ended by {finish}")  # NaN in the logits ends it so
    return Leg(tokens, _checked(log_probs), spans, top_ids, end)


def _read_tokens(
    tokens: list[int], meta: Any, params: SamplingParams, end: str
) -> tuple[list[int], list[float], list[tuple[int, ...]] | None]:
    """Tokens, log-probs of the law, and the most probable ids where asked for: of one length."""
    entries = meta.get("output_token_logprobs") or []
    sampled = list(map(itemgetter(1), entries))
    log_probs = list(map(itemgetter(0), entries))
    if params.truncated:
        log_probs = meta.get("output_token_sampling_logprobs") or []
    top_ids = None
    if params.top_ids:
        rows = meta.get("output_top_logprobs") or []
        top_ids = [tuple(map(itemgetter(1), row)) for row in rows]
    lengths = {len(tokens), len(sampled), len(log_probs)}
    lengths |= set() if top_ids is None else {len(top_ids)}
    count = min(lengths)
    # Of a request aborted in a server's queue (retracted before), the cut law is not told.
    if (len(lengths) > 1 and end != "abort") or sampled[:count] != tokens[:count]:
        raise BadAnswer(f"{len(tokens)} tokens with {len(log_probs)} log-probs, or of other tokens")
    return tokens[:count], log_probs[:count], None if top_ids is None else top_ids[:count]


def _read_spans(
    meta: Any, count: int, versions: Mapping[str, int], unbroken: int | None
) -> list[Span]:
    """The spans of `count` tokens, which they cover in order."""
    if not count:
        return []
    named = meta.get("weight_versions")
    if named is None:
        tag = str(meta.get("weight_version", ""))
        if unbroken is None or (tag and versions.get(tag) != unbroken):
            raise UnknownWeights(tag, current=False)
        return [Span(unbroken, 0, count)]
    spans, end = [], 0
    for entry in named:
        start, stop = entry["start"], min(entry["end"], count)
        if start >= stop:
            continue
        if start != end:
            raise BadAnswer(f"weight_versions {named} of {count} tokens")
        if entry["version"] not in versions:
            raise UnknownWeights(entry["version"], current=entry is named[-1])
        spans.append(Span(versions[entry["version"]], start, stop))
        end = stop
    if end != count:
        raise BadAnswer(f"weight_versions {named} of {count} tokens")
    return spans


def _checked(log_probs: list[float]) -> list[float]:
    """Log-probs that are finite and at most 0; rounding above it is cut off."""
    try:
        good = all(map(isfinite, log_probs)) and max(log_probs, default=0.0) <= LOG_PROB_CEILING
    except TypeError:  # null: NaN or an infinity that JSON cannot hold
        good = False
    if not good:
        bad = next(p for p in log_probs if p is None or not -1e30 < p <= LOG_PROB_CEILING)
        raise BadAnswer(f"a log-prob of {bad}")
    if max(log_probs, default=0.0) > 0.0:
        return [min(p, 0.0) for p in log_probs]
    return log_probs
