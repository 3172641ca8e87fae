"""The one place that knows there may be no GPU.

`install()` is called once per process before anything of megatron-core is imported. On a CUDA
machine it does nothing. Without a GPU it makes megatron-core run on CPU tensors over gloo by
replacing the CUDA spellings that megatron-core has in its code; nothing else in this project asks
what it runs on.
"""

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

# Set before megatron-core is imported: it binds torch.compile to its fused functions at import, and
# on a CPU each of them costs seconds of compilation for nothing.
_NO_DYNAMO = {"TORCHDYNAMO_DISABLE": "1"}
# Read at torch's first allocation. Fresh buffers in pages of 4 KB cost a third as much as a pass
# over them; in pages of 2 MB nearly nothing.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}

_installed = False


def has_gpu() -> bool:
    """True where a CUDA device can be used."""
    import torch

    return torch.cuda.is_available()


def backend() -> str:
    """The torch.distributed backend: nccl on GPUs, gloo otherwise."""
    return "nccl" if has_gpu() else "gloo"


def raw_group(backend: str, store: Any, rank: int, size: int, timeout: Any) -> Any:
    """Point-to-point between ranks that are not all of one torch.distributed world.

    Not known to torch.distributed by name: it is used by its own send and recv.
    """
    import torch.distributed as dist

    c10d: Any = dist
    if backend == "gloo":
        return c10d.ProcessGroupGloo(store, rank, size, timeout)
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return c10d.ProcessGroupNCCL(store, rank, size, options)


def device() -> Any:
    """The torch.device that this rank computes on."""
    import torch

    if has_gpu():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def synchronize() -> None:
    """Wait until this rank's GPU has done what it was given."""
    import torch

    if has_gpu():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Give freed GPU memory back to the device, where another process can have it."""
    import torch

    if has_gpu():
        torch.cuda.empty_cache()


class Stopwatch:
    """Seconds of this rank's device between `start` and `stop`; neither waits for it."""

    def __init__(self) -> None:
        import torch

        self._gpu, self._now = has_gpu(), time.perf_counter
        self._event: Any = torch.cuda.Event
        self._from = self._to = None

    def start(self) -> None:
        self._from, self._to = self._mark(), None

    def stop(self) -> None:
        self._to = self._mark()

    def _mark(self) -> Any:
        if not self._gpu:
            return self._now()
        event = self._event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Of the last round, 0 where there was none; waits until the device has got that far."""
        if self._from is None or self._to is None:
            return 0.0
        if not self._gpu:
            return self._to - self._from
        self._to.synchronize()
        return self._from.elapsed_time(self._to) / 1e3


def use_transformer_engine() -> bool:
    """True where the Transformer Engine layer spec can run: it imports and a GPU is there."""
    if not has_gpu():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401  # pyright: ignore
    except ImportError:
        return False
    return True


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of this rank's GPU, e.g. (9, 0) for an H100; None where there is none."""
    import torch

    return torch.cuda.get_device_capability(device()) if has_gpu() else None


def has_apex_wgrad_fusion() -> bool:
    """True where apex's fused weight-gradient accumulation imports (it has no fallback)."""
    if not has_gpu():
        return False
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401  # pyright: ignore
    except ImportError:
        return False
    return True


