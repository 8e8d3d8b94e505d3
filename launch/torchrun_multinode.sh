#!/usr/bin/env bash
# Several hosts over c10d rendezvous; run the same line on each host, with its own NODE_RANK:
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun_multinode.sh CONFIG [dotted.key=value ...]
# NUM_NODES, NODE_RANK (0 on the host that owns MASTER_ADDR), MASTER_ADDR, MASTER_PORT (default 29500), RUN_ID (same on
# all hosts), LOCAL_ADDR (this host's address, where its name does not resolve), IFACE (network interface, where there
# are several), NPROC, MAX_RESTARTS as in torchrun.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NUM_NODES:?set NUM_NODES}" "${NODE_RANK:?set NODE_RANK}" "${MASTER_ADDR:?set MASTER_ADDR}"
source launch/environment.sh
if [ -n "${IFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME="$IFACE" NCCL_SOCKET_IFNAME="$IFACE"
fi
is_host=false
[ "$NODE_RANK" -ne 0 ] || is_host=true
arguments=(
    --nnodes "$NUM_NODES" --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-0}"
    --rdzv-backend c10d --rdzv-id "${RUN_ID:-ltd}" --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
    --rdzv-conf "is_host=$is_host"
)
[ -z "${LOCAL_ADDR:-}" ] || arguments+=(--local-addr "$LOCAL_ADDR")
exec "$PYTHON" -m torch.distributed.run "${arguments[@]}" train.py "$@"
