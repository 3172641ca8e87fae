"""Every method's tiny variant over some seeds, judged by the metric that its recipe names.

python tools/recipe_table.py                      all methods, seeds 0 1 2 -> docs/recipes.md, .json
python tools/recipe_table.py --only grpo kdrl --out docs/recipes_some     some of them and their
                                                  baselines, in a table of their own
python tools/recipe_table.py --pages              docs/methods/: a page a method, from the recipes

What the folder of runs has already is not run again. An improvement is claimed where the metric
went the way that the recipe names, against its baseline, with every seed.
"""

import argparse
import json
import os
import statistics
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DOCS = ROOT / "docs"
SETTINGS = ("objective", "mix", "reference", "teacher", "data", "rollout", "student", "lora")

from megaopd.recipes import Method, method, methods  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="methods; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--out", type=Path, default=DOCS / "recipes")
    parser.add_argument("--pages", action="store_true", help="only write docs/methods/")
    options = parser.parse_args()
    if options.pages:
        write_pages()
        return 0
    wanted = list(dict.fromkeys(_with_baselines(options.only or methods())))
    records = [
        _run(name, options.work, seed, start) for seed in options.seeds for name, start in wanted
    ]
    _write(options, records)
    failed = [r for r in records if "error" in r]
    return 1 if failed else 0


def _with_baselines(names: list[str]) -> list[tuple[str, str]]:
    """Each after what it is compared with; and the student it starts from, if not its recipe's."""
    found: list[tuple[str, str]] = []
    for name in names:
        one = method(name)
        if one.baseline != "student":
            found += _with_baselines([one.baseline])
            found.append((one.baseline, one.baseline_student))
        found.append((name, ""))
    return found


def _run(name: str, work: Path, seed: int, start: str) -> dict[str, Any]:
    from megaopd.study.methods import run_tiny

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", OMP_NUM_THREADS="1")
    try:
        found = run_tiny(name, work, seed, [f"student.path={start}"] if start else [])
    except Exception as error:  # one method's fault is a row of the table
        traceback.print_exc()
        found = {"method": name, "seed": seed, "error": f"{type(error).__name__}: {error}"}
    return {**found, "start": start}


