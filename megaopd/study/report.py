"""The report of a study: a table of cases, a line for each finding, and plots; from its files."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from megaopd.study import many_faces

QUESTIONS = {
    1: "The loss, over k",
    2: "The teacher",
    4: "The student as its own teacher",
    5: "Where the student comes from",
    6: "Sampled-token estimators",
}


def write(root: Path, seeds: Sequence[int]) -> Path:
    """study.md, study.json and plots under `root`; the page's path."""
    table = load(root)
    prefixes = {
        int(p.stem.split("-")[1]): json.loads(p.read_text())
        for p in sorted((root / "figures").glob("prefixes-*.json"))
    }
    lines = ["# The Many Faces of On-Policy Distillation, at laptop scale", ""]
    lines += [
        "    megaopd study many_faces --seeds " + " ".join(map(str, seeds)),
        "",
        "Two-digit addition, a student of 25,312 parameters that knows a third of it, a teacher of "
        "99,776, 120 steps of 96 samples;",
        "the centre is reverse KL on the student's top 2 of 18 tokens with the gradient stopped. "
        "Figures are means over seeds, +- the standard",
        "deviation; rules of the verdicts stand in megaopd/study/many_faces.py and were written "
        "before the runs. One task, small models: a verdict",
        "is about these, not about the paper's.",
        "",
        "## Findings",
        "",
        "| the paper's finding | verdict | evidence |",
        "|---|---|---|",
    ]
    for finding in many_faces.FINDINGS:
        lines.append(f"| {finding.says} | {finding.verdict(table)} | {finding.evidence(table)} |")
    means = [fmean(column) for column in zip(*prefixes.values(), strict=True)]
    evidence = ", ".join(f"{n} tokens: {m:.3f}" for n, m in enumerate(means)) or "no run"
    verdict = many_faces.prefix_verdict(prefixes)
    lines.append(f"| {many_faces.PREFIX_FINDING} | {verdict} | {evidence} |")
    lines += ["", "## Cases", ""]
    for question, title in QUESTIONS.items():
        lines += [f"### {title}", "", "| case | accuracy | gain | exact KL | entropy | mass |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            _row(case.name, list(table[case.name].values()))
            for case in many_faces.CASES
            if case.question == question and case.name in table
        ]
        lines.append("")
    lines += ["![mass on the support over the steps](mass.png)", ""]
    lines += ["![accuracy of every case, by seed](accuracy.png)", ""]
    _plot_mass(root)
    _plot_accuracy(root, table)
    (root / "study.json").write_text(json.dumps({"cases": table, "prefixes": prefixes}, indent=1))
    path = root / "study.md"
    path.write_text("\n".join(lines))
    return path


def load(root: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Figures by case and seed, of what has been run."""
    table: dict[str, dict[int, dict[str, float]]] = {}
    for path in sorted((root / "figures").glob("*.json")):
        if path.name.endswith(".curve.json") or path.name.startswith("prefixes-"):
            continue
        record = json.loads(path.read_text())
        table.setdefault(record.pop("case"), {})[record.pop("seed")] = record
    return table


def _row(name: str, rows: list[dict[str, float]]) -> str:
    def cell(values: list[float]) -> str:
        spread = f" +- {stdev(values):.3f}" if len(values) > 1 else ""
        return f"{fmean(values):.3f}{spread}" if values else "-"

    def column(key: str) -> str:
        return cell([r[key] for r in rows if key in r])

    gain = cell([r["accuracy"] - r["before"] for r in rows])
    cells = [column("accuracy"), gain, column("kl"), column("entropy"), column("mass")]
    return f"| {name} | " + " | ".join(cells) + " |"


def _axes(count: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, count, figsize=(width, height), squeeze=False)


def _plot_mass(root: Path) -> None:
    """The student's mass on its top k, step by step, first seed that is there."""
    figure, axes = _axes(len(many_faces.KS), 10, 3)
    for axis, k in zip(axes[0], many_faces.KS, strict=True):
        for color, variant in enumerate(many_faces.TRUNCATED):
            stem = "".join(c if c.isalnum() else "_" for c in f"{variant}, k={k}")
            for path in sorted((root / "figures").glob(f"{stem}-*.curve.json"))[:3]:
                mass = json.loads(path.read_text())["mass_student"]
                first = path.name.endswith("-0.curve.json")
                axis.plot(mass, color=f"C{color}", alpha=0.7, label=variant if first else None)
        axis.set_title(f"k = {k}", fontsize=9)
        axis.set_ylim(0, 1.02)
    axes[0][0].set_ylabel("student's mass on the support")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(root / "mass.png", dpi=120)


def _plot_accuracy(root: Path, table: dict[str, dict[int, dict[str, float]]]) -> None:
    names = [c.name for c in many_faces.CASES if c.name in table][::-1]
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
