#!/usr/bin/env bash
# One host: launch/torchrun.sh CONFIG [dotted.key=value ...]
# NPROC: processes on this host (default: its GPUs, else 2). MAX_RESTARTS: restarts after a failure (default 0); a restart
# resumes from the latest checkpoint as long as the run has resume=auto.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
exec "$PYTHON" -m torch.distributed.run --standalone \
    --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-0}" "$PROGRAM" "$@"
