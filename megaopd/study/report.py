"""The report of a study: a table of cases, a line for each finding, and plots; from its files."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from megaopd.study import cases, many_faces
from megaopd.study.jobs import all_stored
from megaopd.study.system_prompt import SYSTEM

QUESTIONS = {
    1: "The loss, over k",
    2: "The teacher",
    3: "Student x teacher x what the teacher sees, at two losses",
    4: "The student as its own teacher",
    5: "Where the student comes from",
    6: "Sampled-token estimators",
    7: "The student as it began is its teacher: what it sees, alone and as a reweighting of GRPO",
    8: "The full grid",
    9: "A real model learns a system prompt",
}
PLOTS = {
    "mass.png": "mass on the support over the steps",
    "efficiency.png": "reward of the samples of sampled-token estimators and the full divergence",
    "accuracy.png": "accuracy of every case, by seed",
}
# Student's t at 0.975 for 1, 2, ... degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
STYLE = (
    "body{max-width:72rem;margin:2rem auto;padding:0 1rem;font:16px/1.5 system-ui,sans-serif}"
    "table{border-collapse:collapse;font-size:.9rem}td,th{border:1px solid #8886;"
    "padding:.25rem .6rem;text-align:left}img{max-width:100%}"
)


def write(root: Path, seeds: Sequence[int], *, seconds: float | None = None) -> Path:
    """study.md, study.html, study.json and plots under `root`; the page's path.

    seconds: what the runs took; None where not all of them are of this call: it is not told then.
    """
    table = load(root)
    prefixes, noise, system = (all_stored(root, name) for name in ("prefixes", "noise", "system"))
    lines = ["# The Many Faces of On-Policy Distillation, at laptop scale", ""]
    lines += [
        "    megaopd study many_faces --seeds " + " ".join(map(str, seeds)),
        "",
        "Two-digit addition, a student of 25,312 parameters that knows a third of it, a teacher of "
        "99,776, 120 steps of 96 samples; the centre is reverse KL on the student's top 2 of 18 "
        "tokens with the gradient stopped; with GRPO, 48 prompts of 8 samples. Question 7 starts "
        "from students that have learnt to read help. Figures are means over seeds, +- half of the "
        "95% t-interval of the mean. The rules of the verdicts stand in "
        "megaopd/study/many_faces.py and were written before the runs. One family of tasks, small "
        "models: a verdict is about these, not about the paper's.",
        "",
        *([f"{len(table)} cases, {len(seeds)} seeds, {seconds:.0f} s.", ""] if seconds else []),
    ]
    lines += _findings(table, prefixes, noise, system)
    lines += ["", "## Cases", ""]
    lines += [
        "Exact KL: to the teacher, over the whole vocabulary. Mass: of the student on its list."
    ]
    lines += [""]
    for question, title in QUESTIONS.items():
        rows = [n for n, case in cases.BY_NAME.items() if case.question == question and n in table]
        below = _noise_table(noise) if question == 6 else []
        if not rows and not below:
            continue
        lines += [f"### {title}", "", "| case | accuracy | gain | exact KL | entropy | mass |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_row(name, list(table[name].values())) for name in rows]
        lines.append("")
        lines += below
    lines += _system_table(system)
    for name, what in PLOTS.items():
        lines += [f"![{what}]({name})", ""]
    _plot_mass(root)
    _plot_efficiency(root)
    _plot_accuracy(root, table)
    (root / "study.json").write_text(
        json.dumps(
            {"cases": table, "prefixes": prefixes, "noise": noise, "system": system}, indent=1
        )
    )
    path = root / "study.md"
    path.write_text("\n".join(lines))
    _write_html(root, "\n".join(lines))
    return path


def _findings(table: Any, prefixes: Any, noise: Any, system: Any) -> list[str]:
    """A line of each, with its verdict and the means that it rests on."""
    lines = [
        "## Findings",
        "",
        "| the paper's finding | verdict | evidence |",
        "|---|---|---|",
    ]
    for finding in many_faces.FINDINGS:
        lines.append(f"| {finding.says} | {finding.verdict(table)} | {finding.evidence(table)} |")
    verdict, evidence = many_faces.prefix_verdict(prefixes), _prefix_evidence(prefixes)
    lines.append(f"| {many_faces.PREFIX_FINDING} | {verdict} | {evidence} |")
    verdict, evidence = many_faces.noise_verdict(noise), _noise_evidence(noise)
    lines.append(f"| {many_faces.NOISE_FINDING} | {verdict} | {evidence} |")
    verdict, evidence = many_faces.system_verdict(system), _system_evidence(system)
    lines.append(f"| {many_faces.SYSTEM_FINDING} | {verdict} | {evidence} |")
    return lines


def _write_html(root: Path, text: str) -> None:
    """The same page in one file, with its plots."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(text)
    for name in PLOTS:
        data = base64.b64encode((root / name).read_bytes()).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>megaopd study</title>'
    (root / "study.html").write_text(f"{head}<style>{STYLE}</style><body>{body}</body></html>\n")


def _prefix_evidence(prefixes: Mapping[int, Any]) -> str:
    if not prefixes:
        return "no run"
    parts = []
    for group in ("all", "right", "wrong"):
        columns = zip(*(f[group] for f in prefixes.values() if group in f), strict=True)
        name = group if group == "all" else f"the student's first token {group}"
        means = ", ".join(f"{fmean(column):.3f}" for column in columns)
        parts.append(f"{name}: {means}")
    lengths = ", ".join(map(str, cases.PREFIXES))
    share = fmean(found["wrong_share"][0] for found in prefixes.values())
    return f"{lengths} tokens, {'; '.join(parts)} ({share:.0%} of the responses)"


