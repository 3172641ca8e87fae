"""The parts of a weight sync that need no server: FP8 blocks, checksums, encoding, checks."""

import asyncio
import base64
import hashlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tracemalloc

import pytest
import torch

from megaopd.errors import UserError
from megaopd.models.arch import architecture, read_hf_config
from megaopd.rollout import encode, fp8
from megaopd.rollout.checksum import Checksums, tile_hash
from megaopd.rollout.group import WeightGroup
from megaopd.rollout.push import SyncReport
from megaopd.rollout.target import Target, check
from megaopd.rollout.verify import Gap
from tests.dist.models import save_tiny

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


# FP8 in blocks.


def test_blocks_by_hand():
    """[3, 5] in blocks of 2 x 2: scales are the largest magnitude of each block / 448."""
    weight = torch.tensor(
        [
            [448.0, -1.0, 0.0, 0.0, 7.0],
            [2.0, 3.5, 0.0, 0.0, -14.0],
            [0.5, 0.25, -896.0, 896.0, 1.0],
        ]
    )
    quantized, scales = fp8.quantize_blocks(weight, (2, 2))
    assert quantized.dtype == torch.float8_e4m3fn
    expected = torch.tensor([[1.0, 1.0, 14 / 448], [0.5 / 448, 2.0, 1 / 448]])
    assert torch.equal(scales, expected)
    assert quantized[0].tolist() == [448.0, -1.0, 0.0, 0.0, 224.0]
    assert quantized[1].tolist() == [2.0, 3.5, 0.0, 0.0, -448.0]
    assert quantized[2].tolist() == [448.0, 224.0, -448.0, 448.0, 448.0]
    assert torch.equal(fp8.dequantize_blocks(quantized, scales, (2, 2)), weight)


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 200), (1, 1), (576, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_lose_a_sixteenth_at_most(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.logspace(-6, 6, shape[0])[:, None]  # magnitudes of all kinds in a block
    weight = weight.to(dtype)
    quantized, scales = fp8.quantize_blocks(weight)
    assert scales.shape == fp8.scale_shape(shape, (128, 128))
    assert scales.isfinite().all() and quantized.float().isfinite().all()
    error = (fp8.dequantize_blocks(quantized, scales) - weight.float()).abs()
    of_scale = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    of_scale = of_scale[: shape[0], : shape[1]]
    # Half a unit in the last place of three bits; below the normal numbers, of 2**-9.
    bound = torch.maximum(weight.float().abs() / 16, of_scale * 2**-10)
    assert (error <= bound * 1.000001).all()
    # Quantising once more changes nothing.
    again, scales_again = fp8.quantize_blocks(fp8.dequantize_blocks(quantized, scales))
    assert torch.equal(again.float(), quantized.float()) and torch.equal(scales_again, scales)


def test_blocks_of_zeros_and_one_off_the_largest():
    quantized, scales = fp8.quantize_blocks(torch.zeros(4, 4))
    assert scales.tolist() == [[1.0]] and not quantized.float().any()
    for largest in torch.rand(200, generator=torch.Generator().manual_seed(1)).tolist():
        quantized, _ = fp8.quantize_blocks(torch.full((1, 3), largest))
        assert quantized.float().tolist() == [[448.0] * 3], largest


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"},
        {"weight_block_size": None},
        {"activation_scheme": "static"},
        {"scale_fmt": "ue8m0"},
    ],
)
def test_other_quantisations_are_refused(change):
    assert fp8.block_size({}) is None
    assert fp8.block_size({"quantization_config": QUANTIZATION}) == (128, 128)
    with pytest.raises(UserError, match="weight_block_size"):
        fp8.block_size({"quantization_config": {**QUANTIZATION, **change}})


# What the model directory calls for.


def test_a_quantised_checkpoint_gets_pairs(tmp_path):
    """Which weights are quantised is what the checkpoint says; they come out as it holds them."""
    from safetensors.torch import load_file

    whole = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 8}
    where = save_tiny(tmp_path, "qwen3", tied=True, **whole)
    plain, out = load_file(where / "model.safetensors"), tmp_path / "fp8"
    fp8.write_checkpoint(where, out)
    state = load_file(out / "model.safetensors")
    assert {n for n in state if n.endswith(fp8.SCALE)} == {
        name + fp8.SCALE for name in plain if name.endswith("proj.weight")
    }
    target = Target(out, "bfloat16")
    assert target.block == (128, 128)
    check(target, ((name, tensor.shape) for name, tensor in plain.items()))
    sent = dict(part for name, tensor in plain.items() for part in target.prepare(name, tensor))
    assert sent.keys() == state.keys()
    for name, tensor in state.items():
        assert sent[name].dtype == tensor.dtype
        assert torch.equal(sent[name].float(), tensor.float()), name


