#!/usr/bin/env bash
# The whole loop on a toy problem, on this machine: bash launch/quickstart.sh [--dir DIR] [--seed N]
# [--rollout sglang] [section.key=value ...]. Safe to run again: what is there is not made twice.
case " $* " in *" --rollout sglang "* | *" --rollout=sglang "*) want=sglang ;; esac
# shellcheck source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m megaopd quickstart "$@"
