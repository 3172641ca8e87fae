"""Question 9: a real language model learns a system prompt that its teacher, itself, reads.

SmolLM2-135M-Instruct, or another small instruct model: what is shared by all prompts can be learnt.
"""

import json
from pathlib import Path
from typing import Any

from megaopd.recipes import merged
from megaopd.study.stages import Stages

SYSTEM = "Answer in one short sentence, all in capital letters."
TOPICS = (
    "rain", "bread", "the moon", "a bicycle", "music", "salt", "a library", "sleep", "glass",
    "a bridge", "money", "the sea", "a clock", "fire", "honey", "a river", "chess", "snow",
    "a map", "paper", "the wind", "a garden", "soap", "a train", "coffee", "a shadow", "gold",
    "a school", "rice", "a mirror", "the sun", "a letter", "wool", "a volcano", "milk", "a wheel",
    "a forest", "ice", "a camera", "tea",
)  # fmt: skip
FORMS = ("What is {}?", "Why do people care about {}?", "How would you explain {} to a child?")
HELD_OUT = 10  # topics
FIGURES = ("kl", "entropy", "response_length", "repetition")


def questions(folder: Path) -> tuple[Path, Path]:
    """Prompt files to train on and to measure on, of different topics."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, topics in zip(paths, (TOPICS[:-HELD_OUT], TOPICS[-HELD_OUT:]), strict=True):
        lines = [{"prompt": form.format(topic)} for topic in topics for form in FORMS]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def values(model: Path, train: Path, held_out: Path) -> dict[str, Any]:
    """The run: full reverse KL to the model with the system prompt."""
    return {
        "run": {"steps": 24},
        "student": {"path": str(model)},
        "teacher": {"path": str(model)},
        "data": {
            "source": str(train),
            "template": "chat",
            "teacher_sees": "system",
            "teacher_text": SYSTEM,
        },
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 32, "batch_size": 8},
        "objective": {"loss": "rkl"},
        "optim": {"lr": 2e-5, "warmup_steps": 3},
        "trainer": {"micro_batch_size": 4},
        "eval": {"source": str(held_out), "prompts": 24, "samples": 1, "pass_k": [1]},
        "report": {"every": 8},
    }


def internalise(stages: Stages, model: Path) -> dict[str, dict[str, float]]:
    """Figures before and after on questions of other topics, the teacher with the system prompt.

    kl: of the student without it to the teacher with it, in nats a token of the student's samples.
    """
    run_values = values(model, *questions(stages.root / "questions"))
    folder = Path(stages.run("system_prompt", run_values)["dir"])
    last = max((folder / "checkpoints").glob("step_????????"))
    return {
        when: _measured(stages, run_values, path, folder / when)
        for when, path in (("before", model), ("after", last))
    }


def _measured(stages: Stages, run_values: Any, student: Path, folder: Path) -> dict[str, float]:
    from megaopd import run
    from megaopd.parallel import leave_distributed

    own = {"student": {"path": str(student)}, "run": {"dir": str(folder)}}
    run.evaluate(stages.config(merged(run_values, own)))
    leave_distributed()
    figures = json.loads((folder / "evaluation.json").read_text())["figures"]
    found = {name: figures[name] for name in FIGURES if name in figures}
    return {k: v["value"] if isinstance(v, dict) else v for k, v in found.items()}
