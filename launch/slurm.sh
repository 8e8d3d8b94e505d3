#!/usr/bin/env bash
# sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh CONFIG [dotted.key=value ...]
# One task per host starts torchrun there. SIGTERM comes 120 s before the time limit: training saves and ends, and the
# job is put back in the queue, where resume=auto goes on. Partition, account and time belong on the sbatch line.
#SBATCH --job-name=ltd
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch from the repository}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR NUM_NODES="$SLURM_JOB_NUM_NODES" RUN_ID="slurm-$SLURM_JOB_ID"
export MASTER_PORT="${MASTER_PORT:-$(( 20000 + SLURM_JOB_ID % 20000 ))}"
export NPROC="${NPROC:-${SLURM_GPUS_ON_NODE:-2}}"

# NODE_RANK is known on each host only, hence the quotes.
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec launch/torchrun_multinode.sh "$@"' _ "$@" &
step=$!
requeue() {
    kill -TERM "$step" 2>/dev/null || true
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue TERM
wait "$step"
