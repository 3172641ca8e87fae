"""The ways that weights take to a server: in the request, by broadcast, or by disk.

All of a server's tensor ranks get full tensors and cut their shards from them.
"""

import asyncio
import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaopd.errors import UserError
from megaopd.models.weights import HfWriter
from megaopd.rollout.encode import Bucket, flatten, handle, pickled, post_pickles
from megaopd.rollout.group import WeightGroup
from megaopd.rollout.http import ServerError

if TYPE_CHECKING:
    from megaopd.rollout.member import Server

JOIN_S = 120.0  # for a server to join a process group
LEAVE_S = 10.0


def patience(nbytes: int) -> float:
    """Seconds after which a server that was sent so many bytes counts as stuck: 10 MB/s."""
    return 60.0 + nbytes / 1e7


class Transport:
    """A way for buckets of weights to reach servers, one after the other."""

    async def open(self, server: "Server") -> None:
        """What a server needs before its first bucket; raises ServerError."""

    def pack(self, bucket: Bucket) -> Any:
        """A bucket as `send` takes it, made once for all servers; the bucket is used up."""
        raise NotImplementedError

    async def send(self, server: "Server", packed: Any, nbytes: int) -> None:
        """Have a server load a bucket of so many bytes; raises ServerError."""
        raise NotImplementedError

    def drop(self, server: "Server") -> None:
        """Forget what is open with a server: it failed."""

    async def close(self) -> None:
        """Forget what is open with all of them."""


class TensorTransport(Transport):
    """/update_weights_from_tensor: the bytes themselves, or handles of GPU memory.

    Args:
        ipc: the servers see this rank's GPU (colocated), and are given one handle a bucket.
        flush: have a server forget its cache of the old weights with each bucket, which is cheap
            while it is paused (/flush_cache is not: it collects garbage).
    """

    def __init__(self, *, ipc: bool, flush: bool) -> None:
        self.ipc, self.flush = ipc, flush

    def pack(self, bucket: Bucket) -> Any:
        return flatten(bucket) if self.ipc else pickled(bucket)

    async def send(self, server: "Server", packed: Any, nbytes: int) -> None:
        ranks = range(int(server.info.get("tp_size", 1)))
        form = "flattened_bucket" if self.ipc else None
        await post_pickles(
            server.client,
            "/update_weights_from_tensor",
            {"load_format": form, "flush_cache": self.flush},
            "serialized_named_tensors",
            [handle(*packed) if self.ipc else packed for _ in ranks],
            timeout=patience(nbytes * len(ranks)),
        )


class BroadcastTransport(Transport):
    """/update_weights_from_distributed: over a process group with each server, kept while it lives.

    Args:
        backend: "gloo" or "nccl".
        name: of the groups; unique to this run.
        timeout: seconds for one bucket.
        flush: as of TensorTransport.
    """

    def __init__(self, *, backend: str, name: str, timeout: float, flush: bool) -> None:
        self.backend, self.name, self.timeout, self.flush = backend, name, timeout, flush
        self.groups: dict[str, tuple[int, Server, WeightGroup]] = {}
        self._made = 0

    async def open(self, server: "Server") -> None:
        incarnation, _, _ = self.groups.get(server.name, (None, None, None))
        if incarnation == server.incarnation:
            return
        self.drop(server)
        self._made += 1
        group = await asyncio.to_thread(
            WeightGroup,
            server.url,
            f"{self.name}-{self._made}",
            1 + int(server.info.get("tp_size", 1)),
            backend=self.backend,
            timeout=self.timeout,
        )
        path = "/init_weights_update_group"
        both = [
            asyncio.ensure_future(group.join()),
            asyncio.ensure_future(server.client.control(path, group.invitation(), timeout=JOIN_S)),
        ]
        await _both(both, server, path)
        self.groups[server.name] = server.incarnation, server, group

    def pack(self, bucket: Bucket) -> Any:
        packed = list(bucket)
        bucket.clear()
        return packed

    async def send(self, server: "Server", packed: Any, nbytes: int) -> None:
        _, _, group = self.groups[server.name]
        path = "/update_weights_from_distributed"
        body = {
            "names": [name for name, _ in packed],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in packed],
            "shapes": [list(tensor.shape) for _, tensor in packed],
            "group_name": group.name,
            "flush_cache": self.flush,
        }
        both = [
            asyncio.ensure_future(server.client.control(path, body, timeout=patience(nbytes))),
            asyncio.ensure_future(group.broadcast(tensor for _, tensor in packed)),
        ]
        await _both(both, server, path)

    def drop(self, server: "Server") -> None:
        _, _, group = self.groups.pop(server.name, (None, None, None))
        if group is not None:
            group.leave()

    async def close(self) -> None:
        for incarnation, server, group in list(self.groups.values()):
            if server.incarnation == incarnation and server.alive():
                path, body = "/destroy_weights_update_group", {"group_name": group.name}
                # A server that has gone has taken its side with it.
                with contextlib.suppress(ServerError):
                    await server.client.control(path, body, timeout=LEAVE_S)
                await server.client.close()
            self.drop(server)


async def _both(tasks: list[asyncio.Future[Any]], server: "Server", path: str) -> None:
    """Wait for our side and the server's; where one fails, no longer for the other.

    Raises:
        ServerError: whichever failed first.
    """
    try:
        await asyncio.gather(*tasks)
    except (RuntimeError, TimeoutError) as err:
        raise ServerError(server.url, path, 0, f"process group: {err}") from err
    finally:
        for task in tasks:
            task.cancel()


class DiskTransport(Transport):
    """/update_weights_from_disk: the model as a directory that the servers see under the same path.

    There are no buckets to pack.
    """

    def __init__(self, *, flush: bool) -> None:
        self.flush = flush

    async def send(self, server: "Server", packed: Any, nbytes: int) -> None:
        form = server.info.get("load_format") or "auto"
        body = {
            "model_path": str(packed),
            "load_format": "auto" if form == "dummy" else form,
            "flush_cache": self.flush,
        }
        await server.client.control("/update_weights_from_disk", body, timeout=patience(nbytes))


def export(
    weights: Iterable[tuple[str, Any]], out: Path, *, model_dir: Path, file_bytes: int
) -> None:
    """Write weights as a checkpoint directory, whole or not at all.

    Raises:
        UserError: the disk is full, or the directory cannot be written.
    """
    from safetensors import SafetensorError

    try:
        if out.exists():
            shutil.rmtree(out)
        with HfWriter(out, side_files_from=model_dir, max_shard_bytes=file_bytes) as writer:
            for name, tensor in weights:
                writer.add(name, tensor)
    except (OSError, SafetensorError) as err:
        raise UserError(
            f"cannot write weights to {out}: {err}",
            expected="a disk with room for the model, which the servers see under the same path",
            fix="make room, or set server.sync=tensor or broadcast",
        ) from err
