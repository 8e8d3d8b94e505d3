#!/usr/bin/env bash
# Several hosts over c10d rendezvous; run the same line on each host, with its own NODE_RANK:
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun_multinode.sh CONFIG [dotted.key=value ...]
# NUM_NODES, NODE_RANK (0 on the host that owns MASTER_ADDR), MASTER_ADDR, MASTER_PORT (default 29500), RUN_ID (same on
# all hosts), LOCAL_ADDR (this host's address, where its name does not resolve), IFACE (network interface, where there
# are several), NPROC, MAX_RESTARTS as in torchrun.sh. LAUNCHER_GRACE_S: a launcher without processes is ended after so
# many seconds (default 60; 660 with restarts, which wait up to 600 for the other hosts): cut off from the host of its
# store, torchrun itself would hang for many minutes.
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
"$PYTHON" -m torch.distributed.run "${arguments[@]}" "$PROGRAM" "$@" &
launcher=$!
trap 'kill -TERM "$launcher" 2>/dev/null || true' TERM INT
grace_s="${LAUNCHER_GRACE_S:-$([ "${MAX_RESTARTS:-0}" -gt 0 ] && echo 660 || echo 60)}"
started=false idle_s=0
alive() { # whether the launcher has processes that did not end yet
    local child
    for child in $(cat /proc/"$launcher"/task/*/children 2>/dev/null); do
        grep -q '^State:[[:space:]]*[A-Y]' "/proc/$child/status" 2>/dev/null && return 0
    done
    return 1
}
while kill -0 "$launcher" 2>/dev/null; do
    if alive; then
        started=true idle_s=0
    elif "$started" && [ $((idle_s += 1)) -gt "$grace_s" ]; then
        echo "error: the processes of this host ended $grace_s s ago and torchrun hangs; ending it" >&2
        kill -KILL "$launcher"
    fi
    sleep 1 &
    wait $! || true # a signal ends this wait, not the sleep
done
wait "$launcher"
