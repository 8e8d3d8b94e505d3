"""What every test shares: a closed environment, and the reasons for skipping."""

from __future__ import annotations

import os

import pytest
import torch

#: What a shell may have set that would change what tests do: accounts, and the processes of a launcher.
FOREIGN = ("WANDB_API_KEY", "WANDB_MODE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def pytest_configure() -> None:
    """Close the environment, for this process and those it starts, before anything reads it."""
    for name in FOREIGN:
        os.environ.pop(name, None)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_SILENT="true")
    # Tiny tensors gain nothing from threads, and waiting threads slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where no CUDA device is."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
