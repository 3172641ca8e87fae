"""`megaopd doctor`: a row for every choice, and the versions that the pins name."""

import re
from pathlib import Path

import pytest

from megaopd import doctor, platform

PINS = Path(__file__).parents[2] / "launch"


@pytest.fixture(autouse=True)
def installed():
    platform.install()


def test_known_good_versions_are_the_pins():
    pins = {}
    for path in PINS.glob("requirements-*.txt"):
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), re.M):
            pins.setdefault(name.lower().replace("_", "-"), set()).add(version)
    for package, version in doctor.KNOWN_GOOD.items():
        assert version in pins[package], package


def test_every_choice_has_an_answer_and_a_reason():
    rows = {what: (used, why) for what, used, why in doctor.choices()}
    wanted = ["device", "collectives", "attention", "norms", "Adam", "rollouts"]
    assert rows.keys() >= {*wanted, "weight-gradient accumulation", "optimizer on the host"}
    assert all(used and why for used, why in rows.values())
    if not platform.has_gpu():
        assert rows["device"][0] == "cpu" and rows["collectives"][0] == "gloo"
        assert rows["attention"] == ("torch scaled_dot_product_attention", "no GPU")
        assert rows["optimizer on the host"][0] == "refused"


def test_verdicts(monkeypatch):
    have = {"torch": "2.13.0+cpu", "numpy": "1.0", "apex": "0.9"}
    monkeypatch.setattr(doctor, "_version", lambda package: have.get(package, ""))
    verdicts = {package: verdict for package, _, verdict in doctor.versions()}
    assert verdicts["torch"] == "known to work"
    assert verdicts["numpy"] == "not tried: known to work is 2.4.6"
    assert verdicts["transformers"] == "MISSING: needed"
    assert verdicts["transformer-engine"].startswith("absent: local layers")
    assert "not NVIDIA's apex" in verdicts["apex"]