def judged(one: Method, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A method's mean and its difference from the baseline, seed by seed."""
    whole = [r for r in records if "error" not in r]

    def by_seed(name: str, start: str) -> dict[int, dict[str, Any]]:
        chosen = (r for r in whole if r["method"] == name and r.get("start", "") == start)
        return {r["seed"]: r for r in chosen}

    mine, base = by_seed(one.name, ""), by_seed(one.baseline, one.baseline_student)
    pairs = []
    for seed, record in mine.items():
        if one.baseline == "student":
            pairs.append(record["after"][one.metric] - record["before"][one.metric])
        elif one.metric in base.get(seed, {"after": {}})["after"]:
            pairs.append(record["after"][one.metric] - base[seed]["after"][one.metric])
    sign = {"up": 1, "down": -1, "none": 0}[one.direction]
    return {
        "after": statistics.mean(r["after"][one.metric] for r in mine.values()) if mine else None,
        "differences": pairs,
        "as_named": bool(pairs) and all(sign * d > 0 for d in pairs) if sign else None,
    }


def _baseline(one: Method) -> str:
    """What a method is compared with, in words."""
    start = one.baseline_student.strip("{}")
    return one.baseline + (f" from `{start}`" if start else "")


def _write(options: Any, records: list[dict[str, Any]]) -> None:
    for record in records:
        record.pop("dir", None)
    record = {"seeds": options.seeds, "runs": records}
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    name = options.out.name
    only = f" --only {' '.join(options.only)} --out docs/{name}" if options.only else ""
    lines = [
        "# Methods at laptop scale",
        "",
        f"    python tools/recipe_table.py --seeds {' '.join(map(str, options.seeds))}{only}",
        "",
        "The tiny variant of every recipe (`megaopd recipe NAME`): two-digit addition, a student "
        "of 25,312 parameters that knows a third of it, a",
        "teacher of 99,776, the embedded engine, one process. Metric, direction and baseline stand "
        "in the recipe and were written before the runs.",
        "Difference: to the baseline with the same seed, mean [smallest, largest]. 'as named': in "
        "the named direction with every seed.",
        "",
        "| method | metric | after | baseline | difference | named | as named |",
        "|---|---|---|---|---|---|---|",
    ]
    against = []
    for name in dict.fromkeys(r["method"] for r in records):
        one = method(name)
        found = judged(one, records)
        if not found["differences"]:
            errors = {r["error"] for r in records if r["method"] == name and "error" in r}
            lines.append(f"| {name} | {one.metric} | failed: {'; '.join(errors)} | | | | |")
            continue
        d = found["differences"]
        verdict = {True: "yes", False: "**no**", None: "-"}[found["as_named"]]
        against += [name] if found["as_named"] is False else []
        lines.append(
            f"| [{name}](methods/{name}.md) | {one.metric} | {found['after']:.3f} "
            f"| {_baseline(one)} | {statistics.mean(d):+.3f} [{min(d):+.3f}, {max(d):+.3f}] "
            f"| {one.direction} | {verdict} |"
        )
    lines += ["", f"Not as named: {', '.join(against) or 'none'}.", ""]
    options.out.with_suffix(".md").write_text("\n".join(lines))
    write_pages()


def write_pages() -> None:
    """docs/methods/NAME.md, and an index; a method's figures are from the first of the tables
    docs/recipes*.json that has it. "since" there: by method, what is otherwise today."""
    tables = {
        path.with_suffix(".md").name: json.loads(path.read_text())
        for path in sorted(DOCS.glob("recipes*.json"))
    }
    folder = DOCS / "methods"
    folder.mkdir(exist_ok=True)
    index = ["# Methods", "", "A page each, from the recipes in `megaopd/recipes/methods/`.", ""]
    index += ["| method | what | when |", "|---|---|---|"]
    for name in methods():
        one = method(name)
        found = (t for t, d in tables.items() if any(r["method"] == name for r in d["runs"]))
        table = next(found, "")
        document = tables.get(table, {"runs": []})
        since = document.get("since", {}).get(name, "")
        (folder / f"{name}.md").write_text(page(one, document["runs"], table, since))
        index.append(f"| [{name}]({name}.md) | {one.about} | {one.when} |")
    (folder / "README.md").write_text("\n".join([*index, ""]))


def page(one: Method, records: list[dict[str, Any]], table: str, since: str) -> str:
    """What, when, costs, settings, source, and what was measured (in the table of that name)."""
    source = f"arXiv {one.paper}" if one.paper[:4].isdigit() else one.paper
    lines = [f"# {one.name}", "", f"{one.about[0].upper()}{one.about[1:]}. Source: {source}.", ""]
    lines += [f"- When: {one.when}.", f"- Costs: {one.cost}."]
    lines += [f"- Note: {one.note}."] if one.note else []
    lines += [""]
    lines += [f"    megaopd recipe {one.name}                            # on a laptop"]
    lines += [f"    megaopd recipe {one.name} --variant full --show      # TOML for H100s", ""]
    lines += ["Its own settings (what each does: [configuration.md](../configuration.md)):", ""]
    for section in SETTINGS:
        for key, value in one.sections.get(section, {}).items():
            lines.append(f"    {section}.{key} = {json.dumps(value)}")
    for variant in ("tiny", "full"):
        for section, values in one.sections.get(variant, {}).items():
            for key, value in values.items():
                lines.append(f"    {section}.{key} = {json.dumps(value)}    # {variant}")
    goes = {"up": "expected up", "down": "expected down", "none": "no direction claimed"}
    lines += ["", f"Judged by {one.metric} against {_baseline(one)}, {goes[one.direction]}."]
    found = judged(one, records)
    if found["differences"]:
        d = found["differences"]
        lines.append(
            f"Measured at laptop scale over {len(d)} seeds: {found['after']:.3f} after, difference "
            f"{statistics.mean(d):+.3f} [{min(d):+.3f}, {max(d):+.3f}] ([all](../{table}))."
        )
        lines += [since] if since else []
    return "\n".join([*lines, "", "The full variant has not been run on GPUs.", ""])


if __name__ == "__main__":
    sys.exit(main())
