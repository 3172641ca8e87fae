"""The embedded engine: transformers' generate inside a training rank.

Every rank holds a full copy of the student and samples its share of the requests; right for small
models and for laptops. It is fed by the same weight stream as a server.

Sampling is by Gumbel-max with noise that is a hash of the request's seed, so a response depends on
its own seed and not on what it is batched with, on how many ranks there are, or on what was sampled
before. Shapes: B batch, P prompt (left-padded), V vocabulary, K top ids.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from megaopd.data.types import Sample, Span
from megaopd.errors import UserError
from megaopd.models.arch import architecture, read_hf_config
from megaopd.rollout.base import NeedsWeights, Probe, Request, SamplingParams, check_requests
from megaopd.rollout.hf_names import by_file_name
from megaopd.rollout.mixed import ReadAlong, mixture


class EmbeddedEngine:
    """A transformers model of the student's checkpoint, refreshed in place.

    Args:
        hf_dir: the checkpoint whose config defines the model.
        eos_ids: a response ends with any of these tokens, which is part of it.
        pad_id: fills the left of shorter prompts.
        batch_size: most sequences generated together.
    """

    shared = False

    def __init__(
        self,
        hf_dir: str | Path,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int = 256,
    ) -> None:
        config = AutoConfig.from_pretrained(hf_dir, local_files_only=True)
        # The others ignore a soft-cap of the attention scores.
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        options = {"attn_implementation": "eager"} if capped else {}
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        self.model = model.to(device).eval().requires_grad_(False)
        self.model.generation_config.pad_token_id = pad_id
        self.eos_ids, self.pad_id, self.batch_size = frozenset(eos_ids), pad_id, batch_size
        self.weight_version = -1
        self.teacher: Any = None  # a transformers model, for SamplingParams.teacher_mix
        arch = architecture(read_hf_config(hf_dir), where=str(hf_dir))
        self.parameters = by_file_name(self.model.state_dict(keep_vars=True), arch)

    def update_weights(
        self, weights: Iterable[tuple[str, Any]], version: int, *, probe: Probe | None = None
    ) -> dict[str, float]:
        """Copy the stream, in the model's dtype; the model changes once all of it has arrived.

        Until then both copies are held. A stream that is refused leaves the old weights in place.
        The probe is not looked at: nothing stands between the stream and the model.
        """
        arrived: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            target = self.parameters.get(name)
            if target is None or target.shape != tensor.shape:
                raise UserError(
                    f"weight {name} of shape {tuple(tensor.shape)}",
                    expected=f"{tuple(target.shape)}" if target is not None else "no such one",
                )
            arrived[name] = tensor.detach().to(target.device, target.dtype, copy=True)
        missing = sorted(self.parameters.keys() - arrived.keys())
        if missing:
            raise UserError(f"weights missing: {missing[:3]} ({len(missing)} in all)")
        for name, target in self.parameters.items():
            if target._base is None:
                target.data = arrived.pop(name)
            else:  # an expert, which is a part of a tensor
                target.copy_(arrived.pop(name))
        self.weight_version = version
        return {}

    def mix_in(self, hf_dir: str | Path, weights: Iterable[tuple[str, Any]]) -> None:
        """Hold a teacher beside the student, for SamplingParams.teacher_mix; it stays as it is."""
        other = EmbeddedEngine(
            hf_dir,
            eos_ids=tuple(self.eos_ids),
            pad_id=self.pad_id,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        other.update_weights(weights, 0)
        self.teacher = other.model

    def session(self) -> "EmbeddedSession":
        return EmbeddedSession(self)

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        """One sample per request, in order."""
        self.check(requests, params)
        session = self.session()
        # Neighbours in length share a batch, so that little is padded.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.token_ids))
        place = {session.submit(requests[i], params): i for i in order}
        made: dict[int, Sample] = {}
        while session.pending:
            made |= {place[ticket]: sample for ticket, sample in session.wait()}
        return [made[i] for i in range(len(requests))]

    def metrics(self) -> dict[str, float]:
        return {}

    def release(self) -> None:
        """Nothing to give up: the model is a part of the trainer's process."""

    def resume(self, what: Literal["weights", "kv_cache"]) -> None:
        """Nothing was given up."""

    def close(self) -> None:
        """Nothing was started."""

    def check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        """Refuse what the model cannot take."""
        config = self.model.config
        check_requests(
            requests, params, vocab=config.vocab_size, max_positions=config.max_position_embeddings
        )
        if params.teacher_mix:
            self._check_mixture(requests, params.teacher_mix)

    def _check_mixture(self, requests: Sequence[Request], share: float) -> None:
        if self.teacher is None:
            raise UserError(
                "teacher_mix without a teacher in the engine", expected="mix_in() before"
            )
        for prompt in (request.prompt for request in requests):
            if prompt.teacher_prompt_ids not in (None, prompt.token_ids):
                raise UserError(
                    f"prompt {prompt.id!r} has a teacher's prompt of its own",
                    expected="none with rollout.teacher_mix: both models read the same one",
                    fix="set rollout.teacher_mix=0, or remove teacher_prompt from the data",
                )

    @torch.no_grad()
    def generate_batch(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        """The samples of checked requests, generated together."""
        if self.weight_version < 0:
            raise NeedsWeights("no weights yet")
        width = max(len(r.prompt.token_ids) for r in requests)
        padded = [[self.pad_id] * (width - len(r.prompt.token_ids)) for r in requests]
        device = self.model.device
        ids = torch.tensor(
            [pad + list(r.prompt.token_ids) for pad, r in zip(padded, requests, strict=True)]
        )
        mask = torch.tensor(
            [[0] * len(pad) + [1] * (width - len(pad)) for pad in padded], device=device
        )
        along = ReadAlong(self.teacher, mask) if params.teacher_mix else None
        sampler = SeededSampler([r.seed for r in requests], params, along)
        ends = self.eos_ids | set(params.stop_ids)
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=sorted(ends) or None,
            do_sample=False,
            use_cache=True,
            logits_processor=LogitsProcessorList([sampler]),
        )
        rows = zip(
            requests,
            out[:, width:].tolist(),
            torch.stack(sampler.log_probs, 1).tolist(),
            torch.stack(sampler.top_ids, 1).tolist() if params.top_ids else [None] * len(requests),
            strict=True,
        )
        return [self._sample(ends, *row) for row in rows]

    def _sample(
        self,
        ends: frozenset[int],
        request: Request,
        tokens: list[int],
        log_probs: list[float],
        top_ids: list[list[int]] | None,
    ) -> Sample:
        end = next((t for t, token in enumerate(tokens) if token in ends), None)
        length = len(tokens) if end is None else end + 1
        return Sample(
            prompt=request.prompt,
            response_ids=tuple(tokens[:length]),
            log_probs=tuple(log_probs[:length]),
            finish_reason="length" if end is None else "stop",
            weight_version=self.weight_version,
            index=request.index,
            spans=(Span(self.weight_version, 0, length),),
            top_ids=None if top_ids is None else tuple(tuple(ids) for ids in top_ids[:length]),
        )


