"""Where the optimizer's state lives: what is refused, and what megatron-core is told."""

from types import SimpleNamespace

import pytest

from megaopd import platform
from megaopd.errors import UserError
from megaopd.trainer.config import OptimConfig
from megaopd.trainer.optim import check_optimizer


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cpu_offload": 1.5}, "optim.cpu_offload = 1.5"),
        ({"cpu_offload": 0.5, "distributed": False}, "optim.cpu_offload = 0.5 with optim.dist"),
        ({"state_dtype": "bfloat16", "distributed": False}, "optim.state_dtype = bfloat16 with"),
        ({"state_dtype": "bfloat16", "cpu_offload": 0.5}, "one of the two"),
    ],
)
def test_refused(values, said):
    with pytest.raises(UserError, match=said):
        OptimConfig(**values)


def test_refused_on_a_machine_that_cannot(monkeypatch):
    monkeypatch.setattr(platform, "has_gpu", lambda: False)
    with pytest.raises(UserError, match=r"cpu_offload = 0\.5 without a GPU"):
        check_optimizer(OptimConfig(cpu_offload=0.5))
    with pytest.raises(UserError, match="without Transformer Engine"):
        check_optimizer(OptimConfig(state_dtype="bfloat16"))
    check_optimizer(OptimConfig())


def told(values):
    """The fields of megatron-core's OptimizerConfig that these options set."""
    import torch
    from megatron.core.optimizer import optimizer_config as module

    from megaopd.trainer.optim import optimizer_config

    original, module.is_te_min_version = module.is_te_min_version, lambda version: True
    model = SimpleNamespace(params_dtype=torch.bfloat16, fp8_param=False, fp8_recipe=None)
    made = optimizer_config(OptimConfig(**values), model)
    module.is_te_min_version = original
    names = "optimizer_cpu_offload optimizer_offload_fraction use_precision_aware_optimizer"
    return [getattr(made, name) for name in (*names.split(), "overlap_cpu_optimizer_d2h_h2d")]


def test_what_megatron_core_is_told(ranks):
    """As it would be with Transformer Engine, whose version is asked for."""
    assert ranks.run(told, 1, {"cpu_offload": 0.5}) == [[True, 0.5, True, True]]
    assert ranks.run(told, 1, {}) == [[False, 0.0, False, False]]
