"""What FP8 does to distillation: KL, gradients and log-probs of SmolLM2-135M on a CPU.

    python tools/fp8_study.py prepare --model SMOLLM2_DIR --work DIR
    python tools/fp8_study.py run --work DIR            # every case, or --case NAME: one
    python tools/fp8_study.py report --work DIR --out docs/fp8

The teacher is SmolLM2-135M-Instruct, the student the same model with noise on every matrix; the
texts are the student's own samples to chat prompts, drawn by the embedded engine in fp32. A case is
a recipe, measured through the real Student, Teacher and fused loss with the FP8 emulation of
models/fp8_emulation.py; each is a process of its own, and one that is done is not done again.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.bench.pages import fill  # noqa: E402

PROMPTS = [
    "Why is the sky blue? Answer in two sentences.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me three tips for sleeping better.",
    "What is 17 times 6? Show your steps.",
    "Translate 'Where is the train station?' into French and Spanish.",
    "Summarise the plot of Romeo and Juliet in one paragraph.",
    "Explain what a hash table is to a ten-year-old.",
    "Write a polite email that moves a meeting from Monday to Thursday.",
    "List the planets of the solar system in order from the Sun.",
    "How do vaccines work?",
    "Write a haiku about the sea.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron? Why?",
]
WARM = 4  # the last prompts: delayed scales are filled from these, never from what is measured
NEW_TOKENS, BATCH = 48, 4
NOISE = 0.04  # standard deviation of the student's noise, as a part of each matrix's own
FP8 = {"current": {}, "blockwise": {}, "delayed": {"fp8_history": 16}}
GRADIENT = ("fp32/cosine", "bf16/cosine", "fp32/relative error", "fp32/norm ratio")
GRADIENT += ("fp32/worst matrix",)
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    **{name: {"fp8": name, **more} for name, more in FP8.items()},
    "current, ends bf16": {"fp8": "current", "fp8_first_last_bf16": 1},
    "blockwise, ends bf16": {"fp8": "blockwise", "fp8_first_last_bf16": 1},
    "blockwise, hybrid": {"fp8": "blockwise", "fp8_format": "hybrid"},
    "delayed, first pass": {"fp8": "delayed", "fp8_history": 16},
    "blockwise around bf16": {"fp8": "blockwise", "dtype": "bfloat16"},
}


def prepare(arguments: argparse.Namespace) -> None:
    """Write the noisy student, its samples and what both engines say of them."""
    import torch

    from megaopd.models.weights import HfReader, HfWriter
    from megaopd.rollout.base import Request, SamplingParams
    from megaopd.rollout.hf import EmbeddedEngine

    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    reader, noise = HfReader(arguments.model), torch.Generator().manual_seed(1)
    with HfWriter(work / "student", side_files_from=arguments.model) as writer:
        for name in sorted(reader.files):
            tensor = reader.read(name, None, 0, 0, 0)
            if tensor.dim() == 2:
                random = torch.randn(tensor.shape, generator=noise)
                tensor = tensor + NOISE * tensor.float().std() * random
            writer.add(name, tensor)
    (work / "teacher").symlink_to(arguments.model.resolve())
    from megaopd.data.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(work / "student")
    prompts = [_prompt(i, text, tokenizer) for i, text in enumerate(PROMPTS)]
    end = tokenizer.eos_token_id
    make: dict[str, Any] = {"eos_ids": [end], "pad_id": end, "device": torch.device("cpu")}
    engine = EmbeddedEngine(work / "student", dtype=torch.float32, batch_size=6, **make)
    engine.update_weights(_weights(work / "student"), 0)
    params = SamplingParams(NEW_TOKENS, temperature=1.0)
    samples = engine.generate([Request(p, seed=7 + i) for i, p in enumerate(prompts)], params)
    low = EmbeddedEngine(work / "student", dtype=torch.bfloat16, **make)
    low.update_weights(_weights(work / "student"), 0)
    rows = []
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = [*prompt.token_ids, *sample.response_ids]
        with torch.no_grad():
            logits = low.model(torch.tensor([ids])).logits[0, len(prompt.token_ids) - 1 : -1]
        chosen = (
            logits.float().log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])
        )
        rows.append({
            "prompt": list(prompt.token_ids),
            "response": list(sample.response_ids),
            "fp32": list(sample.log_probs or ()),
            "bf16": chosen[:, 0].clamp(max=0).tolist(),
            "text": tokenizer.decode(sample.response_ids),
        })  # fmt: skip
    (work / "samples.json").write_text(json.dumps(rows, indent=1))


def _prompt(number: int, text: str, tokenizer: Any) -> Any:
    from megaopd.data.types import Prompt

    chat = [{"role": "user", "content": text}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(shown, add_special_tokens=False)["input_ids"]
    return Prompt(str(number), tuple(ids), shown, None, "", {})


def _weights(directory: Path) -> Any:
    from megaopd.models.weights import HfReader

    reader = HfReader(directory)
    return [(name, reader.read(name, None, 0, 0, 0)) for name in sorted(reader.files)]


class Study:
    """The models and micro-batches of one case."""

    def __init__(self, work: Path, settings: dict[str, Any]) -> None:
        from megaopd.data.types import Prompt, Sample
        from megaopd.models.arch import architecture, padded_vocab, read_hf_config
        from megaopd.objectives.spec import ObjectiveConfig
        from megaopd.parallel import ParallelConfig, make_grid

        self.work, self.settings = work, settings
        self.grid = make_grid(ParallelConfig())
        self.objective = ObjectiveConfig(loss="rkl", chunk_size=256)
        self.arch = architecture(read_hf_config(work / "student"))
        self.rows = padded_vocab(self.arch.vocab, 1, 8)
        rows = json.loads((work / "samples.json").read_text())

        def sample(number: int, row: dict[str, Any], engine: str) -> Sample:
            prompt = Prompt(str(number), tuple(row["prompt"]), "", None, "", {})
            return Sample(prompt, tuple(row["response"]), tuple(row[engine]), "length", 0)

        self.samples = {e: [sample(i, r, e) for i, r in enumerate(rows)] for e in ("fp32", "bf16")}

    def batches(self, engine: str = "fp32", *, warm: bool = False) -> list[Any]:
        """Micro-batches with that engine's log-probs, of the measured samples or of the others."""
        from megaopd.trainer.batch import make_micro_batches

        chosen = self.samples[engine][-WARM:] if warm else self.samples[engine][:-WARM]
        return make_micro_batches(
            chosen, grid=self.grid, micro_batch_size=BATCH, pad_id=0, loss_agg="token-mean"
        )

    def student(self, settings: dict[str, Any], *, trained: bool = False) -> Any:
        from megaopd.models.config import ModelConfig
        from megaopd.trainer.config import OptimConfig
        from megaopd.trainer.student import Student

        config = ModelConfig(path=str(self.work / "student"), **settings)
        optim = OptimConfig() if trained else None
        return Student(config, self.arch, self.grid, self.objective, optim)

    def teacher(self, settings: dict[str, Any], name: str = "teacher") -> Any:
        """A frozen model; delayed scales are filled by one pass over the other samples."""
        from megaopd.models.config import ModelConfig
        from megaopd.models.fp8 import calibrating
        from megaopd.trainer.teacher import Teacher

        config = ModelConfig(path=str(self.work / name), **settings)
        made = Teacher(config, self.arch, self.grid, vocab_rows=self.rows)
        if config.fp8 == "delayed":
            with calibrating(made.chunks[0]):
                made.hidden_states(self.batches(warm=True))
        return made

    def gradient(self, student: Any, teacher: Any, batches: list[Any]) -> dict[str, Any]:
        """Of every parameter, fp32; the optimizer takes no step. Without a teacher: that of sft."""
        from megaopd.objectives.spec import ObjectiveConfig

        plain = ObjectiveConfig(loss="sft", chunk_size=256)
        student.objective = self.objective if teacher else plain
        student.accumulate(batches, teacher)
        student.objective = self.objective
        return {name: p.main_grad.clone() for name, p in student.model.named_parameters()}


