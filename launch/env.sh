# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes or reuses .venv from the pinned files of this directory.
# The environment is rebuilt only where those files changed. PYTHON chooses the interpreter.
#
#   want=sglang bash launch/env.sh     adds SGLang, for rollout.engine=sglang
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then kind=gpu; else kind=cpu; fi
lock="launch/requirements-$kind.txt"
no_deps="launch/requirements-$kind-no-deps.txt"
stamp=".venv/megaopd-$(cat "$lock" "$no_deps" pyproject.toml | sha256sum | cut -c1-16)"
pip_options=(--quiet --disable-pip-version-check)

if [ ! -f "$stamp" ]; then
  echo ">> installing the pinned $kind environment into .venv (once; about two minutes on a fast line)"
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  index=()
  if [ "$kind" = cpu ]; then
    # PyPI's torch for Linux brings CUDA; the CPU wheel has its own index. Where that is out of reach
    # (a mirror, a local wheel) pip's own settings decide.
    cpu_index="https://download.pytorch.org/whl/cpu"
    if .venv/bin/python -c "import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=5)" \
      >/dev/null 2>&1; then index=(--extra-index-url "$cpu_index"); fi
  fi
  .venv/bin/pip install "${pip_options[@]}" "${index[@]}" -r "$lock"
  # megatron-core declares torch and CUDA packages that must not be moved.
  .venv/bin/pip install "${pip_options[@]}" --no-deps --no-build-isolation -r "$no_deps"
  .venv/bin/pip install "${pip_options[@]}" --no-deps --no-build-isolation -e .
  # The C kernels of the losses, once and not by every rank of the first run.
  .venv/bin/python -c "from megaopd.losses.kernels import cpu; cpu.available()"
  touch "$stamp"
else
  echo ">> using .venv as it is"
fi

# SGLang, once: on a CPU beside the rest, on a GPU in an environment of its own (.venv/sglang).
add_sglang() {
  local files=(launch/requirements-sglang-"$kind"*.txt)
  local mark
  mark="$stamp-sglang-$(cat "${files[@]}" | sha256sum | cut -c1-16)"
  if [ "$kind" = gpu ]; then export MEGAOPD_SGLANG_PYTHON="$PWD/.venv/sglang/bin/python"; fi
  [ ! -f "$mark" ] || return 0
  echo ">> adding SGLang for $kind to .venv (once)"
  if [ "$kind" = gpu ]; then
    [ -x .venv/sglang/bin/python ] || "${PYTHON:-python3}" -m venv .venv/sglang
    .venv/sglang/bin/pip install "${pip_options[@]}" -r launch/requirements-sglang-gpu.txt
  else
    .venv/bin/pip install "${pip_options[@]}" -r launch/requirements-sglang-cpu.txt
    .venv/bin/pip install "${pip_options[@]}" --no-deps -r launch/requirements-sglang-cpu-no-deps.txt
  fi
  touch "$mark"
}

# The linters of launch/, which only the tests want.
add_linters() {
  local mark
  mark="$stamp-lint-$(sha256sum < launch/requirements-lint.txt | cut -c1-16)"
  [ ! -f "$mark" ] || return 0
  .venv/bin/pip install "${pip_options[@]}" -r launch/requirements-lint.txt
  touch "$mark"
}
if [ "${want:-}" = sglang ]; then add_sglang; fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
PATH="$PWD/.venv/bin:$PATH"
