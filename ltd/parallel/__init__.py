"""Everything that needs a process group: layout, engines, sequence parallelism, EMA on shards, checkpoints.

The only importer of torch.distributed. Knows no model: it works through the seams of ``ltd.nn.seams`` and attributes
such as ``blocks`` that models expose.
"""

from __future__ import annotations

from ltd.parallel.config import OptimizerSettings, ParallelConfig
from ltd.parallel.ema import Ema, EmaConfig
from ltd.parallel.engine import build_engine
from ltd.parallel.interface import DiscardedStepError, Engine, MasterShard, ProcessLostError
from ltd.parallel.layout import Layout

__all__ = [
    "DiscardedStepError",
    "Ema",
    "EmaConfig",
    "Engine",
    "Layout",
    "MasterShard",
    "OptimizerSettings",
    "ParallelConfig",
    "ProcessLostError",
    "build_engine",
]
