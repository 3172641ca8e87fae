"""The whole loop on a toy problem, in one process group: make two models, distil, export, check.

Stages: make random Hugging Face checkpoints -> fine-tune teacher and student (data parallel) ->
convert both to Megatron -> on-policy distillation (tensor parallel) -> export -> check with plain
transformers. A stage whose output is there is not run again.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megaopd.config import read_toml
from megaopd.errors import UserError
from megaopd.recipes import recipe
from megaopd.schema import Config, make_config

RANKS = 2
# Qwen3 shapes: a teacher of 99,776 and a student of 25,312 parameters and 18 characters.
SHAPES = {
    "teacher": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "head_dim": 16,
    },
    "student": {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "head_dim": 8,
    },
}
NEXT = (
    "bash launch/quickstart.sh --dir runs/sglang --rollout sglang  # samples on an SGLang server",
    "bash launch/quickstart.sh --dir runs/fkl objective.loss=fkl   # forward KL instead",
    "bash launch/quickstart.sh --dir runs/long run.steps=1400      # distil twice as long",
    ".venv/bin/megaopd eval --config {dir}/config.toml student.path={dir}/export",
)


def stage_config(name: str, directory: Path, seed: int, overrides: Sequence[str] = ()) -> Config:
    """The Config of one stage: a packaged recipe, with its paths and seed filled in."""
    values = read_toml(recipe(f"quickstart/{name}"))
    # The distillation is the run that the directory is about; the others are its preparation.
    where = directory if name == "opd" else directory / name
    values["run"] |= {"dir": str(where), "seed": seed}
    values["data"]["seed"] = values["data"].get("seed", 0) + 1000 * seed
    if name == "opd":
        values["student"] = {"path": str(directory / "student-megatron")}
        values["teacher"] = {"path": str(directory / "teacher-megatron")}
    else:
        values["student"] = {"path": str(directory / f"{name}-init")}
    return make_config(values, overrides)


def check(directory: Path, overrides: Sequence[str]) -> None:
    """Refuse bad overrides and a directory of something else before ranks are started."""
    stage_config("opd", directory, 0, overrides)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file", expected="a directory")


@dataclass
class Quickstart:
    """The stages; every method is a collective over the ranks of the job."""

    directory: Path
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        import torch.distributed as dist

        return dist.get_rank() == 0

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    @contextmanager
    def stage(self, name: str, what: str) -> Any:
        """Announce a stage and time it."""
        self.say(f"\n== {name}: {what}")
        begun = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begun, 2)

    def once(self, output: Path, make: Callable[[], None]) -> None:
        """Make `output` unless it is there."""
        import torch.distributed as dist

        there = [output.exists()]
        dist.broadcast_object_list(there, src=0)
        if there[0]:
            self.say(f"   {output} is there already")
        else:
            make()
            dist.barrier()

    def train(self, name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Run one stage's config; its summary."""
        from megaopd import run

        return run.train(stage_config(name, self.directory, self.seed, overrides))

    def fine_tune(self, name: str) -> None:
        """Supervised fine-tuning, then export to a Hugging Face checkpoint."""
        self.once(
            self.directory / f"{name}-init",
            lambda: self.on_main(
                lambda: make_checkpoint(name, self.directory / f"{name}-init", self.seed)
            ),
        )

        def work() -> None:
            self.train(name)
            self.export(stage_config(name, self.directory, self.seed), out)

        out = self.directory / name / "hf"
        self.once(out, work)

    def on_main(self, work: Callable[[], None]) -> None:
        if self.is_main:
            work()

    def export(self, config: Config, out: Path) -> None:
        """The last checkpoint of a stage as a Hugging Face checkpoint."""
        from megaopd.models.config import ModelConfig
        from megaopd.models.convert import megatron_to_hf
        from megaopd.parallel import make_grid

        saved = max((Path(config.run.dir) / "checkpoints").glob("step_????????"))
        model = ModelConfig(path=str(saved), vocab_multiple=config.student.vocab_multiple)
        megatron_to_hf(model, out, make_grid(config.parallel))

    def to_megatron(self, name: str, config: Config) -> None:
        """A fine-tuned Hugging Face checkpoint as a Megatron one, at the layout of the OPD run."""
        from megaopd.models.config import ModelConfig
        from megaopd.models.convert import hf_to_megatron
        from megaopd.parallel import make_grid

        out = self.directory / f"{name}-megatron"
        model = ModelConfig(path=str(self.directory / name / "hf"))
        self.once(out, lambda: hf_to_megatron(model, out, make_grid(config.parallel)))


