"""Every method's recipe is a run in both variants, and is compared with one that exists."""

import pytest

from megaopd.recipes import filled, method, methods, places
from megaopd.schema import make_config


@pytest.mark.parametrize("variant", ["tiny", "full"])
@pytest.mark.parametrize("name", methods())
def test_a_method_is_a_run(name, variant):
    values = method(name).values(variant)
    config = make_config(filled(values, dict.fromkeys(places(values), "made/by/a/stage")))
    assert config.run.steps > 0


@pytest.mark.parametrize("name", methods())
def test_a_method_names_how_it_is_judged(name):
    one = method(name)
    assert one.direction in ("up", "down", "none") and one.metric
    assert one.baseline == "student" or method(one.baseline).metric == one.metric
