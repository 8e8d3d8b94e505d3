"""What ``test_launched.py`` runs on several processes: say who this is; the last one ends as it is told."""

from __future__ import annotations

import os
import sys
import time

import torch

from ltd.parallel import Layout, ParallelConfig

if __name__ == "__main__":
    end, world = sys.argv[1], os.environ.get("WORLD_SIZE", "none")
    layout = Layout.from_environment(ParallelConfig(engine="torch" if world == "none" else "deepspeed"))
    total = int(layout.sum_(torch.tensor([1 + layout.global_rank])).item())
    print(f"{layout.global_rank} of {world}, sum {total}, {os.environ.get('SAID')}")
    last = layout.global_rank == layout.world_size - 1
    layout.close()
    if last and end == "raise":
        raise KeyError("a bug")
    if last and end == "exit":
        sys.exit(3)
    if last and end == "hang":
        time.sleep(60)
