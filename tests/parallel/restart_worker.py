"""One process that is killed in its first two attempts and reports in the third; run under torchrun."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from ltd.parallel import Layout, ParallelConfig


def main(folder: str) -> None:
    layout = Layout.from_environment(ParallelConfig(sequence=2, timeout_s=30))
    total = layout.sum_(torch.ones(1)).item() + len(layout.gather_sequence(torch.ones(1)))
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt != "2" and layout.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    layout.barrier()
    Path(folder, f"rank{layout.global_rank}").write_text(f"attempt {attempt}, total {total}")
    layout.close()


if __name__ == "__main__":
    main(sys.argv[1])
