"""The checksums that SGLang's /weights_checker must answer with, from the tensors that were sent.

A server holds parameters that are fused (q, k and v; gate and up), cut over its tensor ranks and
padded (vocabulary), and hashes each of them. The same is done here to the Hugging Face tensors as
they pass, so that every bit that a server holds is compared, and no copy of the model is kept.
Covers the families of FAMILIES, unquantised and without biases behind attention and MLP; others are
refused.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from megaopd.errors import UserError
from megaopd.models.arch import Architecture

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose parameters a server fuses as below
VOCAB_MULTIPLE = 64  # SGLang pads the vocabulary to a multiple of this
# part of a name -> (the fused parameter's part, place in it)
FUSED = {
    "q_proj": ("qkv_proj", 0, 3),
    "k_proj": ("qkv_proj", 1, 3),
    "v_proj": ("qkv_proj", 2, 3),
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
}


@dataclass
class Checksums:
    """Digests of a server's parameters, fed with every tensor that is sent to it.

    Holds the parts of one fused parameter until it is whole.
    """

    arch: Architecture
    tensor: int  # tensor parallel size inside the server
    on_gpu: bool  # the server's hash there is another one
    expected: list[dict[str, str]] = field(init=False)  # by tensor rank: parameter -> digest
    _parts: dict[str, dict[int, list[list[Any]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arch = self.arch
        if arch.family not in FAMILIES or arch.out_bias or arch.mlp_bias:
            raise UserError(
                f"a sync of {arch.family} weights that is to be verified by checksum",
                expected="one of " + ", ".join(FAMILIES) + ", without output or MLP biases",
                fix="set rollout.verify=probe",
            )
        self.expected = [{} for _ in range(self.tensor)]

    def add(self, name: str, tensor: Any) -> None:
        """One Hugging Face tensor, in the dtype that the server holds it in."""
        fused, place, count = name, 0, 1
        for part, (whole, index, size) in FUSED.items():
            if f".{part}." in name:
                fused, place, count = name.replace(part, whole), index, size
        parts = self._parts.setdefault(fused, {})
        parts[place] = self._shards(name, tensor)
        if len(parts) < count:
            return
        del self._parts[fused]
        for rank, digests in enumerate(self.expected):
            shards = [piece for i in range(count) for piece in parts[i][rank]]
            digests[fused] = (tile_hash if self.on_gpu else sha256)(shards)

    def _shards(self, name: str, tensor: Any) -> list[list[Any]]:
        """What each tensor rank holds of this tensor, in pieces that are not copies."""
        ranks = self.tensor
        if ".embed_tokens." in name or name.startswith("lm_head."):
            return self._vocab_rows(tensor)
        if ".k_proj." in name or ".v_proj." in name:
            heads = tensor.chunk(min(self.arch.kv_heads, ranks), 0)
            return [[heads[rank * len(heads) // ranks]] for rank in range(ranks)]
        if any(f".{part}." in name for part in FUSED):
            return [[part] for part in tensor.chunk(ranks, 0)]
        if ".o_proj." in name or ".down_proj." in name:
            return [[part] for part in tensor.chunk(ranks, 1)]
        return [[tensor]] * ranks

    def _vocab_rows(self, tensor: Any) -> list[list[Any]]:
        """Equal parts of the rows, with zeros after the last one."""
        multiple = VOCAB_MULTIPLE
        if -(-len(tensor) // multiple) * multiple % self.tensor:
            multiple *= self.tensor
        size = -(-len(tensor) // multiple) * multiple // self.tensor
        parts = [tensor[rank * size : (rank + 1) * size] for rank in range(self.tensor)]
        return [[part, part.new_zeros(size - len(part), *part.shape[1:])] for part in parts]

    def compare(self, ranks: list[dict[str, Any]]) -> str:
        """The server's answer against what was sent; "" where all of it is equal.

        Args:
            ranks: "ranks" of /weights_checker's answer.
        """
        for answer in ranks:
            rank = answer["parallelism_info"][0]["tp_rank"]  # [0]: the model; then its drafts
            expected = self.expected[rank]
            theirs = {k: v for k, v in answer["checksums"].items() if not k.startswith("draft")}
            wrong = sorted(n for n in expected if n in theirs and theirs[n] != expected[n])
            absent = sorted(n for n in expected if n not in theirs)
            unknown = sorted(n for n in theirs if n not in expected)
            found = [
                f"{len(names)} {what} (such as {names[0]})"
                for names, what in ((wrong, "differ"), (absent, "absent"), (unknown, "never sent"))
                if names
            ]
            if found:
                return f"of {len(expected)} parameters on tensor rank {rank}: {', '.join(found)}"
        return "" if ranks else "no checksums in the answer"


def sha256(shards: list[Any]) -> str:
    """What a server on the CPU says of the rows of `shards`, one after the other."""
    import torch

    digest = hashlib.sha256()
    for shard in shards:
        # A copy: numpy makes a storage that it has seen one that cannot be resized any more, and
        # these may be views of the trainer's weights (trainer/offload.py).
        flat = shard.detach().to("cpu", copy=True).contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()[:8].hex()


TILE = 8192  # 32-bit words that are hashed together
_SEED = 0x243F6A88
_STREAMS = (
    (_SEED, 0x27D4EB2D, 15),
    ((_SEED * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF, 0x165667B1, 13),
)


def tile_hash(shards: list[Any]) -> str:
    """What a server on a GPU says: two sums of mixed (word, position), tile by tile, in 64 bits.

    SGLang 0.5.23's; arithmetic on 32-bit words, here in int64 with masks. Works on any device.
    """
    import torch

    flat = torch.cat([s.detach().contiguous().reshape(-1).view(torch.uint8) for s in shards])
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4))
    words = flat.view(torch.int32)
    total, step = 0, 64 * TILE
    for start in range(0, len(words), step):
        total += _tiles(words[start : start + step], start, len(words))
    return f"{_splitmix64(total):016x}"


def _tiles(words: Any, start: int, count: int) -> int:
    """The sum of the 64-bit hashes of whole tiles that begin at word `start` of `count` in all."""
    import torch

    values = words.long() & 0xFFFFFFFF
    index = torch.arange(start, start + len(words), device=words.device)
    halves = []
    for seed, factor, turn in _STREAMS:
        turned = (index << turn | index >> (32 - turn)) & 0xFFFFFFFF
        position = (_times(index, factor) + seed & 0xFFFFFFFF) ^ turned
        mixed = torch.nn.functional.pad(_mix(values ^ position), (0, -len(words) % TILE))
        sums = mixed.view(-1, TILE).sum(1) & 0xFFFFFFFF
        halves.append(_mix(sums ^ (4 * count & 0xFFFFFFFF)))
    return sum(high << 32 | low for high, low in zip(*(h.tolist() for h in halves), strict=True))


def _times(x: Any, factor: int) -> Any:
    """x * factor modulo 2**32, without leaving int64."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & 0xFFFFFFFF


def _mix(x: Any) -> Any:
    """The finaliser of MurmurHash3 on 32-bit words."""
    x = _times(x ^ x >> 16, 0x85EBCA6B)
    x = _times(x ^ x >> 13, 0xC2B2AE35)
    return x ^ x >> 16


def _splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x &= mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31
