"""Bytes to batches on the CPU: shards, index, plan, decoding, transforms, latent cache, loader.

Knows two integers (``global_rank``, ``world_size``), never process groups, models or devices. See docs/data.md.
"""

from ltd.data.batch import BadSample, Batch, MicroBatch, PackedBatch, StepInfo
from ltd.data.batching import BucketsConfig, FixedConfig, PackedConfig
from ltd.data.config import DataConfig, DatasetConfig
from ltd.data.evaluation import evaluation_batches
from ltd.data.loader import Loader, build_loader
from ltd.data.plan import ViewConfig

__all__ = [
    "BadSample",
    "Batch",
    "BucketsConfig",
    "DataConfig",
    "DatasetConfig",
    "FixedConfig",
    "Loader",
    "MicroBatch",
    "PackedBatch",
    "PackedConfig",
    "StepInfo",
    "ViewConfig",
    "build_loader",
    "evaluation_batches",
]