def install() -> None:
    """Prepare this process for megatron-core. Safe to call again; on CUDA it sets the device.

    Without a GPU: torch.cuda calls that megatron-core makes unconditionally answer for the CPU, its
    literal "cuda" devices become "cpu", its RNG tracker uses the CPU generator, and Adam gets the
    state layout of Transformer Engine's FusedAdam so that distributed-optimizer checkpoints load.
    """
    global _installed
    if _installed:
        return
    _installed = True
    import torch

    if has_gpu():
        torch.cuda.set_device(device())
        return
    for name, value in (_NO_DYNAMO | HUGE_PAGES).items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # megatron-core warns about every GPU package that is absent; `megaopd doctor` says it once.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # SGLang brings a torchvision without image files, which transformers imports.
    warnings.filterwarnings("ignore", message="Failed to load image Python extension")
    # Raised inside the mode below on megatron-core's behalf.
    for text in ("Please use DTensor", "The .grad attribute", ".*is deprecated. Please use"):
        warnings.filterwarnings("ignore", message=text)
    # SGLang's torchao, which transformers imports, says what of it only a GPU can load.
    for name in ("megatron.core.rerun_state_machine", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _patch_torch_cuda()
    _patch_rng_tracker()
    _patch_optimizer()
    _patch_moe()
    _cuda_literals_to_cpu().__enter__()


class NoStream:
    """Stands for a CUDA stream or event where every operation is synchronous.

    A class and not a lambda: transformers annotates with torch.cuda.Stream.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "NoStream":
        return self

    def __exit__(self, *exc: object) -> bool:
        return False

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = wait = synchronize = record = _nothing

    def record_event(self, *args: Any) -> "NoStream":
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _patch_torch_cuda() -> None:
    import torch

    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *a, **k: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.manual_seed = lambda seed: torch.manual_seed(seed) and None
    cuda.stream = lambda stream: NoStream()
    cuda.Event = cuda.Stream = NoStream
    cuda.current_stream = cuda.default_stream = lambda *a, **k: NoStream()


def _patch_rng_tracker() -> None:
    import torch
    from megatron.core.tensor_parallel import random as mcore_random

    class CpuRngTracker(mcore_random.CudaRNGStatesTracker):
        """Forks the CPU generator where the original forks the CUDA one."""

        @contextlib.contextmanager
        def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"rng state {name} is not added")
            saved = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(saved)

    patched: Any = mcore_random
    patched._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    patched.CudaRNGStatesTracker = CpuRngTracker


def _patch_optimizer() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    adam = _fused_adam_on_cpu()
    mcore_optimizer: Any = optimizer
    mcore_distrib: Any = distrib_optimizer
    mcore_optimizer.Adam, mcore_optimizer.USING_PYTORCH_OPTIMIZER = adam, False
    mcore_distrib.Adam = adam
    mcore_distrib.HAVE_APEX_OR_TE = mcore_distrib.USING_TE_OPTIMIZER = True


def _fused_adam_on_cpu() -> type:
    """Adam with the state layout of Transformer Engine's FusedAdam.

    `step` lives in the param group and the state holds exp_avg and exp_avg_sq only. With
    torch.optim.AdamW, megatron-core's own fallback, a distributed-optimizer checkpoint saves but
    does not load.
    """
    import torch

    each: Any = torch  # the _foreach functions are not in torch's public stubs

    class CpuFusedAdam(torch.optim.Optimizer):
        def __init__(self, params: Any, adam_w_mode: bool = True, **options: Any) -> None:
            defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
            super().__init__(params, {**defaults, "bias_correction": True, **options})
            self.adam_w_mode = adam_w_mode

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # pyright: ignore
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    self._update(group, params, [p.grad for p in params])

        def _update(self, group: dict[str, Any], params: list[Any], grads: list[Any]) -> None:
            beta1, beta2 = group["betas"]
            lr, decay, step = group["lr"], group["weight_decay"], group["step"]
            correct1 = 1 - beta1**step if group["bias_correction"] else 1.0
            correct2 = 1 - beta2**step if group["bias_correction"] else 1.0
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            mean = [self.state[p]["exp_avg"] for p in params]
            square = [self.state[p]["exp_avg_sq"] for p in params]
            if decay and self.adam_w_mode:
                each._foreach_mul_(params, 1 - lr * decay)
            elif decay:
                grads = list(each._foreach_add(grads, params, alpha=decay))
            each._foreach_lerp_(mean, grads, 1 - beta1)
            each._foreach_mul_(square, beta2)
            each._foreach_addcmul_(square, grads, grads, 1 - beta2)
            denominator = each._foreach_div(square, correct2)
            each._foreach_sqrt_(denominator)
            each._foreach_add_(denominator, group["eps"])
            each._foreach_addcdiv_(params, mean, denominator, -lr / correct1)

    return CpuFusedAdam


def _patch_moe() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    utils: Any = moe_utils
    if not hasattr(utils, "te_general_gemm"):  # named without a guard where TE does not import
        utils.te_general_gemm = None

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
        return tensor.numpy() if as_numpy and hasattr(tensor, "numpy") else tensor

    dispatcher: Any = token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _cuda_literals_to_cpu() -> Any:
    """A TorchFunctionMode for the CUDA spellings that megatron-core writes literally.

    device="cuda" becomes the CPU, pinned memory plain memory, Tensor.cuda() the tensor itself, and
    Tensor.type() answers "torch.cuda.*" because megatron-core sorts parameters by that string.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    cpu = torch.device("cpu")

    class CudaLiteralsToCpu(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if kwargs is None:
                return self._call(func, args)
            dev = kwargs.get("device")
            if dev is not None and (dev == "cuda" or getattr(dev, "type", None) == "cuda"):
                kwargs["device"] = cpu
            kwargs.pop("pin_memory", None)  # there is no device to copy to
            if func is torch.Tensor.cuda:
                return args[0]
            return func(*args, **kwargs) if kwargs else self._call(func, args)

        def _call(self, func: Any, args: Any) -> Any:
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.type and len(args) == 1:
                return func(*args).replace("torch.", "torch.cuda.", 1)
            return func(*args)

    return CudaLiteralsToCpu()
