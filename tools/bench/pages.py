"""Pages of docs/ that a tool fills in: a table between two marks, the prose around it by hand."""

from pathlib import Path


def fill(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end of name -->`, each on its own line.

    Raises SystemExit where the page has not got both, so that no measurement is lost in silence.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page}: expected the lines {begin.strip()} and {end.strip()}")
    page.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}")