class EmbeddedSession:
    """Requests that wait for their batch. Generation happens inside `wait`, and nowhere else.

    So only requests that still wait can be aborted (they have no tokens), a batch is never cut, and
    `wait` takes as long as its batch whatever its timeout.
    """

    def __init__(self, engine: EmbeddedEngine) -> None:
        self._engine = engine
        self._queue: dict[int, tuple[Request, SamplingParams]] = {}  # by ticket, oldest first
        self._aborted: list[tuple[int, Sample]] = []
        self._submitted = 0

    @property
    def pending(self) -> int:
        return len(self._queue) + len(self._aborted)

    def submit(self, request: Request, params: SamplingParams) -> int:
        self._engine.check([request], params)
        ticket = self._submitted
        self._submitted += 1
        self._queue[ticket] = (request, params)
        return ticket

    def wait(self, timeout: float | None = None) -> list[tuple[int, Sample]]:
        """What was aborted; else one batch: the oldest request, and others with its params."""
        if self._aborted or not self._queue:
            aborted, self._aborted = self._aborted, []
            return aborted
        params = next(iter(self._queue.values()))[1]
        same = [ticket for ticket, (_, p) in self._queue.items() if p == params]
        batch = same[: self._engine.batch_size]
        made = self._engine.generate_batch([self._queue[ticket][0] for ticket in batch], params)
        for ticket in batch:
            del self._queue[ticket]
        return list(zip(batch, made, strict=True))

    def abort(self, tickets: Iterable[int] | None = None) -> None:
        for ticket in list(self._queue) if tickets is None else tickets:
            if ticket not in self._queue:
                continue  # it has finished
            request, params = self._queue.pop(ticket)
            sample = Sample(
                prompt=request.prompt,
                response_ids=(),
                log_probs=(),
                finish_reason="abort",
                weight_version=self._engine.weight_version,
                index=request.index,
                top_ids=() if params.top_ids else None,
            )
            self._aborted.append((ticket, sample))

    def close(self) -> None:
        self._queue.clear()
        self._aborted.clear()


