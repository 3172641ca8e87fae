"""One on-policy distillation by TRL, in the environment of launch/requirements-bench.txt.

python -m tools.bench.trl_runner JOB.json      (tools/compare_trl.py does, once a trainer and seed)

The job is JSON: trainer, student, teacher, teacher_text (SDFTTrainer: how prompt and answer stand
in its prompt), prompts and answers (texts, in order), held_out (prompt, answer), task, steps,
prompts_per_step, max_new_tokens, lr, warmup_steps, every, seed, out. Into out goes a JSON list of
{step, tokens, seconds, accuracy}; evaluation is not in the seconds.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

TRAINERS = ("DistillationTrainer", "IWOPDTrainer", "IWOPDTrainer, jsd")
SELF_TRAINERS = ("SDFTTrainer",)  # the student as it began is the teacher, and sees the answer
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def main(path: str) -> int:
    job = json.loads(Path(path).read_text())
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(job["student"], local_files_only=True)
    # Prompts are plain text; IWOPDTrainer takes messages only.
    tokenizer.chat_template = PLAIN_TEMPLATE
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job[who], local_files_only=True, dtype=torch.float32)
        for who in ("student", "teacher")
    )
    watch = _watch(job, tokenizer)
    trainer = _trainer(job, student, teacher, tokenizer, watch)
    trainer.train()
    Path(job["out"]).write_text(json.dumps(watch.points))
    return 0


def _trainer(job: dict[str, Any], student: Any, teacher: Any, tokenizer: Any, watch: Any) -> Any:
    from datasets import Dataset

    common = {
        "output_dir": job["out"] + ".trl",
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["prompts_per_step"],
        "gradient_accumulation_steps": 1,
        "learning_rate": job["lr"],
        "warmup_steps": job["warmup_steps"],
        "lr_scheduler_type": "cosine",
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_completion_length": job["max_new_tokens"],
        "temperature": 1.0,
        "top_p": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "seed": job["seed"],
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if job["trainer"] == "SDFTTrainer":
        return _sdft(job, common, student, tokenizer, watch)
    common["beta"] = 1.0  # reverse KL
    if job["trainer"] == "DistillationTrainer":
        from trl import DistillationConfig, DistillationTrainer

        data = Dataset.from_dict({"prompt": job["prompts"]})
        arguments = DistillationConfig(**common, shuffle_dataset=False)
        return DistillationTrainer(
            model=student, teacher_model=teacher, args=arguments, train_dataset=data,
            processing_class=tokenizer, callbacks=[watch],
        )  # fmt: skip
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    data = Dataset.from_dict(
        {"messages": [_turns(*pair) for pair in zip(job["prompts"], job["answers"], strict=True)]}
    )
    jsd = job["trainer"].endswith("jsd")
    objective = {"distillation_objective": "jsd", "loss_top_k": 0} if jsd else {}
    arguments = IWOPDConfig(**common, **objective, lmbda=1.0, max_length=64)
    return IWOPDTrainer(
        model=student, teacher_model=teacher, args=arguments, train_dataset=data,
        processing_class=tokenizer, callbacks=[watch],
    )  # fmt: skip


def _sdft(job: dict[str, Any], common: Any, student: Any, tokenizer: Any, watch: Any) -> Any:
    """Jensen-Shannon over the whole vocabulary, one response a prompt, no importance weights."""
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    text = job["teacher_text"].replace("{pi}", "{privileged_context}")
    columns = {"prompt": job["prompts"], "privileged_context": job["answers"]}
    arguments = SDFTConfig(
        **common, distillation_mode="full_logits", distillation_alpha=0.5,
        distillation_is_clip=None, teacher_model_kind="base", teacher_prompt_template=text,
        num_generations=1, shuffle_dataset=False,
    )  # fmt: skip
    return SDFTTrainer(
        model=student, args=arguments, train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer, callbacks=[watch],
    )  # fmt: skip


def _turns(prompt: str, answer: str) -> list[dict[str, str]]:
    """With the data's answer, which is not trained on.

    TRL 1.16 divides the loss by the tokens of the data's answers: without them by 0, and the first
    step gives NaN.
    """
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _watch(job: dict[str, Any], tokenizer: Any) -> Any:
    """A callback that evaluates every so many steps, outside the measured time."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.points: list[dict[str, float]] = []
            self.seconds, self.begun, self.tokens = 0.0, 0.0, 0
            self.counting = False

        def count(self, model: Any) -> None:
            """Counts the tokens that the trainer samples, up to and with the end token."""
            generate = model.generate

            def counted(*args: Any, **kwargs: Any) -> Any:
                out = generate(*args, **kwargs)
                if self.counting:
                    rows = getattr(out, "sequences", out)[:, kwargs["input_ids"].shape[1] :]
                    ended = (rows == tokenizer.eos_token_id).cumsum(1)
                    self.tokens += int(
                        ((ended - (rows == tokenizer.eos_token_id).long()) == 0).sum()
                    )
                return out

            model.generate = counted

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.count(kwargs["model"])
            self._evaluate(0, kwargs["model"])
            self.begun, self.counting = time.perf_counter(), True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds += time.perf_counter() - self.begun
            self.counting = False
            if state.global_step % job["every"] == 0 or state.global_step == job["steps"]:
                self._evaluate(state.global_step, kwargs["model"])
            self.begun, self.counting = time.perf_counter(), True

        def _evaluate(self, step: int, model: Any) -> None:
            accuracy = greedy_accuracy(model, tokenizer, job)
            point = {"step": step, "tokens": self.tokens, "seconds": self.seconds}
            self.points.append({**point, "accuracy": accuracy})

    return Watch()


def greedy_accuracy(model: Any, tokenizer: Any, job: dict[str, Any]) -> float:
    """By plain generate on the held-out prompts, all of one length at once."""
    import torch

    from megaopd.data.tasks import get_task

    training, task = model.training, get_task(job["task"])
    model.eval()
    right, by_length = 0.0, {}
    for one in job["held_out"]:
        ids = tokenizer(one["prompt"], add_special_tokens=False)["input_ids"]
        by_length.setdefault(len(ids), []).append((ids, one["answer"]))
    for group in by_length.values():
        ids = torch.tensor([ids for ids, _ in group])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=job["max_new_tokens"],
            )[:, ids.shape[1] :]  # fmt: skip
        for (_, answer), row in zip(group, out.tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
            right += task.verify(tokenizer.decode(row[:end]), answer, {})
    model.train(training)
    return right / len(job["held_out"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
