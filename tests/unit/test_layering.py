"""Imports point downward: a module imports only from its own layer's list below."""

import ast
from pathlib import Path

import megaopd

PACKAGE = Path(megaopd.__file__).parent
# Top first. A module may import from its own layer and from every layer below it.
LAYERS = [
    ["cli", "__main__"],
    ["study"],
    ["quickstart", "doctor"],
    ["run"],
    ["evaluation"],
    ["sampling"],
    ["build"],
    ["parts"],
    ["sampler", "teacher_ranks"],
    ["mixing"],
    ["inputs"],
    ["plan"],
    ["schema", "recipes", "checks"],
    ["extend"],
    ["trainer"],
    ["rollout"],
    ["objectives"],
    ["losses"],
    ["models"],
    ["data"],
    ["report"],
    ["launch", "elastic"],
    ["worlds"],
    ["parallel"],
    ["platform", "faults", "stop", "watchdog", "config"],
    ["errors"],
]
# A launcher starts a command line in other processes; with one rank, in this one.
UPWARD_ALLOWED = {("launch", "cli")}
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """Top-level parts of the package that this file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "megaopd":
                names = [f"megaopd.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "megaopd" and len(parts) > 1 and not parts[1].startswith("__"):
                found.add(parts[1])
    return found


def test_every_part_has_a_layer():
    parts = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()}
    parts -= {"__init__", "__pycache__"}
    assert parts == set(RANK)


def test_imports_point_downward():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for target in imports(path):
            if RANK[target] < RANK[part] and (part, target) not in UPWARD_ALLOWED:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {target}")
    assert not wrong, wrong


def test_only_platform_asks_about_the_gpu():
    """No other file branches on the device: what differs without a GPU is in platform.py."""
    asking = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "cuda.is_available" in path.read_text() and path.name not in ("platform.py", "doctor.py")
    ]
    assert asking == []