class SeededSampler(LogitsProcessor):
    """Draws each row's next token with noise of its own seed and records its log-prob.

    generate() then only has to follow: the returned scores have one finite entry per row.
    """

    def __init__(
        self, seeds: Sequence[int], params: SamplingParams, along: ReadAlong | None = None
    ) -> None:
        self.params, self.along = params, along
        self.seeds = torch.tensor(seeds)
        self.log_probs: list[torch.Tensor] = []  # [B] of each step
        self.top_ids: list[torch.Tensor] = []  # [B, K] of each step

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """[B, P], [B, V] -> [B, V] with -inf everywhere but at the chosen token."""
        step = len(self.log_probs)
        if self.params.top_ids:
            self.top_ids.append(scores.topk(min(self.params.top_ids, scores.shape[1])).indices)
        log_probs = law(scores.float(), self.params)
        if self.along is not None:
            other = law(self.along(input_ids, scores.shape[1]), self.params)
            log_probs = mixture(log_probs, other, self.params.teacher_mix)
        noisy = log_probs
        if self.params.temperature > 0:
            noisy = log_probs + gumbel(self.seeds.to(scores.device), step, scores.shape[1])
        chosen = noisy.argmax(-1, True)
        self.log_probs.append(log_probs.gather(1, chosen).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def law(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[B, V] logits -> [B, V] log-probs of the law that tokens are drawn from.

    SGLang's law: after the temperature, a token is kept if fewer than top_k are more probable, if
    those have no more than top_p of the *whole* vocabulary's mass (not of what top-k has left), and
    if it is no less probable than min_p x the most probable one. What is kept is renormalised.
    """
    log_probs = (logits / (params.temperature or 1.0)).log_softmax(-1)
    if not params.truncated:
        return log_probs
    size = logits.shape[-1]
    ordered, ids = log_probs.topk(min(params.top_k or size, size))
    probs = ordered.exp()
    cut = torch.zeros_like(ids, dtype=torch.bool)
    if params.top_p < 1:
        cut |= probs.cumsum(-1) - probs > params.top_p
    if params.min_p > 0:
        cut |= ordered < ordered[:, :1] + math.log(params.min_p)
    kept = ordered.masked_fill(cut, -torch.inf)
    return torch.full_like(log_probs, -torch.inf).scatter_(-1, ids, kept).log_softmax(-1)


def gumbel(seeds: torch.Tensor, step: int, vocab: int) -> torch.Tensor:
    """[B] int64 seeds -> [B, V] fp64 standard Gumbel noise g: argmax(log p + g) is a sample of p.

    A function of (seed, step, id) alone, computed on the seeds' device: splitmix64 (Steele, Lea and
    Flood, 2014) of the seed and step makes the row's stream, and again of its position the number.
    """
    row = _splitmix64(seeds + _signed(0x9E3779B97F4A7C15 * (step + 1)))
    ids = torch.arange(1, vocab + 1, device=seeds.device) * _signed(0x9E3779B97F4A7C15)
    bits = _splitmix64(row[:, None] + ids[None, :])
    uniform = (_shift(bits, 11).double() + 0.5) / 2.0**53
    return -(-uniform.log()).log()


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 on int64, whose products wrap around."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the low 64 bits of x."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >= 1 << 63 else x
