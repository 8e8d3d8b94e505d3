#!/usr/bin/env bash
# sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh CONFIG [dotted.key=value ...]
# One task per host starts torchrun there. SIGTERM comes 120 s before the time limit (SLURM may send it 60 s earlier):
# training saves and ends, and the job is put back in the queue, where resume=auto goes on. SLURM itself puts back a job
# that is preempted or loses a host. A job that fails or is cancelled is not put back; MAX_REQUEUES (default 100) bounds
# the rest. Partition, account, time and CPUs (--cpus-per-task) belong on the sbatch line.
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
# srun does not take this over from sbatch by itself, and would give each host's processes one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

stop() {
    trap '' TERM
    local state
    state="$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" || state=unknown
    case "$state" in
    RUNNING | SIGNALING) ;;
    *) # cancelled, preempted or put back by others: SLURM has sent SIGTERM to the processes and decides what follows
        wait "$step" || true
        echo "stopped by SIGTERM; the job is $state, so this script does not put it back in the queue"
        exit 0
        ;;
    esac
    scancel --signal=TERM "$SLURM_JOB_ID" # to the processes of the step; srun would kill them at once
    wait "$step" || true                  # torchrun fails after SIGTERM, whatever its processes did
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-100}" ]; then
        echo "error: stopped by SIGTERM; not put back in the queue: MAX_REQUEUES=${MAX_REQUEUES:-100} is reached" >&2
        exit 1
    fi
    echo "stopped by SIGTERM; putting job $SLURM_JOB_ID back in the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
# NODE_RANK is known on each host only, hence the quotes.
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec launch/torchrun_multinode.sh "$@"' _ "$@" &
step=$!
trap stop TERM
wait "$step"
