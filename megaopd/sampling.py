"""`megaopd sample`: responses of a model to the data's prompts, as a file that runs can train on.

For supervised fine-tuning on a teacher's responses, for [mix], for pass rates. The model is
config.student: any checkpoint, on any engine. Prompts that the file has already are passed over.
"""

import json
from collections import Counter
from pathlib import Path
from statistics import fmean

from megaopd.data.responses import read_records, to_record
from megaopd.data.types import Prompt, Sample
from megaopd.errors import UserError
from megaopd.parallel import broadcast_object
from megaopd.parts import Parts
from megaopd.report.progress import progress


def sample(parts: Parts, out: Path, *, prompts: int, greedy: bool = False) -> None:
    """Write rollout.samples_per_prompt responses to each of the next `prompts`; a collective.

    Raises:
        UserError: `out` holds another number of responses a prompt.
    """
    group = parts.config.rollout.samples_per_prompt
    done = broadcast_object(_done(out, group) if parts.is_main else None)
    params = parts.sampler.buffer.params
    law = params.greedy() if greedy else params
    parts.sync_weights(version=0)
    if parts.is_main:
        out.parent.mkdir(parents=True, exist_ok=True)
    left, step = prompts, 0
    with progress("prompts", prompts, enabled=parts.is_main) as advance:
        while left > 0:
            batch = parts.prompts.next_batch(min(left, parts.config.rollout.prompts_per_step))
            left, step = left - len(batch), step + 1
            todo = [p for p in batch if p.id not in done]
            if todo:
                made = parts.sampler.generate(todo, -10 - step, group, law)
                _append(parts, out, todo, parts.verify(made))
            advance(len(batch))
    parts.sampler.take_turn()


def _done(out: Path, group: int) -> set[str]:
    """Prompts whose responses are all in the file; a half-written line is cut off."""
    if not out.exists():
        return set()
    records = list(read_records(out))
    counts = Counter(record["prompt_id"] for record in records)
    whole = {name for name, count in counts.items() if count == group}
    if any(count > group for count in counts.values()):
        raise UserError(
            f"{out} holds up to {max(counts.values())} responses a prompt",
            expected=f"{group} (rollout.samples_per_prompt)",
            fix="choose another --out",
        )
    kept = [json.dumps(record) for record in records if record["prompt_id"] in whole]
    out.write_text("".join(line + "\n" for line in kept))
    return whole


def _append(parts: Parts, out: Path, prompts: list[Prompt], samples: list[Sample]) -> None:
    """The responses to these prompts, all of a prompt's together."""
    if not parts.is_main:
        return
    by_prompt: dict[str, list[Sample]] = {prompt.id: [] for prompt in prompts}
    for one in samples:
        by_prompt[one.prompt.id].append(one)
    with out.open("a") as file:
        for group in by_prompt.values():
            rewards = [s.reward for s in group if s.reward is not None]
            rate = fmean(r >= 1.0 for r in rewards) if len(rewards) == len(group) else None
            records = (to_record(s, parts.text(s), rate) for s in group)
            file.write("".join(json.dumps(record) + "\n" for record in records))
