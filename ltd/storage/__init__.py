"""Tensors on disk: sharded safetensors with checksums, atomic directories, a format number. No process groups.

A checkpoint is a directory of shards. Each shard holds flat slices: the part ``[start, start + n)`` of the flattened
tensor ``name`` in ``group`` (``master`` weights, ``exp_avg``, ``ema_0.999``, ...). A reader assembles any range from
whatever slices cover it, so what wrote a checkpoint (how many ranks, which ZeRO stage) is nothing to what reads it.
Nothing here is pickled.
"""

from ltd.storage.directories import (
    abort_directory,
    atomic_directory,
    begin_directory,
    commit_directory,
    incomplete_path,
    sha256_file,
    write_json,
)
from ltd.storage.errors import StorageError, StorageWriteError
from ltd.storage.export import EXPORT_FORMAT, is_export, load_model, read_export_config, save_model, stream_model
from ltd.storage.manifest import FORMAT, fingerprint, read_manifest, write_manifest
from ltd.storage.paths import (
    checkpoint_path,
    checkpoint_step,
    checkpoints,
    damaged,
    expired,
    is_checkpoint,
    latest_checkpoint,
    remove_checkpoint,
    remove_incomplete,
    set_aside_newer,
    write_latest,
)
from ltd.storage.reader import Fill, Reader, verify
from ltd.storage.runs import LINEAGE, model_config, open_run, read_lineage, read_run, weights_group
from ltd.storage.shards import ShardImage, Slice, write_image, write_shard

__all__ = [
    "EXPORT_FORMAT",
    "FORMAT",
    "LINEAGE",
    "Fill",
    "Reader",
    "ShardImage",
    "Slice",
    "StorageError",
    "StorageWriteError",
    "abort_directory",
    "atomic_directory",
    "begin_directory",
    "checkpoint_path",
    "checkpoint_step",
    "checkpoints",
    "commit_directory",
    "damaged",
    "expired",
    "fingerprint",
    "incomplete_path",
    "is_checkpoint",
    "is_export",
    "latest_checkpoint",
    "load_model",
    "model_config",
    "open_run",
    "read_export_config",
    "read_lineage",
    "read_manifest",
    "read_run",
    "remove_checkpoint",
    "remove_incomplete",
    "save_model",
    "set_aside_newer",
    "sha256_file",
    "stream_model",
    "verify",
    "weights_group",
    "write_image",
    "write_json",
    "write_latest",
    "write_manifest",
    "write_shard",
]
