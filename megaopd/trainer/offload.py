"""The trainer's memory, put away while rollout servers use the same GPUs, and brought back.

Weights, gradients and optimizer state are views of storages: a storage is copied to (pinned) host
memory and shrunk to nothing, and every view of it is whole again once it has been brought back.
Without a GPU the same code runs from memory to memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megaopd import platform


@dataclass
class Shelved:
    """One storage, and its bytes on the host (None: its contents do not matter)."""

    storage: Any
    size: int  # bytes
    host: Any


class Shelf:
    """Storages that are put away together.

    Args:
        keep: copy the contents; False for gradients, which are zero when they come back.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self._away: list[Shelved] = []
        self._hosts: dict[int, Any] = {}  # buffers by position, used again at every turn

    def put_away(self, tensors: Iterable[Any]) -> int:
        """Free the device memory of every storage behind `tensors`; the bytes freed."""
        assert not self._away, "put away already"
        for index, storage in enumerate(_storages(tensors)):
            size = storage.nbytes()
            host = self._host(index, size) if self.keep else None
            if host is not None:
                host.copy_(_bytes_of(storage), non_blocking=True)
            self._away.append(Shelved(storage, size, host))
        platform.synchronize()  # the copies must be done before their sources go
        for entry in self._away:
            entry.storage.resize_(0)
        platform.empty_cache()
        return sum(entry.size for entry in self._away)

    def bring_back(self) -> None:
        """Every tensor as it was; nothing happens where nothing is away."""
        for entry in self._away:
            entry.storage.resize_(entry.size)
            if entry.host is not None:
                _bytes_of(entry.storage).copy_(entry.host, non_blocking=True)
            else:
                _bytes_of(entry.storage).zero_()
        platform.synchronize()
        self._away = []

    def _host(self, index: int, size: int) -> Any:
        import torch

        host = self._hosts.get(index)
        if host is None or host.numel() != size:
            host = torch.empty(size, dtype=torch.uint8, pin_memory=platform.has_gpu())
            self._hosts[index] = host
        return host


class TurnTaking:
    """What a trainer puts away before servers on the same GPUs sample, and how it comes back.

    update -> `before_sync` (room for the servers' weights) -> the sync reads the weights ->
    `before_rollout` (room for their KV cache) -> rollout -> the servers release -> `before_update`.
    """

    def __init__(self, student: Any, teacher: Any = None) -> None:
        self.student, self.teacher = student, teacher
        self._gradients, self._state, self._weights = Shelf(keep=False), Shelf(), Shelf()

    def before_sync(self) -> int:
        """Put gradients, optimizer state and the teacher away; the bytes freed."""
        freed = self._gradients.put_away(gradient_tensors(self.student.wrapped))
        state = list(optimizer_tensors(self.student.optimizer))
        if self.teacher is not None:
            state += self.teacher.parameters()
        weights = _pointers(_parameters(self.student.chunks))
        return freed + self._state.put_away(t for t in state if _pointer(t) not in weights)

    def before_rollout(self) -> int:
        """Put the student's weights away too; the bytes freed."""
        return self._weights.put_away(_parameters(self.student.chunks))

    def before_update(self) -> None:
        """Bring everything back."""
        for shelf in (self._weights, self._state, self._gradients):
            shelf.bring_back()


def gradient_tensors(wrapped: Iterable[Any]) -> Iterator[Any]:
    """The flat gradient buffers of megatron-core's DDP around each chunk."""
    for ddp in wrapped:
        for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers]:
            yield buffer.grad_data


def _parameters(chunks: Iterable[Any]) -> list[Any]:
    return [parameter for chunk in chunks for parameter in chunk.parameters()]


def optimizer_tensors(optimizer: Any) -> Iterator[Any]:
    """Adam's moments and the fp32 master weights, of one optimizer or a chain of them."""
    import torch

    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = one.optimizer
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
        for group in inner.param_groups:
            yield from group["params"]


def _storages(tensors: Iterable[Any]) -> list[Any]:
    """The storages behind tensors, each once, empty ones left out."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


def _pointer(tensor: Any) -> int:
    return tensor.untyped_storage().data_ptr()


def _pointers(tensors: Iterable[Any]) -> set[int]:
    return {_pointer(tensor) for tensor in tensors}


def _bytes_of(storage: Any) -> Any:
    """[n] uint8 view of a whole storage."""
    import torch

    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
