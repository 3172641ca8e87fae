"""Activation recompute: the same trajectory, with adapters and over stages, less memory."""

import gc

import pytest

from tests.dist import lora_cases as cases
from tests.dist.layouts import LAYOUTS, SINGLE, differences
from tests.dist.models import save_tiny, tokens
from tests.often import often
from tools.bench.measure import LiveBytes

NAMES = ("one", "pp2", "tp2-sp", "cp2", "pp2-vpp2")
KINDS = ("full", "selective")
LENGTH = 512
WIDE = {"num_hidden_layers": 8, "max_position_embeddings": LENGTH}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return (
        str(save_tiny(root / "student", "qwen3", tied=True)),
        str(save_tiny(root / "teacher", "qwen3", tied=False, seed=11, hidden_size=96)),
    )


def all_cases(paths, layout):
    """(lora, kind) -> what cases.trajectory gives."""
    return {
        (lora, kind): cases.trajectory(paths, layout, lora=lora, recompute=kind)
        for lora in (False, True)
        for kind in ("none", *KINDS)
    }


@pytest.mark.parametrize("name", often(NAMES, ["one", "tp2-sp"]))
def test_same_trajectory(ranks, checkpoints, name):
    layout = SINGLE if name == "one" else LAYOUTS[name]
    found = ranks.run(all_cases, layout.world, checkpoints, layout)[0]
    for lora in (False, True):
        for kind in KINDS:
            loss, norm, size = differences(found[lora, "none"], found[lora, kind])
            print(f"{name} lora={lora} {kind}: loss {loss:.1e}, gradient norm {norm:.1e}")
            assert loss <= 2e-6 and norm <= 1e-5 and size <= 1e-5, (lora, kind)
            assert all(norm > 0 for _, norm in found[lora, kind][0])


def forward_bytes(path, lora):
    """kind -> (bytes alive after a forward pass of 512 tokens in 8 layers, their peak)."""
    from megaopd.models.arch import architecture, read_hf_config
    from megaopd.parallel import ParallelConfig, make_grid

    grid = make_grid(ParallelConfig())
    arch = architecture(read_hf_config(path))
    return {kind: bytes_of(path, arch, grid, kind, lora) for kind in ("none", *KINDS)}


def bytes_of(path, arch, grid, kind, lora):
    import torch

    from megaopd.models.build import build_model
    from megaopd.models.config import LoraConfig, ModelConfig
    from megaopd.models.lora import add_adapters
    from megaopd.models.weights import load_hf_weights

    model = build_model(arch, ModelConfig(path=path, recompute=kind), grid)
    load_hf_weights(model, path, arch, grid)
    if lora:
        add_adapters(model, LoraConfig(rank=4))
    ids, positions = tokens(1, LENGTH), torch.arange(LENGTH)[None]
    model(ids, positions, None).sum().backward()  # whatever is made once is there now
    model.zero_grad()
    gc.collect()
    with LiveBytes() as live:
        loss = model(ids, positions, None).sum()
        live.mark("forward")
        loss.backward()
    return live.at["forward"], live.peak


@pytest.mark.parametrize("lora", [False, True])
def test_less_is_kept(ranks, tmp_path, lora):
    path = str(save_tiny(tmp_path, "qwen3", tied=True, **WIDE))
    (found,) = ranks.run(forward_bytes, 1, path, lora)
    kept = {kind: held for kind, (held, _) in found.items()}
    print(f"lora={lora}: {found}")
    assert kept["full"] < kept["selective"] < kept["none"]
    # A recomputed layer keeps its input: 512 x 64 fp32.
    layers = WIDE["num_hidden_layers"] * LENGTH * 64 * 4
    assert kept["full"] < 3 * layers < kept["none"] / 3