def _noise_evidence(noise: Mapping[int, Any]) -> str:
    names = ("pg", "vopd, top 5", "vopd, optimal")
    means = [f"{n}: {fmean(s[n]['noise'] for s in noise.values()):.2f}" for n in names if noise]
    return "noise " + ", ".join(means) if means else "no run"


def _noise_table(noise: Mapping[int, Any]) -> list[str]:
    if not noise:
        return []
    lines = [
        "Noise: variance of a sampled token's gradient at the logits over the squared norm of the "
        "full divergence's; bias: of its mean. Exact sums over the vocabulary, at every token of "
        "400 responses of the student before training.",
        "",
        "| estimator | noise | bias |",
        "|---|---|---|",
    ]
    for name in next(iter(noise.values())):
        columns = [_cell([s[name][key] for s in noise.values()]) for key in ("noise", "bias")]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return [*lines, ""]


def _system_evidence(system: Mapping[int, Any]) -> str:
    if not system:
        return "no run: --real-model gives it one"
    before, after = (fmean(s[when]["kl"] for s in system.values()) for when in ("before", "after"))
    return f"KL {before:.3f} -> {after:.3f}"


def _system_table(system: Mapping[int, Any]) -> list[str]:
    if not system:
        return []
    names = list(next(iter(system.values()))["before"])
    lines = [
        f"### {QUESTIONS[9]}",
        "",
        f"{', '.join(sorted({found.get('model', 'a model') for found in system.values()}))}. "
        f'The student is asked 24 questions of topics that it was not trained on; "{SYSTEM}" is '
        "what its teacher reads besides. Figures by seed; kl in nats a token.",
        "",
        f"| seed | | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for seed, found in system.items():
        for when in ("before", "after"):
            cells = " | ".join(f"{found[when][name]:.3f}" for name in names)
            lines.append(f"| {seed} | {when} | {cells} |")
    return [*lines, ""]


def load(root: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Figures by case and seed, of what has been run as the cases are now."""
    table = {name: all_stored(root, name) for name in cases.BY_NAME}
    return {name: by_seed for name, by_seed in table.items() if by_seed}


def _cell(values: list[float]) -> str:
    """The mean, and half of the 95% t-interval."""
    if len(values) < 2:
        return f"{fmean(values):.3f}" if values else "-"
    quantile = T_975[min(len(values) - 2, len(T_975) - 1)]
    half = quantile * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):.3f} +- {half:.3f}"


def _row(name: str, rows: list[dict[str, float]]) -> str:
    def column(key: str) -> str:
        return _cell([r[key] for r in rows if key in r])

    gain = _cell([r["accuracy"] - r["before"] for r in rows])
    cells = [column("accuracy"), gain, column("kl"), column("entropy"), column("mass")]
    return f"| {name} | " + " | ".join(cells) + " |"


def _axes(count: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, count, figsize=(width, height), squeeze=False)


def _plot_mass(root: Path) -> None:
    """The student's mass on its top k, step by step, first seed that is there."""
    figure, axes = _axes(len(cases.KS), 10, 3)
    for axis, k in zip(axes[0], cases.KS, strict=True):
        labelled = set[str]()
        for color, variant in enumerate(cases.TRUNCATED):
            curves = all_stored(root, f"{variant}, k={k}", "curve")
            for seed in list(curves)[:3]:
                label = None if variant in labelled else variant
                mass = curves[seed]["mass_student"]
                axis.plot(mass, color=f"C{color}", alpha=0.7, label=label)
                labelled.add(variant)
        axis.set_title(f"k = {k}", fontsize=9)
        axis.set_ylim(0, 1.02)
    axes[0][0].set_ylabel("student's mass on the support")
    if axes[0][-1].lines:
        axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(root / "mass.png", dpi=120)


def _plot_efficiency(root: Path) -> None:
    """Rewards of the samples that are trained on, mean over seeds and ten steps, by samples."""
    figure, axes = _axes(1, 7, 3.2)
    for name in ("full", *(n for n, case in cases.BY_NAME.items() if case.question == 6)):
        curves = [c["reward"] for c in all_stored(root, name, "curve").values()]
        curves = [curve for curve in curves if None not in curve]
        if curves:
            means = [fmean(column) for column in zip(*curves, strict=False)]
            smooth = [fmean(means[max(0, i - 9) : i + 1]) for i in range(len(means))]
            axes[0][0].plot([96 * (i + 1) for i in range(len(smooth))], smooth, label=name)
    axes[0][0].set_xlabel("samples")
    axes[0][0].set_ylabel("reward of the samples")
    if axes[0][0].lines:
        axes[0][0].legend(fontsize=7)
    axes[0][0].grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(root / "efficiency.png", dpi=120)


def _plot_accuracy(root: Path, table: dict[str, dict[int, dict[str, float]]]) -> None:
    names = [name for name in cases.BY_NAME if name in table][::-1]
    figure, axes = _axes(1, 7, 0.24 * max(len(names), 4) + 0.8)
    for place, name in enumerate(names):
        values = [r["accuracy"] for r in table[name].values()]
        axes[0][0].plot(values, [place] * len(values), "o", color="C0", alpha=0.6, ms=4)
        axes[0][0].plot([fmean(values)], [place], "|", color="k", ms=10)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=7)
    axes[0][0].set_xlabel("greedy accuracy after")
    axes[0][0].grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(root / "accuracy.png", dpi=120)
