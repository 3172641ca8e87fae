"""How well a teacher goes on from what the student has begun (question 2 of the study)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from megaopd.build import build_parts
from megaopd.data.responses import read_records
from megaopd.data.types import Prompt, Sample
from megaopd.inputs import reward_of
from megaopd.schema import make_config, sampling_values


def continuations(
    values: dict[str, Any], responses: Path, lengths: Sequence[int]
) -> dict[str, list[float]]:
    """Accuracy of a model's greedy continuations of the first n tokens of stored responses.

    Only responses of the student's that are longer than every length, so that all lengths are of
    the same prompts. The whole response, prefix included, is verified: the prefixes have to be a
    part of it that is not looked at, or the student's errors are counted and not the teacher's.

    Args:
        values: of a run whose student.path is the teacher.

    Returns:
        By length: of "all", of those where the student's first token is the "right" one, and
        where it is "wrong" (a group without responses is left out); and the share of the latter,
        "wrong_share", once.
    """
    config = make_config(sampling_values(values))
    records = [r for r in read_records(responses) if len(r["response_ids"]) > max(lengths)]
    with build_parts(config, training=False) as parts:
        parts.sync_weights(version=0)
        law = parts.sampler.buffer.params.greedy()
        found: list[list[float]] = []
        for key, length in enumerate(lengths):
            prompts = [_begun(record, length, i) for i, record in enumerate(records)]
            made = parts.sampler.generate(prompts, -20 - key, 1, law)
            whole = [_whole(sample, length) for sample in made]
            rewards = [reward_of(s, parts.tokenizer, parts.eos_ids) or 0.0 for s in whole]
            found.append(rewards)
        first = [parts.tokenizer.encode(r["answer"], add_special_tokens=False)[0] for r in records]
        parts.sampler.take_turn()
    right = [r["response_ids"][0] == one for r, one in zip(records, first, strict=True)]
    groups = {"all": [True] * len(right), "right": right, "wrong": [not one for one in right]}
    return {
        **{
            name: [_mean(rewards, which) for rewards in found]
            for name, which in groups.items()
            if any(which)
        },
        "wrong_share": [1 - fmean(right)],
    }


def _mean(values: Sequence[float], which: Sequence[bool]) -> float:
    return fmean(v for v, chosen in zip(values, which, strict=True) if chosen)


def _begun(record: dict[str, Any], length: int, number: int) -> Prompt:
    ids = (*record["prompt_ids"], *record["response_ids"][:length])
    return Prompt(str(number), ids, record["prompt"], record["answer"], record["task"])


def _whole(sample: Sample, length: int) -> Sample:
    """The response with the student's part in front."""
    ids = sample.prompt.token_ids
    begun = ids[len(ids) - length :] if length else ()
    return replace(
        sample,
        response_ids=(*begun, *sample.response_ids),
        log_probs=None,
        loss_mask=None,
        spans=(),
    )
