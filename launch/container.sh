#!/usr/bin/env bash
# Used by the Dockerfile, inside an image that brings torch for its GPUs: makes the environment DIR with the
# project's pinned packages. Torch, triton, numpy and apex are the image's; so is Transformer Engine where
# megatron-core takes its release, else the pinned one is built here (a quarter of an hour).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${1:?a directory}"

of_the_base='^(torch|triton|numpy|setuptools)=='
python3 -m venv --system-site-packages "$venv"
"$venv/bin/pip" install setuptools==84.2.1
"$venv/bin/pip" install -r <(grep -vE "$of_the_base" launch/requirements-gpu.txt)
"$venv/bin/pip" install --no-deps "$(grep '^megatron-core==' launch/requirements-gpu-no-deps.txt)"

te_is_right() {
  "$venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    found = version("transformer_engine")
except PackageNotFoundError:
    sys.exit("Transformer Engine: none")
print("Transformer Engine:", found)
# What megatron-core 0.16.1 takes.
sys.exit(not (2, 9) <= tuple(map(int, found.split(".")[:2])) < (2, 12))
PYTHON
}
if ! te_is_right; then
  cuda=$("$venv/bin/python" -c "import torch; print(torch.version.cuda.split('.')[0])")
  mapfile -t pins < <(grep '^transformer-engine' launch/requirements-gpu-no-deps.txt |
    sed "s/-cu13==/-cu$cuda==/")
  NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=90 MAX_JOBS="${MAX_JOBS:-8}" \
    "$venv/bin/pip" install --no-deps --no-build-isolation "${pins[@]}"
  te_is_right
fi
