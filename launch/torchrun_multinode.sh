#!/usr/bin/env bash
# One node of a multi-node run; start the same line on every node:
#   NNODES=4 HEAD=node0 bash launch/torchrun_multinode.sh train --config run.toml [section.key=value ...]
# NNODES      nodes of the job, or MIN:MAX (default 1)   HEAD   host name or address of one of them
# PORT        rendezvous port (default 29400)     GPUS   ranks a node (default: its GPUs, or 1)
# RDZV_ID     a name shared by the nodes of one job (default megaopd)
# RESTARTS    restarts of the whole job after a failure (default 0); the run resumes by itself
# JOIN_S      seconds to wait for the other nodes, also for a lost one that comes back (default 600)
# ADDR        this node's address as the others see it, where its host name does not resolve
# IFNAME      network interface for NCCL and gloo, where the default one is wrong
# LOG_DIR     a directory for the output of every rank, beside the console
# SIGTERM or SIGUSR1: finish the step, save, exit with 75 (start again to go on). Exit code 2: wrong
# input, not restarted. Anything else but 0: a failure.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,14p' "$0"; exit 2; }
venv="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv"
if [ -d "$venv" ]; then PATH="$venv/bin:$PATH"; fi

gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
ranks="${GPUS:-$(( gpus > 0 ? gpus : 1 ))}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( gpus > 0 ? 8 : 1 ))}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"  # Megatron orders its streams by it
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"                 # saves memory beside an engine
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export TORCH_NCCL_AVOID_RECORD_STREAMS=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
if [ -n "${IFNAME:-}" ]; then export NCCL_SOCKET_IFNAME="$IFNAME" GLOO_SOCKET_IFNAME="$IFNAME"; fi

more=()
if [ -n "${ADDR:-}" ]; then more+=(--local-addr "$ADDR"); fi
if [ -n "${LOG_DIR:-}" ]; then more+=(--log-dir "$LOG_DIR" --tee 3); fi
exec python -m megaopd.elastic --nnodes "${NNODES:-1}" --nproc-per-node "$ranks" \
  --max-restarts "${RESTARTS:-0}" --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:-127.0.0.1}:${PORT:-29400}" --rdzv-id "${RDZV_ID:-megaopd}" \
  --rdzv-conf "join_timeout=${JOIN_S:-600}" "${more[@]}" -m megaopd "$@"
