# What every launcher shares; sourced, not run. Environment only: no hyper-parameter belongs here.
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}"
# What is started: train.py, or another command that takes processes (sample.py, tools/cache_latents.py).
PROGRAM="${PROGRAM:-train.py}"
if [ -z "${NPROC:-}" ]; then
    NPROC="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)"
    [ "$NPROC" -gt 0 ] || NPROC=2
fi
# Processes share the host's cores; torchrun would give each a single thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) / NPROC > 0 ? $(nproc) / NPROC : 1 ))}"
# Waiting threads sleep instead of spinning, which starves the processes beside them.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# A restarted group must not find the previous attempt's keys in the launcher's store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
# After SIGTERM the processes have this long to save; torchrun alone would kill them after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# A collective that fails raises in the training process instead of hanging it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