def test_matrices_of_parts_of_blocks_are_not_written(tmp_path):
    where = save_tiny(tmp_path, "qwen3", tied=True)
    with pytest.raises(UserError, match=r"_proj.weight has shape \(64, \d+\)"):
        fp8.write_checkpoint(where, tmp_path / "fp8")
    assert not (tmp_path / "fp8").exists()


def test_checks_name_what_is_wrong(tmp_path):
    where = save_tiny(tmp_path, "llama", tied=True)
    target = Target(where, "float32")
    good = [(n, s) for n, s in target.shapes.items() if s is not None]
    check(target, good)
    check(target, [*good, ("lm_head.weight", (101, 64))])  # tied: it is not sent
    assert list(target.prepare("lm_head.weight", torch.zeros(101, 64))) == []
    for bad, said in (
        (good[1:], r"missing: .*\(1 in all"),
        ([*good, ("model.extra", (1,))], "no such one"),
        ([*good, good[0]], "twice"),
        ([(good[0][0], (3, 3)), *good[1:]], r"shape \(3, 3\)"),
    ):
        with pytest.raises(UserError, match=said):
            check(target, bad)


def test_without_weights_the_config_names_them(tmp_path):
    where = save_tiny(tmp_path, "qwen2", tied=False)
    from_headers = Target(where, "float32").shapes
    (where / "model.safetensors").unlink()
    from_config = Target(where, "float32").shapes
    assert from_config.keys() == from_headers.keys()
    assert set(from_config.values()) == {None}


# Checksums.


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_checksums_of_what_each_rank_holds(tmp_path, ranks):
    """Fused, cut and padded as SGLang's layers are, written out plainly here."""
    where = save_tiny(tmp_path, "qwen2", tied=False)
    arch = architecture(read_hf_config(where))
    state = {name: torch.randn(shape) for name, shape in Target(where, "float32").shapes.items()}
    sums = Checksums(arch, ranks, on_gpu=False)
    for name in reversed(state):  # in any order
        sums.add(name, state[name])

    def rows(name, rank, of=ranks):
        size = len(state[name]) // of
        return state[name][rank * size : (rank + 1) * size]

    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    for rank in range(ranks):
        heads = min(ranks, arch.kv_heads)  # each on several ranks, where there are fewer
        head = rank * heads // ranks
        padded = torch.cat([state["lm_head.weight"], torch.zeros(128 - 101, 64)])
        width = 128 // ranks
        expected = {
            f"{attention}qkv_proj.weight": [
                rows(f"{attention}q_proj.weight", rank),
                rows(f"{attention}k_proj.weight", head, heads),
                rows(f"{attention}v_proj.weight", head, heads),
            ],
            f"{attention}qkv_proj.bias": [
                rows(f"{attention}q_proj.bias", rank),
                rows(f"{attention}k_proj.bias", head, heads),
                rows(f"{attention}v_proj.bias", head, heads),
            ],
            f"{mlp}gate_up_proj.weight": [
                rows(f"{mlp}gate_proj.weight", rank),
                rows(f"{mlp}up_proj.weight", rank),
            ],
            f"{mlp}down_proj.weight": [
                state[f"{mlp}down_proj.weight"][:, rank * width : (rank + 1) * width]
            ],
            "lm_head.weight": [padded[rank * width : (rank + 1) * width]],
            "model.norm.weight": [state["model.norm.weight"]],
        }
        for name, parts in expected.items():
            digest = hashlib.sha256(b"".join(p.contiguous().numpy().tobytes() for p in parts))
            assert sums.expected[rank][name] == digest.hexdigest()[:16], name


def test_comparison_of_checksums(tmp_path):
    where = save_tiny(tmp_path, "llama", tied=True)
    sums = Checksums(architecture(read_hf_config(where)), 1, on_gpu=False)
    for name, shape in Target(where, "float32").shapes.items():
        sums.add(name, torch.randn(shape))

    def answer(checksums):
        return [{"checksums": checksums, "parallelism_info": [{"tp_rank": 0}]}]

    (good,) = sums.expected
    assert sums.compare(answer({**good, "draft.model.norm.weight": "0"})) == ""
    assert "1 differ (such as model.norm.weight)" in sums.compare(
        answer({**good, "model.norm.weight": "0"})
    )
    assert "1 never sent (such as extra)" in sums.compare(answer({**good, "extra": "0"}))
    assert "absent" in sums.compare(answer({}))
    assert sums.compare([]) != ""


