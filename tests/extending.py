"""The files of docs/extending.md: "`NAME`:" and a block behind it."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def write_files(folder: Path) -> dict[str, str]:
    """Every file of the page, written to a folder; name -> text."""
    blocks = re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    for name, text in blocks:
        (folder / name).write_text(text)
    return dict(blocks)


def commands() -> list[str]:
    """Every command line of the page."""
    return [
        line.split("#")[0].strip().removeprefix("megaopd ")
        for line in PAGE.read_text().splitlines()
        if line.startswith("    megaopd ")
    ]
