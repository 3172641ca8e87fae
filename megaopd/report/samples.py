"""samples.jsonl: what the student answered at the last evaluation."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def save_samples(
    run_dir: Path, samples: Sequence[Any], text: Callable[[Any], str], count: int = 20
) -> None:
    """Write the first `count` samples (data.types.Sample), one JSON object a line.

    Args:
        text: of a sample's response.
    """
    rows = [
        {
            "prompt": s.prompt.text,
            "response": text(s),
            "expected": s.prompt.answer,
            "reward": s.reward,
        }
        for s in samples[:count]
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (run_dir / "samples.jsonl").write_text(lines)
