"""The plain truth that engines are held to: a tiny transformers model and the law, written out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from megaopd.data.types import Prompt, Sample
from megaopd.rollout.base import Request, SamplingParams
from tests.dist.models import VOCAB, tiny

EOS = VOCAB - 1
POSITIONS = 1024
PROMPTS = [[5, 9, 3], [7, 7, 7, 7, 7, 7, 7], [1], [50, 20, 30, 40]]
# Sharp enough that the end token hardly ever comes: see `model`.
LONG = SamplingParams(900, temperature=0.5)


def model(seed: int = 7) -> Any:
    """A tiny model with room for long responses; its end token is rare unless it is hot."""
    made = tiny("qwen3", tied=False, seed=seed, max_position_embeddings=POSITIONS)
    with torch.no_grad():
        made.lm_head.weight[EOS] = 0.0
    return made


def weights_of(model: Any) -> list[tuple[str, torch.Tensor]]:
    return list(model.state_dict().items())


def prompt(ids: Iterable[int], name: str = "p") -> Prompt:
    return Prompt(id=name, token_ids=tuple(ids), text="", answer=None, task="", meta={})


def requests(seeds: Sequence[int] | None = None) -> list[Request]:
    made = [prompt(ids, str(i)) for i, ids in enumerate(PROMPTS)]
    return [Request(p, s) for p, s in zip(made, seeds or range(len(made)), strict=True)]


def many(count: int, first_seed: int = 0) -> list[Request]:
    """`count` samples of the prompts in turn, told apart by their index."""
    return [
        Request(prompt(PROMPTS[i % len(PROMPTS)]), first_seed + i, index=i) for i in range(count)
    ]


def law(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[V] log of the distribution that a token is drawn from.

    Every cut looks at the whole vocabulary's probabilities: top-p does not renormalise after top-k.
    """
    log_p = (logits / (params.temperature or 1.0)).log_softmax(-1)
    if params.temperature == 0:
        return log_p
    order = log_p.argsort(descending=True)
    p = log_p[order].exp()
    keep = torch.ones_like(log_p, dtype=torch.bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
    if params.top_p < 1:
        keep[order[p.cumsum(0) - p > params.top_p]] = False
    if params.min_p:
        keep[order[p < params.min_p * p[0]]] = False
    return log_p.masked_fill(~keep, -torch.inf).log_softmax(-1)


@torch.no_grad()
def check_samples(
    models: Mapping[int, Any],
    samples: Iterable[Sample],
    params: SamplingParams,
    tolerance: float,
) -> None:
    """Spans cover the sampled tokens; a log-prob is that of the law under its span's weights.

    Args:
        models: by version; asked for the logits of the whole sequence.
    """
    for sample in samples:
        ids, first = torch.tensor([sample.tokens]), len(sample.prompt.token_ids) - 1
        log_probs = sample.log_probs
        assert log_probs is not None and len(log_probs) == len(sample.response_ids)
        sampled = len(log_probs) if sample.loss_mask is None else sum(sample.loss_mask)
        assert sum(s.end - s.start for s in sample.spans) == sampled
        logits = {v: models[v](ids).logits[0] for v in {span.version for span in sample.spans}}
        for span in sample.spans:
            for t in range(span.start, span.end):
                expected = float(
                    law(logits[span.version][first + t], params)[sample.response_ids[t]]
                )
                assert abs(expected - log_probs[t]) < tolerance, (t, expected, log_probs[t], span)
