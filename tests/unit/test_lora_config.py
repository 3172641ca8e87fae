"""[lora]: what is refused."""

import pytest

from megaopd.errors import UserError
from megaopd.models.config import LoraConfig


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
