"""Weight sync: from the sharded student to SGLang servers, verified, or said to have failed.

What fails: weights that do not fit the servers' model, or a full disk, are refused before a server
has seen anything, and the old weights go on serving. A server that fails by itself after the first
bucket holds a mixture: it is marked "unsynced", under a version name that nobody trusts.
"""

from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaopd.errors import UserError
from megaopd.rollout import verify
from megaopd.rollout.base import Probe
from megaopd.rollout.checksum import Checksums
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.http import ServerError
from megaopd.rollout.push import Push, SyncReport
from megaopd.rollout.target import Target, check
from megaopd.rollout.transfer import (
    BroadcastTransport,
    DiskTransport,
    TensorTransport,
    Transport,
    patience,
)

if TYPE_CHECKING:
    from megaopd.rollout.member import Server

__all__ = ["SyncReport", "WeightSync"]


class WeightSync:
    """Pushes weights to servers; on rank 0.

    Args:
        model_dir: what the servers were started with.
        work_dir: for weights on their way by disk.
        nonce: of this engine, part of every version's name.
        run: blocks until a coroutine has finished on the loop that the servers' clients live on;
            from any thread.
        device: of the trainer, "cpu" or "cuda".
        dtype: of the weights on the servers.

    Raises:
        UserError: a model directory that cannot be read, or is quantised in another way than
            rollout/fp8.py does.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        model_dir: Path,
        work_dir: Path,
        nonce: str,
        run: Callable[[Coroutine[Any, Any, Any]], Any],
        device: Any,
        dtype: str,
    ) -> None:
        self.config, self.model_dir, self.work_dir = config, model_dir, work_dir
        self.nonce, self.dtype, self.run = nonce, dtype, run
        self.target = Target(model_dir, dtype)
        self.limit = int(config.bucket_mb * 1e6)
        gpu = str(device).startswith("cuda")
        # Requests that are paused in place keep their cache, and with it all of the cache.
        flush = config.pause != "in_place"
        self.transport: Transport
        if config.method == "disk":
            self.transport = DiskTransport(flush=flush)
        elif config.method == "tensor":
            self.transport = TensorTransport(
                ipc=gpu and config.placement == "colocated", flush=flush
            )
        else:
            self.transport = BroadcastTransport(
                backend="nccl" if gpu else "gloo",
                name=f"megaopd-{nonce}",
                timeout=patience(self.limit),
                flush=flush,
            )
        # A bucket is sent while the caller's thread gathers the next.
        self.sender = ThreadPoolExecutor(1, thread_name_prefix="weight-sync")
        # Of the last push, to verify once more.
        self.checksums: dict[int, Checksums] = {}  # by tensor size of a server
        self.probe: Probe | None = None
        self.tolerance = verify.tolerance(dtype)

    def tag(self, version: int) -> str:
        """What a server calls this version of the weights, once they are verified."""
        return f"{self.nonce}-{version}"

    def push(
        self,
        servers: Sequence["Server"],
        weights: Iterable[tuple[str, Any]],
        version: int,
        *,
        probe: Probe | None = None,
    ) -> SyncReport:
        """Give every server new weights. Iterating `weights` is a collective of the training ranks,
        and is brought to its end whatever happens.

        A server that fails is named in the report and left "unsynced" (or as it was, where it
        certainly kept its old weights: "serving"); the others hold `version` and are "serving".

        Args:
            weights: (Hugging Face name, full tensor). Where it says ahead what it holds, as a
                sequence or by `described()`, all of it is checked before a server is touched.
            probe: the trainer's log-probs of some text under these weights.

        Raises:
            UserError: tensors missing, left over or of another shape; a disk that is full; servers
                that cannot take or verify weights this way. The servers keep their state where
                none of it was sent.
        """
        push = Push(self, servers, version, probe, weights)
        try:
            self._check(servers, weights, probe)
            return push.go()
        except UserError as err:
            push.refuse(str(err))
            raise

    def _check(
        self,
        servers: Sequence["Server"],
        weights: Iterable[tuple[str, Any]],
        probe: Probe | None,
    ) -> None:
        """Refuse what is known to go wrong."""
        described: Any = getattr(weights, "described", None)
        if described is not None:
            check(self.target, described())
        elif isinstance(weights, Sequence):
            check(self.target, ((name, tensor.shape) for name, tensor in weights))
        for server in servers:
            why = self._unable(server) or self._unverifiable(server, probe)
            if why:
                raise UserError(f"{server.name} ({server.url}): {why[0]}", fix=why[1])

    def _unable(self, server: "Server") -> tuple[str, str] | None:
        """Why a server cannot take weights by this method, and what to do."""
        info, method = server.info, self.config.method
        if method != "disk" and info.get("dp_size", 1) != 1:
            what = f"{info['dp_size']} data-parallel replicas take weights by disk only"
            return what, "set server.sync=disk, or server.data=1 and a larger server.count"
        if method == "broadcast" and info.get("pp_size", 1) != 1:
            return "pipeline stages cannot join a broadcast", "set server.sync=tensor or disk"
        quantization = info.get("quantization")
        if quantization and self.target.block is None and info.get("load_format") != "flash_rl":
            what = f"quantization={quantization} of weights that are not: it cannot replace them"
            fix = "serve a checkpoint in blocks of FP8, or add --load-format flash_rl"
            return what, fix
        held = info.get("dtype", "auto")
        if held not in ("auto", self.dtype):
            return f"it holds {held} weights, not {self.dtype}", f"set server.dtype={held}"
        return None

    def _unverifiable(self, server: "Server", probe: Probe | None) -> tuple[str, str] | None:
        if not self.needs_checksums(probe):
            return None
        why = "they are quantised" if self.target.block else verify.no_checksums(server)
        if not why:
            return None
        return f"its weights cannot be verified by checksum: {why}", "set server.verify=probe"

    def needs_checksums(self, probe: Probe | None) -> bool:
        """Whether a push is verified by checksums: by choice, or because there is no probe."""
        return self.config.verify == "checksum" or (self.config.verify == "probe" and not probe)

    def note_dtype(self, dtype: Any) -> None:
        """What the trainer's weights come in, which may be coarser than the servers' dtype."""
        engine = "float8_e4m3fn" if self.target.block else self.dtype
        self.tolerance = verify.tolerance(engine, str(dtype).removeprefix("torch."))

    def check(self, server: "Server") -> str:
        """Verify once more that a server holds what was pushed last; why not, or ""."""
        return self.run(self._check_again(server))

    async def _check_again(self, server: "Server") -> str:
        try:
            why = await self.verify_checksums(server)
            if why or self.probe is None:
                return why
            return (await verify.verify_log_probs(server, self.probe, self.tolerance)).why
        except ServerError as err:
            return str(err)

    async def verify_checksums(self, server: "Server") -> str:
        """Why a server's parameters are not those pushed last; "" where none were kept."""
        expected = self.checksums.get(int(server.info.get("tp_size", 1)))
        if expected is None:
            return ""
        return await verify.verify_checksums(server, expected)

    def close(self) -> None:
        """End process groups; the loop must still run."""
        self.sender.shutdown()
        self.run(self.transport.close())
