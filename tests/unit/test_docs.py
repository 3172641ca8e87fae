"""The documentation names what there is: every field, no other, and no file that is missing."""

import dataclasses
import re
import tomllib
import typing
from pathlib import Path

import pytest

from megaopd.schema import Config

ROOT = Path(__file__).parents[2]
# dict[str, X] is a section for each name: [teachers.NAME].
SECTIONS = {
    f.name: typing.get_args(f.type)[1] if typing.get_args(f.type) else f.type
    for f in dataclasses.fields(Config)
}
PAGES = [
    "README.md",
    "docs/batches.md",
    "docs/clusters.md",
    "docs/configuration.md",
    "docs/design-notes.md",
    "docs/extending.md",
    "docs/large-runs.md",
    "docs/layouts.md",
    "docs/losses.md",
    "docs/planner.md",
    "docs/rollouts.md",
    "docs/teachers.md",
]


def documented() -> dict[str, dict[str, str]]:
    """section -> {key: default as written}, from the tables of docs/configuration.md."""
    found: dict[str, dict[str, str]] = {}
    current: list[str] = []
    for line in (ROOT / "docs/configuration.md").read_text().splitlines():
        if line.startswith("## "):
            current = re.findall(r"\[(\w+)(?:\.NAME)?\]", line)
        row = re.match(r"\| `(\w+)` \| (.+?) \|", line)
        for section in current if row else []:
            found.setdefault(section, {})[row[1]] = row[2]
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_is_documented_with_its_default(section):
    fields = {f.name: f for f in dataclasses.fields(SECTIONS[section])}
    rows = documented()[section]
    assert rows.keys() == fields.keys()
    for name, field in fields.items():
        if field.default is dataclasses.MISSING:
            assert rows[name] == "required", name
        else:
            written = tomllib.loads(f"x = {rows[name].strip('`')}")["x"]
            assert (tuple(written) if isinstance(written, list) else written) == field.default, name


def test_no_section_is_documented_that_does_not_exist():
    assert documented().keys() == SECTIONS.keys()


@pytest.mark.parametrize("page", PAGES)
def test_keys_in_the_text_exist(page):
    """`section.key` in backticks or as an override; not a file such as `run.py`."""
    text = (ROOT / page).read_text()
    named = re.findall(rf"(?<![\w/.])({'|'.join(SECTIONS)})\.(\w+)(?=[`=])", text)
    named = [(s, k) for s, k in named if k not in ("py", "toml", "html", "jsonl", "txt")]
    assert named or page in ("docs/design-notes.md", "docs/losses.md")
    for section, key in named:
        assert key in {f.name for f in dataclasses.fields(SECTIONS[section])}, f"{section}.{key}"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page):
    text = (ROOT / page).read_text()
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    missing = [t for t in targets if not ((ROOT / page).parent / t).exists()]
    assert not missing
    assert targets or page != "README.md"


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\b(?:launch|megaopd|docs|tests)/[\w./]+\.(?:sh|toml|md|py)\b", text):
        assert (ROOT / path).is_file(), path


def test_the_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    for script in ("launch/quickstart.sh", "launch/test.sh"):
        assert f"bash {script}" in text and (ROOT / script).is_file()