KERNEL = """
import sys, torch, triton
from sglang.kernels.ops.memory import gpu_tensor_hash as theirs
from megaopd.rollout.checksum import tile_hash
for tensor in (torch.randn(7, 13), torch.randn(3, 5).bfloat16(), torch.randn(300, 77)):
    flat = tensor.reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 4)).view(torch.uint32)
    tiles = triton.cdiv(len(words), 8192)
    partial, seed = torch.empty(tiles, dtype=torch.uint64), 0x243F6A88
    theirs.hash_tiles32_kernel_blocked[(tiles,)](
        words, partial, len(words), seed1=seed,
        seed2=(seed * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF, FM_C1=theirs.FMIX32_C1,
        FM_C2=theirs.FMIX32_C2, POS_A=theirs.POS_C1, POS_B=theirs.POS_C2, TILE=8192, BLOCK=256,
        USE_CG=True)
    expected = theirs._final_splitmix64(sum(partial.view(torch.int64).tolist()))
    assert tile_hash([tensor]) == f"{expected:016x}", tensor.shape
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
def test_the_hash_of_a_gpu_is_sglangs_kernel():
    """Its Triton kernel, run by Triton's interpreter."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    out = subprocess.run([sys.executable, "-c", KERNEL], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == "equal", out.stderr[-2000:]


def test_the_hash_of_a_gpu_does_not_depend_on_how_it_is_cut():
    tensor = torch.randn(600_000, generator=torch.Generator().manual_seed(0))
    assert tile_hash([tensor]) == tile_hash([tensor[:70_000], tensor[70_000:]])
    assert tile_hash([tensor]) != tile_hash([tensor[1:]])


# Encoding.


def test_a_pickled_bucket_is_a_list_of_tensors():
    whole = torch.randn(1000, 10)
    tensors = {"a": whole[3:7], "b": torch.randn(70_001).bfloat16(), "c": torch.randn(3, 50).t()}
    bucket = list(tensors.items())
    pieces = encode.pickled(bucket)
    assert bucket == []
    assert sum(map(len, pieces)) < 4 * 40 + 2 * 70_001 + 4 * 150 + 3000  # not all of `whole`
    back = pickle.loads(b"".join(pieces))
    assert [name for name, _ in back] == list(tensors)
    assert all(torch.equal(t, tensors[n]) and t.dtype == tensors[n].dtype for n, t in back)


def test_a_pickled_bucket_lets_its_tensors_go():
    """The bytes of the pickle and one tensor's besides: not the bucket twice."""
    bucket = [(str(i), torch.randn(250_000)) for i in range(16)]
    tracemalloc.start()
    encode.pickled(bucket)
    _, peak = tracemalloc.get_traced_memory()  # of Python's bytes; a tensor is not among them
    tracemalloc.stop()
    assert peak < 17.5 * 1e6


def test_base64_in_pieces():
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 0, 5, encode.CHUNK - 1, 3 * encode.CHUNK + 2, 7]
    pieces = [bytes(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in sizes]
    chunks = list(encode.base64_chunks(pieces))
    assert b"".join(chunks) == base64.b64encode(b"".join(pieces))
    assert max(map(len, chunks)) < 3 * encode.CHUNK


# Words.


def test_a_gap_of_log_probs_is_noise_or_not():
    assert Gap(1e-4, 9e-3, 1e-3).why == ""
    assert "0.002 in the mean" in Gap(2e-3, 3e-3, 1e-3).why
    assert "0.02" in Gap(1e-4, 2e-2, 1e-3).why
    assert Gap(float("inf"), float("inf"), 1e-3).why


def test_a_report_is_numbers_to_log():
    report = SyncReport(8, 2, {"total": 1.5}, {"server 1": "gone"}, gap=1e-6)
    assert report.metrics() == {
        "sync/bytes": 8.0,
        "sync/tensors": 2.0,
        "sync/failed_servers": 1.0,
        "sync/probe_gap": 1e-6,
        "sync/total_s": 1.5,
    }


def test_a_group_that_nobody_joins_is_an_error_in_time():
    async def join():
        group = WeightGroup("http://127.0.0.1:1", "lonely", 2, backend="gloo", timeout=1.0)
        try:
            await group.join()
        finally:
            group.leave()

    with pytest.raises(RuntimeError):
        asyncio.run(join())
