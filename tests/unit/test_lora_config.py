"""[lora]: what is refused."""

from types import SimpleNamespace

import pytest

from megaopd.errors import UserError
from megaopd.models.config import LoraConfig
from megaopd.models.layout import check_lora_targets


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": -1}, "lora.rank = -1"),
        ({"rank": 4, "targets": ()}, "nothing would be trained"),
        ({"rank": 4, "alpha": 0.0}, "lora.alpha = 0.0"),
    ],
)
def test_refused(values, said):
    with pytest.raises(UserError, match=said):
        LoraConfig(**values)


def architecture_of(**changes):
    base = {"family": "x", "latent": None, "experts": None}
    return SimpleNamespace(**{**base, **changes})


@pytest.mark.parametrize(
    ("arch", "target"),
    [
        ({"latent": object()}, "qkv"),
        ({"experts": SimpleNamespace(sparse=(False, True))}, "fc1"),
    ],
)
def test_targets_that_a_model_lacks_are_refused_before_it_is_read(arch, target):
    with pytest.raises(UserError, match=f"lora.targets holds {target}"):
        check_lora_targets(architecture_of(**arch), LoraConfig(rank=4))
    check_lora_targets(architecture_of(**arch), LoraConfig(rank=4, targets=("proj",)))
    check_lora_targets(architecture_of(**arch), LoraConfig())
    check_lora_targets(architecture_of(), LoraConfig(rank=4))