def measure(study: Study, *, cold: bool) -> dict[str, Any]:
    """One case: KLs with FP8 in one model or both, gradients, log-probs against both engines."""
    import torch

    settings = study.settings
    reference: dict[str, Any] = {}
    teachers = {"ref": study.teacher(reference)}
    student = study.student(settings, trained=True)
    low = teachers["ref"] if settings == reference else study.teacher(settings)
    if settings.get("fp8") == "delayed" and not cold:
        # Fills the histories of all three tensors of every layer; only the measured pass counts.
        study.gradient(student, low, study.batches(warm=True))
    found: dict[str, Any] = {}
    batches = study.batches()
    grads = study.gradient(student, low, batches)  # first: a cold case has its scales at 1
    found["gradient"] = compare(grads, study.work, settings, "rkl")
    if not cold:
        grads = study.gradient(student, None, batches)
        found["gradient sft"] = compare(grads, study.work, settings, "sft")
        if settings:
            grads = study.gradient(student, teachers["ref"], batches)
            found["gradient student"] = compare(grads, study.work, settings, "")
            plain = study.student(reference, trained=True)
            grads = study.gradient(plain, low, batches)
            found["gradient teacher"] = compare(grads, study.work, settings, "")
            del plain, grads
        for engine in ("fp32", "bf16"):
            scored = student.score(study.batches(engine), teachers["ref"])
            for name in ("rollout_log_prob_diff", "rollout_k3", "rollout_ess"):
                found[f"{engine}/{name}"] = scored[name]
        found["kl student"] = scored["kl"]
        found["kl both"] = student.score(batches, low)["kl"]
        own = study.teacher(reference, "student")
        found["kl own"] = student.score(batches, own)["kl"]
        del student, own
        found["kl teacher"] = study.student(reference).score(batches, low)["kl"]
    found["tokens"] = sum(len(s.response_ids) for s in study.samples["fp32"][:-WARM])
    found["torch"] = torch.__version__
    return found


