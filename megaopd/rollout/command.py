"""What starts one SGLang server: its command line and its environment, for CPU and GPU.

The flags are those of SGLang 0.5.23. The pure part of serving: nothing here starts anything.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaopd.errors import UserError
from megaopd.models.arch import read_hf_config
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.guard import cores_of

Device = Literal["cpu", "cuda"]

# An interpreter that has SGLang, where ours has not: SGLang and the trainer may pin different
# releases of torch (launch/requirements-sglang-gpu.txt).
PYTHON_VARIABLE = "MEGAOPD_SGLANG_PYTHON"
CPU_TOKENS = 65536  # in the KV cache of a CPU server, where server.max_tokens does not say
# Of the memory that is free when a CPU server starts. An upper bound: the tokens above decide.
CPU_MEMORY_FRACTION = 0.5
# SGLang takes its key from the command line only, and every user of a machine can read that. So the
# key goes through the environment, which others cannot read, and is put there inside the process.
WITH_KEY = (
    "import os, runpy, sys; sys.argv += ['--api-key', os.environ[sys.argv.pop(1)]]; "
    "runpy.run_module('sglang.launch_server', run_name='__main__', alter_sys=True)"
)
# A trainer's own settings, which a server must not inherit: with torchrun's, SGLang's workers would
# join the trainer's store; the others order or allocate for Megatron.
TRAINER_VARIABLES = frozenset({
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
    "TORCHDYNAMO_DISABLE", "TRITON_INTERPRET",
})  # fmt: skip
KEPT_BACK = 8  # positions of a context that SGLang would not use
# Names of a mixture's expert count in Hugging Face configs.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Command:
    """A process to start."""

    argv: tuple[str, ...]
    env: dict[str, str]  # the whole environment


def gpus_per_server(config: ServerConfig) -> int:
    """Data-parallel replicas inside a server have GPUs of their own; experts share the tensor
    parallel ones."""
    return config.tensor * config.data


def server_command(
    config: ServerConfig,
    model_dir: Path,
    *,
    device: Device,
    dtype: str,
    port: int,
    environ: Mapping[str, str],
    gpus: Sequence[int] = (),
    seed: int | None = None,
    model: "Served | None" = None,
) -> Command:
    """The command that serves `model_dir` on `config.host`:`port`.

    Args:
        dtype: of the weights where `config.dtype` is empty: float32, bfloat16, float16, or fp8
            (bfloat16 weights, quantised as they are loaded; GPU only).
        environ: what the server's environment is made from; holds the key, if there is one.
        gpus: which of the GPUs that `environ` shows; `gpus_per_server` of them.
        seed: SGLang's, which also tells one start of a server from another (/server_info); None:
            SGLang draws one.
        mixture: the model has experts, and answers are to say which were taken (GPU only).

    Raises:
        UserError: no key in the environment variable, or a layout that SGLang refuses.
    """
    _check(config)
    python = environ.get(PYTHON_VARIABLE) or sys.executable
    argv = [python, "-m", "sglang.launch_server"]
    if config.api_key_env:
        read_key(config, environ)
        argv = [python, "-c", WITH_KEY, config.api_key_env]
    argv += ["--model-path", str(model_dir), "--host", config.host, "--port", str(port)]
    argv += ["--device", device, *_weights(config.dtype or dtype, device)]
    # A directory without weights (a Megatron checkpoint's): the first sync brings them.
    argv += [] if any(model_dir.glob("*.safetensors")) else ["--load-format", "dummy"]
    # Token ids in, token ids out. Without --sleep-on-idle an idle scheduler keeps a core busy.
    argv += ["--skip-tokenizer-init", "--sleep-on-idle"]
    argv += ["--random-seed", str(seed)] if seed is not None else []
    argv += ["--max-running-requests", str(config.concurrency), "--log-level-http", "warning"]
    for flag, size in (("--tp", config.tensor), ("--dp", config.data), ("--ep", config.expert)):
        argv += [f"{flag}-size", str(size)] if size > 1 else []
    argv += _cpu(config) if device == "cpu" else _cuda(config)
    env = _environment(config, device, gpus, environ)
    if model is not None:
        # Prompt and response must fill the model's context, of which SGLang keeps some back.
        argv += ["--context-length", str(model.positions + KEPT_BACK)]
        env["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    if model is not None and model.mixture and device == "cuda":
        argv += ["--enable-return-routed-experts"]  # it needs page-locked memory
    return Command((*argv, *config.extra_args), env)


def _check(config: ServerConfig) -> None:
    if config.tensor % config.expert:
        raise UserError(
            f"server.expert = {config.expert} with server.tensor = {config.tensor}",
            expected="an expert parallel size that divides the tensor parallel size",
        )
    try:
        wrong = cores_of(config.cores) - os.sched_getaffinity(0) if config.cores else set()
    except ValueError:
        wrong = {config.cores}
    if wrong:
        raise UserError(
            f"server.cores = {config.cores!r}",
            expected=f"cores of {sorted(os.sched_getaffinity(0))}, such as 1 or 2-3 or 0,4-7",
        )


def _weights(dtype: str, device: Device) -> list[str]:
    """Never "auto": that takes fp32 checkpoints as fp16."""
    if dtype != "fp8":
        return ["--dtype", dtype]
    if device == "cpu":
        raise UserError("server.dtype = fp8 on a CPU", expected="a GPU", fix="set another dtype")
    return ["--dtype", "bfloat16", "--quantization", "fp8"]


def _cpu(config: ServerConfig) -> list[str]:
    """Torch's own operators (rollout/sglang_cpu.py), no graphs, no compilation."""
    return [
        *("--attention-backend", "torch_native"),
        *("--sampling-backend", "pytorch"),
        *("--grammar-backend", "none"),
        *("--cuda-graph-backend-decode", "disabled"),
        *("--cuda-graph-backend-prefill", "disabled"),
        *("--max-total-tokens", str(config.max_tokens or CPU_TOKENS)),
        *("--mem-fraction-static", str(config.memory_fraction or CPU_MEMORY_FRACTION)),
        "--skip-server-warmup",
    ]


