"""Whole runs as TOML files, and where to find them."""

from pathlib import Path


def recipe(name: str) -> Path:
    """The path of a packaged recipe, e.g. recipe("quickstart/opd")."""
    return Path(__file__).parent / f"{name}.toml"
