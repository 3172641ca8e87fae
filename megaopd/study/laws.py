"""What small models think, token by token, as plain transformers gives it: for questions 4 and 6.

Exact sums over the vocabulary of 18, in place of samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from megaopd.data.tasks import get_task
from megaopd.data.tasks.base import Split
from megaopd.data.tasks.keyed import TOLD


class Laws:
    """A checkpoint's log-probs of the next token. Makes a Hugging Face copy where there is none."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        folder = path if (path / "config.json").is_file() else _exported(path)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()

    def log_probs(self, rows: Sequence[Sequence[int]]) -> list[Any]:
        """[length, V] float64 of each row of ids: the law of what follows each of its tokens."""
        import torch

        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(i)
        found: list[Any] = [None] * len(rows)
        with torch.no_grad():
            for places in by_length.values():
                logits = self.model(torch.tensor([list(rows[i]) for i in places])).logits
                for i, one in zip(places, logits.double().log_softmax(-1), strict=True):
                    found[i] = one
        return found

    def next(self, texts: Sequence[str]) -> Any:
        """[n, V]: the law of the first token of a response to each prompt."""
        import torch

        rows = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return torch.stack([one[-1] for one in self.log_probs(rows)])


def _exported(path: Path) -> Path:
    from megaopd.models.config import ModelConfig
    from megaopd.models.convert import megatron_to_hf
    from megaopd.parallel import ParallelConfig, make_grid

    folder = path / "as_hf"
    with FileLock(path / "as_hf.lock"):  # of the study's workers, one writes it
        if not (folder / "config.json").is_file():
            grid = make_grid(ParallelConfig(), seed=1)
            megatron_to_hf(ModelConfig(path=str(path)), folder, grid)
    return folder


def mean_laws(
    student: Path,
    before: Path,
    teacher: Path,
    *,
    keys: int,
    split: Split = "train",
    count: int = 200,
) -> dict[str, float]:
    """How near a self-distilled student is to the means of its teacher's laws over hidden keys.

    The reverse KL summed over keys that the student cannot see is least at their geometric mean
    (normalised), the forward KL at their arithmetic mean.

    Returns:
        Mean KL in nats over the questions: to_geometric and to_arithmetic of the student,
        before_to_geometric of the model that it was, apart of the two means (geometric from
        arithmetic); and the entropy of the student.
    """
    import torch

    task = get_task(f"hidden{keys}")
    questions = list(dict.fromkeys(task.example(i, 0, split).prompt for i in range(count)))
    q = Laws(teacher)
    told = [TOLD.replace("{pi}", str(key)) for key in range(keys)]
    by_key = torch.stack([q.next([t.replace("{prompt}", x) for x in questions]) for t in told])
    geometric = by_key.mean(0).log_softmax(-1)
    arithmetic = by_key.logsumexp(0) - torch.tensor(float(keys)).double().log()
    p, p0 = Laws(student).next(questions), Laws(before).next(questions)
    return {
        "to_geometric": _kl(p, geometric),
        "to_arithmetic": _kl(p, arithmetic),
        "before_to_geometric": _kl(p0, geometric),
        "apart": _kl(geometric, arithmetic),
        "entropy": float(-(p.exp() * p).sum(-1).mean()),
    }


def _kl(p: Any, q: Any) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


# Name -> estimator and, for vopd, its baseline.
ESTIMATORS: Mapping[str, tuple[str, str]] = {
    "k2": ("k2", ""),
    "pg": ("pg", ""),
    "k3pp": ("k3pp", ""),
    "vopd, value": ("vopd", "value"),
    "vopd, top 5": ("vopd", "topk"),
    "vopd, optimal": ("vopd", "optimal"),
    "k3": ("k3", ""),
}


def estimator_noise(
    student: Path, teacher: Path, records: Iterable[Mapping[str, Any]], *, limit: int = 400
) -> dict[str, dict[str, float]]:
    """Noise and bias of estimators of the reverse KL's gradient at the logits, on the policy.

    At each place of the student's responses the sampled token y gives the gradient
    slope(y) (e_y - p); its mean and variance over y ~ p are exact sums over the vocabulary.

    Returns:
        By estimator, over all places: noise = sum of variances / sum of |full gradient|^2, and
        bias = |mean - full gradient| / |full gradient|, norms over all places together.
    """
    import torch

    sequences, starts = [], []
    for record in list(records)[:limit]:
        sequences.append([*record["prompt_ids"], *record["response_ids"]])
        starts.append(len(record["prompt_ids"]))
    laws = [Laws(path).log_probs(sequences) for path in (student, teacher)]
    p, q = (
        torch.cat([one[start - 1 : -1] for one, start in zip(law, starts, strict=True)])
        for law in laws
    )
    full = p.exp() * (p - q - (p.exp() * (p - q)).sum(-1, keepdim=True))
    size = full.square().sum()
    found = {}
    for name, (estimator, baseline) in ESTIMATORS.items():
        slope = _slopes(p, q, estimator, baseline)
        # |e_y - p|^2 = 1 - 2 p_y + |p|^2
        square = 1 - 2 * p.exp() + p.exp().square().sum(-1, keepdim=True)
        weighted = p.exp() * slope
        mean = weighted - weighted.sum(-1, keepdim=True) * p.exp()
        second = (weighted * slope * square).sum()
        noise = (second - mean.square().sum()) / size
        bias = ((mean - full).square().sum() / size).sqrt()
        found[name] = {"noise": float(noise), "bias": float(bias), "places": float(len(p))}
    return found


def _slopes(p: Any, q: Any, estimator: str, baseline: str) -> Any:
    """[n, V]: dL/dz = slope (e_y - p) if token y was sampled; p, q [n, V] log-probs."""
    import torch

    from megaopd.losses import sampled_terms, vopd_baseline

    options: dict[str, Any] = {}
    if baseline:
        given: dict[str, Any] = {"rkl": (p.exp() * (p - q)).sum(-1)}
        if baseline == "topk":
            top = p.topk(5, -1).indices
            given = {
                "student_log_probs": p.gather(-1, top),
                "teacher_log_probs": q.gather(-1, top),
            }
        elif baseline == "optimal":
            squares = p.exp().square()
            given |= {"sum_p2": squares.sum(-1), "sum_p2_rho": (squares * (p - q)).sum(-1)}
        options["baseline"] = vopd_baseline(baseline, **given)
    columns = [
        sampled_terms(p[:, y], q[:, y], estimator=estimator, **options)[1]
        for y in range(p.shape[1])
    ]
    return torch.stack(columns, -1)
