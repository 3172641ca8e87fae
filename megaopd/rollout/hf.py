"""The embedded engine: transformers' generate inside a training rank.

Every rank holds a full copy of the student and samples its share of the requests; right for small
models and for laptops. It is fed by the same weight stream as a server.

Sampling is by Gumbel-max with noise that is a hash of the request's seed, so a response depends on
its own seed and not on what it is batched with, on how many ranks there are, or on what was sampled
before. Shapes: B batch, P prompt (left-padded), V vocabulary.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.rollout.base import Request, SamplingParams, check_requests


class EmbeddedEngine:
    """A transformers model of the student's checkpoint, refreshed in place.

    Args:
        hf_dir: the checkpoint whose config defines the model.
        eos_ids: a response ends with any of these tokens, which is part of it.
        pad_id: fills the left of shorter prompts.
        batch_size: most sequences generated together.
    """

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
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self.model.generation_config.pad_token_id = pad_id
        self.model.generation_config.eos_token_id = list(eos_ids)
        self.eos_ids, self.pad_id, self.batch_size = frozenset(eos_ids), pad_id, batch_size
        self.weight_version = -1
        tied = bool(getattr(config, "tie_word_embeddings", False))
        self.parameters = {
            name: tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if not (tied and name == "lm_head.weight")
        }

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Copy the stream into the model in place."""
        waiting = set(self.parameters)
        self.weight_version = -1  # until every tensor has arrived
        with torch.no_grad():
            for name, tensor in weights:
                target = self.parameters.get(name)
                if target is None or target.shape != tensor.shape:
                    raise UserError(
                        f"weight {name} of shape {tuple(tensor.shape)}",
                        expected=f"{tuple(target.shape)}" if target is not None else "no such one",
                    )
                target.copy_(tensor)
                waiting.discard(name)
        if waiting:
            raise UserError(f"weights missing: {sorted(waiting)[:3]} ({len(waiting)} in all)")
        self.weight_version = version

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        """One sample per request, in order."""
        assert self.weight_version >= 0, "no weights yet, or an update failed"
        config = self.model.config
        check_requests(
            requests, params, vocab=config.vocab_size, max_positions=config.max_position_embeddings
        )
        # Neighbours in length share a batch, so that little is padded.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.token_ids))
        samples: list[Sample | None] = [None] * len(requests)
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            made = self._generate_batch([requests[i] for i in chunk], params)
            for i, sample in zip(chunk, made, strict=True):
                samples[i] = sample
        return [sample for sample in samples if sample is not None]

    @torch.no_grad()
    def _generate_batch(self, requests: list[Request], params: SamplingParams) -> list[Sample]:
        width = max(len(r.prompt.token_ids) for r in requests)
        padded = [[self.pad_id] * (width - len(r.prompt.token_ids)) for r in requests]
        device = self.model.device
        ids = torch.tensor(
            [pad + list(r.prompt.token_ids) for pad, r in zip(padded, requests, strict=True)]
        )
        mask = torch.tensor(
            [[0] * len(pad) + [1] * (width - len(pad)) for pad in padded], device=device
        )
        sampler = SeededSampler([r.seed for r in requests], params)
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask,
            max_new_tokens=params.max_new_tokens,
            do_sample=False,
            use_cache=True,
            logits_processor=LogitsProcessorList([sampler]),
        )
        tokens = out[:, width:].tolist()
        log_probs = torch.stack(sampler.log_probs, 1).tolist()
        return [
            self._sample(request, row, row_log_probs)
            for request, row, row_log_probs in zip(requests, tokens, log_probs, strict=True)
        ]

    def _sample(self, request: Request, tokens: list[int], log_probs: list[float]) -> Sample:
        end = next((t for t, token in enumerate(tokens) if token in self.eos_ids), None)
        stopped = end is not None
        length = end + 1 if end is not None else len(tokens)
        return Sample(
            prompt=request.prompt,
            response_ids=tuple(tokens[:length]),
            log_probs=tuple(log_probs[:length]),
            finish_reason="stop" if stopped else "length",
            weight_version=self.weight_version,
            index=request.index,
        )


class SeededSampler(LogitsProcessor):
    """Draws each row's next token with noise of its own seed and records its log-prob.

    generate() then only has to follow: the returned scores have one finite entry per row.
    """

    def __init__(self, seeds: Sequence[int], params: SamplingParams) -> None:
        self.greedy = params.temperature == 0
        self.temperature = 1.0 if self.greedy else params.temperature
        self.seeds = torch.tensor(seeds)
        self.warpers: list[Any] = []
        if params.top_k and not self.greedy:
            self.warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1 and not self.greedy:
            self.warpers.append(TopPLogitsWarper(params.top_p))
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """[B, P], [B, V] -> [B, V] with -inf everywhere but at the chosen token."""
        logits = scores.float() / self.temperature
        for warp in self.warpers:
            logits = warp(input_ids, logits)
        log_probs = logits.log_softmax(-1)
        noisy = logits
        if not self.greedy:
            step = len(self.log_probs)
            noisy = log_probs + gumbel(self.seeds.to(logits.device), step, logits.shape[1])
        chosen = noisy.argmax(-1, True)
        self.log_probs.append(log_probs.gather(1, chosen).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


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