def compare(
    grads: dict[str, Any], work: Path, settings: dict[str, Any], loss: str
) -> dict[str, float]:
    """Cosine and relative error against the fp32 and bf16 gradients, which are kept in `work`.

    loss: rkl, sft; "": rkl, and not to be kept.
    """
    import torch
    from safetensors.torch import load_file, save_file

    own = {(): "fp32", (("dtype", "bfloat16"),): "bf16"}.get(tuple(settings.items()))
    if own and loss:
        path = work / f"{loss}-{own}.safetensors"
        save_file({n: g.contiguous() for n, g in grads.items()}, path)
    found: dict[str, float] = {}
    for name in ("fp32", "bf16"):
        path = work / f"{loss or 'rkl'}-{name}.safetensors"
        if not path.is_file():
            continue
        want = load_file(path)
        dot = sum(float((grads[n].double() * want[n].double()).sum()) for n in grads)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        size = math.sqrt(sum(float(w.double().square().sum()) for w in want.values()))
        apart = sum(float((grads[n].double() - want[n].double()).square().sum()) for n in grads)
        found[f"{name}/cosine"], found[f"{name}/norm ratio"] = dot / (norm * size), norm / size
        found[f"{name}/relative error"] = math.sqrt(apart) / size
        each = {
            n: float(torch.nn.functional.cosine_similarity(g.flatten(), want[n].flatten(), dim=0))
            for n, g in grads.items()
            if g.dim() == 2 and "layers" in n
        }
        worst = min(each, key=lambda n: each[n])
        found[f"{name}/worst matrix"] = each[worst]
        found[f"{name}/worst name"] = worst  # pyright: ignore
    return found


def run(arguments: argparse.Namespace) -> None:
    """Every case that has no result yet, each in a process of its own."""
    for name in CASES:
        if arguments.case and name != arguments.case:
            continue
        target = arguments.work / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        if target.exists():
            print(f"{name}: done already", flush=True)
            continue
        if not arguments.case:
            command = [sys.executable, __file__, "run", "--work", str(arguments.work)]
            if subprocess.run([*command, "--case", name]).returncode:
                sys.exit(f"{name} failed")
            continue
        began = time.monotonic()
        found = measure(Study(arguments.work, CASES[name]), cold=name.endswith("first pass"))
        found = {"case": name, "settings": CASES[name], **found}
        found["seconds"] = round(time.monotonic() - began, 1)
        target.write_text(json.dumps(found, indent=1))
        print(f"{name}: {found['seconds']} s", flush=True)


def report(arguments: argparse.Namespace) -> None:
    """The tables, in their place in docs/fp8.md, and the numbers beside it."""
    rows = [json.loads(p.read_text()) for p in arguments.work.glob("*.json") if p.stem != "samples"]
    rows.sort(key=lambda row: list(CASES).index(row["case"]))
    by = {row["case"]: row for row in rows}
    base = by["fp32"]["kl both"]
    lines = [
        f"{by['fp32']['tokens']} response tokens of {len(PROMPTS) - WARM} prompts. "
        f"KL(student, teacher) in fp32: {base:.6f} nats a token.",
        "",
        "| recipe | KL shift, teacher | student | both | KL of the student from itself in fp32 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "kl both" in row:
            shifts = [row[f"kl {which}"] - base for which in ("teacher", "student", "both")]
            cells = [f"{s:+.6f} ({s / base:+.2%})" for s in shifts]
            lines.append(f"| {row['case']} | {' | '.join(cells)} | {row['kl own']:.6f} |")
    lines += [
        "",
        "| gradient | cosine to fp32 | to bf16 | relative error | norm | worst matrix "
        "| FP8 in the student only | in the teacher only | of sft |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        g = row["gradient"]
        cells = [f"{g[name]:.4f}" if name in g else "-" for name in GRADIENT]
        for which in ("student", "teacher", "sft"):
            other = row.get(f"gradient {which}")
            cells.append(f"{other['fp32/cosine']:.4f}" if other else "-")
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    lines += [
        "",
        "| trainer | engine fp32: mean abs diff | k3 | ESS | bf16: mean abs diff | k3 | ESS |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "kl both" in row:
            cells = [
                f"{row[f'{engine}/rollout_log_prob_diff']:.2e} | {row[f'{engine}/rollout_k3']:.2e} "
                f"| {row[f'{engine}/rollout_ess']:.4f}"
                for engine in ("fp32", "bf16")
            ]
            lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    table = "\n".join(lines)
    fill(arguments.out.with_suffix(".md"), "study", table)
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "run", "report"):
        command = commands.add_parser(name)
        command.add_argument("--work", type=Path, required=True, help="where cases leave results")
        if name == "prepare":
            command.add_argument("--model", type=Path, required=True, help="SmolLM2 checkpoint")
        if name == "run":
            command.add_argument("--case", default="", help="one of " + "; ".join(CASES))
        if name == "report":
            command.add_argument("--out", type=Path, default=Path("docs/fp8"))
    arguments = parser.parse_args()
    from megaopd import platform

    platform.install()
    {"prepare": prepare, "run": run, "report": report}[arguments.command](arguments)


if __name__ == "__main__":
    main()
