#!/usr/bin/env bash
# SGLang servers on this node, for a trainer that runs elsewhere; one call a node under Slurm or
# Kubernetes. They are looked after (restarted when they die or hang) until SIGTERM.
#
#   export KEY=...   # the same on the trainer's nodes
#   srun -N2 --ntasks-per-node=1 bash launch/sglang_servers.sh --model /shared/Qwen3-1.7B \
#     server.count=4 server.tensor=2 server.host=0.0.0.0 server.api_key_env=KEY
#
# Each node prints its server.addresses=[...]; the trainer gets them all in one such list, and
# server.api_key_env=KEY. Options: --dtype D (bfloat16), --log-dir DIR, --print-commands (and start
# nothing); every other setting as in the section [server] of a run. SKIP_ENV=1 takes the python of
# the PATH, for containers that bring their own.
[ $# -gt 0 ] || { sed -n '2,12p' "$0"; exit 2; }
if [ -z "${SKIP_ENV:-}" ]; then
  want=sglang
  # shellcheck source=env.sh
  source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
fi
exec python -m megaopd.rollout.serve "$@"