def run(directory: Path, seed: int, overrides: Sequence[str] = ()) -> None:
    """All stages; leaves runs, checkpoints, the export, summary.json and report.html."""
    from megaopd.parallel import init_distributed

    begun = time.perf_counter()
    init_distributed()
    quick = Quickstart(directory, seed)
    if quick.is_main:
        directory.mkdir(parents=True, exist_ok=True)
    opd = stage_config("opd", directory, seed, overrides)
    for name in ("teacher", "student"):
        with quick.stage(name, f"fine-tune the {name} on worked examples ({RANKS} ranks)"):
            quick.fine_tune(name)
    with quick.stage("convert", f"Hugging Face -> Megatron at TP={opd.parallel.tensor}"):
        for name in ("teacher", "student"):
            quick.to_megatron(name, opd)
    with quick.stage("opd", f"{opd.run.steps} steps of on-policy distillation"):
        summary = quick.train("opd", overrides)
    export = directory / "export"
    with quick.stage("export", f"Megatron -> {export}, scored by plain transformers"):
        quick.once(export, lambda: quick.export(opd, export))
        plain = [score_with_transformers(export, opd) if quick.is_main else {}]
    quick.seconds["total"] = round(time.perf_counter() - begun, 2)
    if quick.is_main:
        close(directory, summary, plain[0], quick.seconds)


def make_checkpoint(name: str, out: Path, seed: int) -> None:
    """A randomly initialised Qwen3-shaped checkpoint with the character tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from megaopd.data.tokenizer import char_tokenizer

    tokenizer: Any = char_tokenizer()
    shape: Any = SHAPES[name]
    config = Qwen3Config(
        **shape,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    generator = torch.Generator().manual_seed(seed * 2 + (name == "student"))
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2:
                std = 0.08 if "embed" in key else parameter.shape[1] ** -0.5
                # Two layers write to the residual stream twice each.
                std *= 0.5 if "o_proj" in key or "down_proj" in key else 1.0
                parameter.normal_(0.0, std, generator=generator)
    tmp = out.with_name(out.name + ".partial")
    disable_progress_bar()
    model.save_pretrained(tmp)
    tokenizer.save_pretrained(tmp)
    tmp.rename(out)


def score_with_transformers(export: Path, config: Config) -> dict[str, float]:
    """Greedy accuracy of the exported checkpoint by plain from_pretrained and generate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from megaopd.data.prompts import fixed_set
    from megaopd.data.tasks import score

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(export, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(export, local_files_only=True)
    model.eval()
    held_out = replace(config.data, split="test", seed=config.eval.seed)
    prompts = fixed_set(held_out, tokenizer, config.eval.prompts)
    right, by_length = 0.0, {}
    for prompt in prompts:
        by_length.setdefault(len(prompt.token_ids), []).append(prompt)
    for group in by_length.values():
        ids = torch.tensor([p.token_ids for p in group])
        out = model.generate(ids, max_new_tokens=config.rollout.max_new_tokens, do_sample=False)[
            :, ids.shape[1] :
        ]
        for prompt, row in zip(group, out.tolist(), strict=True):
            stop = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
            text = tokenizer.decode(row[:stop])
            right += score(prompt, text) or 0.0
    return {"transformers_accuracy": right / len(prompts)}


def close(
    directory: Path, summary: dict[str, Any], plain: dict[str, float], seconds: dict[str, float]
) -> None:
    """summary.json, report.html and the closing lines."""
    from rich.console import Console
    from rich.table import Table

    from megaopd.report.html import write_report
    from megaopd.report.metrics import read_metrics

    rates = [line["tokens_per_s"] for line in read_metrics(directory)]
    speed = {"tokens_per_s": sorted(rates)[len(rates) // 2]} if rates else {}
    following = [line.format(dir=directory) for line in NEXT]
    summary = {**summary, **plain, **speed, "stage_seconds": seconds, "next": following}
    (directory / "summary.json").write_text(json.dumps(summary, indent=1))
    page = write_report(directory, title="megaopd quickstart")
    table = Table("held-out prompts", "before", "after", title="on-policy distillation")
    for label, name in (("greedy accuracy", "accuracy"), ("KL(student || teacher)", "kl")):
        before, after = summary.get(f"{name}_before"), summary.get(f"{name}_after")
        if before is not None and after is not None:
            table.add_row(label, f"{before:.4f}", f"{after:.4f}")
    console = Console()
    console.print()
    console.print(table)
    console.print(f"export scored by plain transformers: {plain['transformers_accuracy']:.4f}")
    console.print("tokens/s of a whole step (median): " + f"{speed.get('tokens_per_s', 0):,.0f}")
    console.print("seconds: " + "  ".join(f"{k} {v:.0f}" for k, v in seconds.items()))
    console.print(f"report: {page}\nnext:")
    for line in following:
        console.print("  " + line, markup=False, highlight=False, soft_wrap=True)