def _cuda(config: ServerConfig) -> list[str]:
    """SGLang chooses backends and graphs; the warm-up compiles before the server is healthy."""
    argv = []
    if config.max_tokens:
        argv += ["--max-total-tokens", str(config.max_tokens)]
    if config.memory_fraction:
        argv += ["--mem-fraction-static", str(config.memory_fraction)]
    if config.placement == "colocated":
        argv += ["--enable-memory-saver"]  # /release_memory_occupation
    return argv


def _environment(
    config: ServerConfig, device: Device, gpus: Sequence[int], environ: Mapping[str, str]
) -> dict[str, str]:
    env = {
        name: value
        for name, value in environ.items()
        if name not in TRAINER_VARIABLES and not name.startswith(("TORCHELASTIC_", "MEGAOPD_"))
    }
    env |= {
        "OMP_NUM_THREADS": "1",  # more threads fight over cores with the trainer's ranks
        "HF_HUB_OFFLINE": "1",
        # /health answers from the front end alone; else it samples, and fails while paused.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore::UserWarning",  # a hundred lines in the log at every start
        "PYTHONSAFEPATH": "1",  # what lies in the working directory shadows no package
    }
    if config.api_key_env:
        env[config.api_key_env] = environ[config.api_key_env]
    if device == "cpu":
        env["SGLANG_PLATFORM"] = "megaopd_cpu"
    elif gpus:
        shown = environ.get("CUDA_VISIBLE_DEVICES", "")
        names = shown.split(",") if shown else [str(i) for i in range(max(gpus) + 1)]
        if max(gpus) >= len(names):
            raise UserError(
                f"GPU {max(gpus)} for a server, with CUDA_VISIBLE_DEVICES={shown}",
                expected=f"GPUs 0 to {len(names) - 1}",
                fix="lower server.count, server.tensor or server.data",
            )
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in gpus)
    return env


def read_key(config: ServerConfig, environ: Mapping[str, str]) -> str:
    """The key that clients send; empty where none is configured.

    Raises:
        UserError: `config.api_key_env` names a variable that is not set.
    """
    if not config.api_key_env:
        return ""
    key = environ.get(config.api_key_env, "")
    if not key:
        raise UserError(
            f"server.api_key_env = {config.api_key_env}, and that variable is not set",
            expected="a key in it, the same for the servers and for the trainer",
        )
    return key


@dataclass(frozen=True)
class Served:
    """What a server has to be told of its model."""

    positions: int  # of the context
    mixture: bool  # it has routed experts


def served(model_dir: Path) -> Served:
    """From a Hugging Face checkpoint's config.json.

    Raises:
        UserError: there is no readable config.json, or it names no context length.
    """
    config = language_config(model_dir)
    positions = int(config["max_position_embeddings"])
    return Served(positions, any((config.get(name) or 0) > 1 for name in EXPERT_COUNTS))


def language_config(model_dir: Path) -> dict[str, Any]:
    """config.json of a checkpoint that SGLang serves; of the text model, where it has others too.

    Raises:
        UserError: there is no readable config.json, or it names no context length.
    """
    path = model_dir / "config.json"
    try:
        config = read_hf_config(model_dir)
    except (UserError, OSError) as err:
        raise UserError(
            f"{path} cannot be read: {err}", expected="a Hugging Face checkpoint directory"
        ) from err
    config = {**config.get("text_config", {}), **config}
    if "max_position_embeddings" not in config:
        raise UserError(f"{path} cannot be read: no max_position_embeddings", expected="it")
    return config
