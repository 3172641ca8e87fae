#!/usr/bin/env bash
# Lint, types and tests: bash launch/test.sh [--full] [pytest arguments]. --full adds the slow ones.
# shellcheck source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
add_linters
[ "$kind" = gpu ] || add_sglang  # its tests run on CPU servers

select=(-m "not slow")
if [ "${1:-}" = --full ]; then select=(); shift; fi
if [ $# -eq 0 ]; then
  echo ">> ruff"
  ruff check .
  ruff format --check .
  echo ">> pyright (basedpyright: the same checker, whole in a wheel)"
  basedpyright megaopd
fi
echo ">> pytest"
exec python -m pytest "${select[@]}" "$@"
