#!/usr/bin/env bash
# The whole loop on a toy problem, on this machine: bash launch/quickstart.sh [--dir DIR] [--seed N]
# [section.key=value ...]. Safe to run again: what is there is not made twice.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m megaopd quickstart "$@"
