"""The recipes of docs/extending.md run, with their plugin."""

import json

import pytest

from tests.e2e.runs import columns, megaopd
from tests.e2e.test_recipes import SHORT, STAGES
from tests.extending import write_files


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    write_files(root)
    return root


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("triangular", ()),
        pytest.param("triangular", ("objective.loss=pseudo_huber",), marks=pytest.mark.slow),
        pytest.param("my_method", (), marks=pytest.mark.slow),
        pytest.param(
            "triangular", ("data.source=task:addition2", "objective.support=student_topk",
            "objective.k=8"), marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_recipe_of_the_page(root, name, own):
    stages = [word for one in STAGES for word in ("--stages", one)]
    recipe = root / f"{name}.toml"
    folder = root / "runs" / str(len(own)) / name
    done = megaopd("recipe", recipe, "--dir", folder, *stages, *SHORT, *own, timeout=280)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (folder / "seed_0").glob(f"{name}-????????")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after"} <= summary.keys()
    if name == "triangular":
        (first, *_), *_ = columns(run_dir, "my/longest")
        assert float(first) >= 1.0
