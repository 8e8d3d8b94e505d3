#!/usr/bin/env bash
# The deepspeed launcher with a hostfile ("HOST slots=N" per line):
#   HOSTFILE=hosts.txt launch/deepspeed_hostfile.sh CONFIG [dotted.key=value ...]
# With NODE_RANK and MASTER_ADDR set it starts this host's processes only (run it on every host; no ssh). Without them it
# reaches the other hosts by ssh, which must work without a password, to the first host too.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${HOSTFILE:?set HOSTFILE}"
source launch/environment.sh
arguments=(--no_local_rank --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
[ -z "${MASTER_ADDR:-}" ] || arguments+=(--master_addr "$MASTER_ADDR")
[ -z "${NODE_RANK:-}" ] || arguments+=(--no_ssh --node_rank "$NODE_RANK")
exec "$PYTHON" -m deepspeed.launcher.runner "${arguments[@]}" "$PROGRAM" "$@"
