"""A process group of rank 0 and the tensor ranks of one server, beside the trainer's own groups.

The server joins by /init_weights_update_group. It makes its side with torch's process group helper,
so this side is made with it too: both then agree on the keys in the store and on the backend of
each device. Whether the trainer has a default group does not matter.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterable
from datetime import timedelta
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

LOOK_S = 0.002  # between two looks at broadcasts under way


class WeightGroup:
    """Rank 0's side: it hosts the store, joins, and broadcasts.

    Args:
        url: of the server; the store listens on the address of ours that it reaches us by.
        name: not used before, here or on the server.
        size: 1 + the server's tensor ranks.
        timeout: seconds for a bucket that is broadcast.
    """

    def __init__(self, url: str, name: str, size: int, *, backend: str, timeout: float) -> None:
        from torch._C._distributed_c10d import TCPStore

        self.name, self.size, self.backend, self.timeout = name, size, backend, timeout
        self.host = own_address(url)
        self._limit = timedelta(seconds=timeout)
        self._store: Any = TCPStore(
            self.host, 0, is_master=True, wait_for_workers=False, timeout=self._limit
        )
        self._group: Any = None
        self._under_way: list[Any] = []

    def invitation(self) -> dict[str, Any]:
        """What to post to /init_weights_update_group while `join` runs."""
        return {
            "master_address": self.host,
            "master_port": self._store.port,
            "rank_offset": 1,
            "world_size": self.size,
            "group_name": self.name,
            "backend": self.backend,
        }

    async def join(self) -> None:
        """Wait for the server. There is no way to stop that, so it is left to a thread.

        Raises:
            RuntimeError: it did not come within the time-out.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[str] = loop.create_future()

        def settle(why: str) -> None:
            if not done.done():
                done.set_result(why)

        def make() -> None:
            why = ""
            try:
                self._group = self._make()
            except (RuntimeError, ValueError) as err:
                why = str(err) or type(err).__name__
            with contextlib.suppress(RuntimeError):  # the loop may have been closed meanwhile
                loop.call_soon_threadsafe(settle, why)

        # Not an executor's thread: the interpreter would wait for it at its end.
        threading.Thread(target=make, name="weight-group", daemon=True).start()
        why = await done
        if why:
            raise RuntimeError(why)

    def _make(self) -> Any:
        from torch._C._distributed_c10d import PrefixStore
        from torch.distributed import distributed_c10d

        c10d: Any = distributed_c10d
        group, _ = c10d._new_process_group_helper(
            self.size,
            0,
            [],
            c10d.Backend(self.backend),
            PrefixStore(self.name, self._store),
            group_name=self.name,
            timeout=self._limit,
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self.size)}
        return group

    async def broadcast(self, tensors: Iterable[Any]) -> None:
        """Send tensors to the server's ranks, in order; they must stay as they are meanwhile.

        Raises:
            TimeoutError: it took longer than the limit.
            RuntimeError: the connection broke.
        """
        import torch.distributed as dist

        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._under_way = [self._group.broadcast([tensor], options) for tensor in tensors]
        end = monotonic() + self.timeout
        for work in self._under_way:
            while not work.is_completed():
                if monotonic() > end:
                    raise TimeoutError(f"a broadcast of weights took over {self.timeout:g} s")
                await asyncio.sleep(LOOK_S)
            work.wait()  # raises what went wrong
        self._under_way = []

    def leave(self) -> None:
        """Give the group up, in whatever state it is.

        A broadcast that is stuck holds a thread until the time-out, for which a destructor waits,
        so the end of the group is left to a thread too.
        """
        import torch.distributed as dist

        held = [self._group, self._store, self._under_way]
        self._group, self._store, self._under_way = None, None, []
        if held[0] is None:
            return

        def end() -> None:
            group, _, under_way = held
            if not all(work.is_completed() for work in under_way):
                with contextlib.suppress(RuntimeError):
                    group.abort()
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group(group)
            del group, under_way
            held.clear()

        threading.Thread(target=end, name="leave-weight-group", daemon=True).start()


def own_address(url: str) -> str:
    """The address of this machine that the server at `url` can reach it by."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    kind, _, _, _, address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])
