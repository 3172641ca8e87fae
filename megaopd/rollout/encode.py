"""Tensors as SGLang's /update_weights_from_tensor takes them: pickled, base64, in JSON, in pieces.

Measured on SGLang 0.5.23: torch's own way of handing CPU tensors to another process (descriptors of
shared memory) kills a server, so their bytes travel in the request. What is sent is never held
twice: the pickle takes the place of the tensors, and base64 is made while it is sent.
"""

import binascii
import io
import json
import pickle
from collections.abc import AsyncIterator, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from megaopd.rollout.http import ServerClient

Bucket = list[tuple[str, Any]]  # (Hugging Face name, tensor)
CHUNK = 3 << 18  # bytes that are encoded together; a multiple of 3: base64 then needs no padding


class _Pieces(list[bytes]):
    """A file that keeps what is written as it is: the bytes of a tensor are not copied."""

    def write(self, piece: Any) -> None:
        self.append(piece if isinstance(piece, bytes) else bytes(piece))


class _Reduced:
    """Pickles as (callable, arguments, state, items of a list)."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def pickled(bucket: Bucket) -> list[bytes]:
    """The pickle of a list of (name, CPU tensor), in pieces; the bucket is emptied.

    Each tensor is let go when its bytes have been taken.
    """

    def items() -> Iterator[tuple[str, Any]]:
        while bucket:
            name, tensor = bucket.pop(0)
            tensor = tensor.detach().to("cpu").contiguous()
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # a part of a storage is pickled with the whole of it
            yield name, tensor

    pieces = _Pieces()
    pickler: Any = pickle.Pickler(pieces, protocol=4)  # pyright: ignore
    pickler.fast = True  # no memo: it would keep every tensor
    pickler.dump(_Reduced(list, (), None, items()))
    return pieces


def flatten(bucket: Bucket) -> tuple[Any, list[SimpleNamespace]]:
    """GPU tensors as one of bytes, and where each lies in it, in SGLang's words; the bucket is
    emptied.
    """
    import torch

    torch.cuda.ipc_collect()  # gives back what the receivers of earlier ones have let go
    bucket.sort(key=lambda item: -item[1].element_size())  # so that each begins aligned
    sizes = [tensor.nbytes for _, tensor in bucket]
    flat = torch.empty(sum(sizes), dtype=torch.uint8, device=bucket[0][1].device)
    metadata, start = [], 0
    while bucket:
        name, tensor = bucket.pop(0)
        end = start + tensor.nbytes
        flat[start:end].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        what = {"name": name, "shape": tensor.shape, "dtype": tensor.dtype}
        where = {"start_idx": start, "end_idx": end, "numel": end - start}
        metadata.append(SimpleNamespace(**what, **where))
        start = end
    torch.cuda.synchronize(flat.device)
    return flat, metadata


def handle(flat: Any, metadata: list[SimpleNamespace]) -> list[bytes]:
    """The pickle of SGLang's "flattened_bucket" for one receiver: torch counts them.

    Whoever loads it reads this process's memory, which must stay as it is until then. The device
    goes by its UUID, which means the same in a process that sees other GPUs.
    """
    import torch
    from torch.multiprocessing import reductions

    reduce: Any = reductions.reduce_tensor
    rebuild, arguments = reduce(flat)
    uuid = str(torch.cuda.get_device_properties(flat.device).uuid)
    tensor = _Reduced(rebuild, (*arguments[:6], uuid, *arguments[7:]))
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol=4).dump({"flattened_tensor": tensor, "metadata": metadata})
    return [buffer.getvalue()]


async def post_pickles(
    client: ServerClient,
    path: str,
    fields: dict[str, Any],
    key: str,
    pickles: Iterable[list[bytes]],
    *,
    timeout: float,
) -> None:
    """POST {**fields, key: [each pickle in base64]}, made while it is sent.

    Raises:
        ServerError: as ServerClient.request.
    """

    async def body() -> AsyncIterator[bytes]:
        yield json.dumps(fields).encode()[:-1] + f', "{key}": ['.encode()
        for i, pieces in enumerate(pickles):
            yield b', "' if i else b'"'
            for chunk in base64_chunks(pieces):
                yield chunk
            yield b'"'
        yield b"]}"

    await client.request("POST", path, stream=body(), timeout=timeout)


def base64_chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The base64 of all pieces together, without a copy of them."""
    pending = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), CHUNK):
            pending += view[start : start + CHUNK]
            if len(pending) >= CHUNK:
                cut = len(pending) - len(pending) % 3
                yield binascii.b2a_base64(memoryview(pending)[:cut].tobytes(), newline=False)
                del pending[:cut]
    yield binascii.b2a_base64(pending, newline=False)
