"""The latent cache: raw posterior means and log-variances, and text embeddings, on disk at a fixed stride.

A cache is a directory. Each writing process appends to a part of its own: one file of rows per latent shape, one of
text tokens, and a line of ``records.jsonl`` after each row, so that a killed job goes on where it stopped, with any
number of processes. Joining the parts writes ``entries.jsonl``, ``texts.jsonl`` and, last, ``manifest.json``, without
which nothing reads the cache. ``ltd.data.latent_writer`` writes it; here are its format, check and
reader. Knows no models: hashes and tensors are handed in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ltd.config import ConfigError, digest
from ltd.data.batch import BadSampleError, Sample
from ltd.data.index import Entry

FORMAT = 1
Dtype = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_RAW = {"bf16": np.int16, "fp16": np.int16, "fp32": np.int32}


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """Everything the numbers in a cache depend on; a cache of another identity is stale."""

    autoencoder_hash: str  #: Hash of the autoencoder's configuration and weights.
    compression: tuple[int, int, int]  #: Pixels per latent cell along (t, h, w).
    latent_channels: int  #: Channels of the latents.
    data_digest: str  #: ``Index.digest`` of the shards.
    transforms: dict[str, Any]  #: Views, crop, flip, window step, filter: whatever shaped the pixels.
    text_encoder: str | None = None  #: Name of the text encoder; None for a cache without text.
    text_encoder_hash: str | None = None  #: Hash of its configuration and weights.
    dtype: Dtype = "bf16"  #: Stored precision of latents and embeddings.

    @property
    def digest(self) -> str:
        """sha256 of all fields."""
        return digest(asdict(self))


def is_cache(path: str | Path) -> bool:
    """Say whether a directory is a latent cache, finished or not."""
    return (Path(path) / "manifest.json").is_file() or (Path(path) / "writing.json").is_file()


def read_cache_manifest(directory: str | Path) -> dict[str, Any]:
    """Read the manifest of a finished cache.

    Args:
        directory: The cache.

    Returns:
        The fields of ``CacheIdentity`` with ``format``, ``identity`` and ``counts``.

    Raises:
        ConfigError: If the cache is missing, unfinished or of another format.
    """
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        what = "is not finished: run tools/cache_latents.py again" if is_cache(directory) else "is no latent cache"
        raise ConfigError(f"data.shards: {directory} {what}")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"data.shards: {path} is not a cache manifest: {error}") from error
    if found != FORMAT:
        raise ConfigError(f"data.shards: {directory} is a cache of format {found}, needed {FORMAT}: make it again")
    return dict(manifest)


def check_cache(manifest: Mapping[str, Any], **expected: Any) -> None:
    """Refuse a stale cache.

    Args:
        manifest: Manifest of the cache.
        **expected: Fields of ``CacheIdentity`` with the values that training has now.

    Raises:
        ConfigError: If a field differs; names it and both values.
        TypeError: If an expected name is no field of ``CacheIdentity``.
    """
    for name, wanted in expected.items():
        if name not in CacheIdentity.__dataclass_fields__:
            raise TypeError(f"check_cache: {name!r} is no field of CacheIdentity")
        found = manifest.get(name)
        if json.loads(json.dumps(found)) != json.loads(json.dumps(wanted)):
            raise ConfigError(
                f"data.shards: the latent cache was made with {name} = {found}, but this run has {wanted}; "
                "make it again: python tools/cache_latents.py (or point data.shards at the cache that belongs to it)"
            )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a JSONL file that may end in half a line."""
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines]


class LatentCache:
    """Read a finished cache by memory map.

    Args:
        directory: The cache.

    Raises:
        ConfigError: If it is unfinished, empty or a file is shorter than its records say.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_cache_manifest(directory)
        self.channels = int(self.manifest["latent_channels"])
        self.text_tokens = int(self.manifest["counts"]["text_tokens"])
        self.text_dim = int(self.manifest["counts"]["text_dim"])
        self._dtype = str(self.manifest["dtype"])
        self._records = read_lines(self.directory / "entries.jsonl")
        self._texts = {record["text"]: record for record in read_lines(self.directory / "texts.jsonl")}
        self._maps: dict[str, np.ndarray] = {}
        if not self._records:
            raise ConfigError(f"data.shards: the latent cache {directory} holds no windows")
        self.entries = [
            Entry(
                r["key"], r["kind"], r["width"], r["height"], r["frames"], r["fps"], len(r["caption"]), {}, shard=number
            )
            for number, r in enumerate(self._records)
        ]  #: One entry per window; ``shard`` is its row in ``entries.jsonl``.
        for record in (*self._records, *self._texts.values()):
            self._check(record)

    def _check(self, record: Mapping[str, Any]) -> None:
        rows = self._map(record)
        last = record["row"] + record.get("tokens", 1)
        if last > len(rows):
            raise ConfigError(
                f"data.shards: {self.directory / record['file']} is truncated: {len(rows)} rows, needed {last}; "
                "make the cache again"
            )

    def _map(self, record: Mapping[str, Any]) -> np.ndarray:
        if record["file"] not in self._maps:
            path, raw = self.directory / record["file"], np.dtype(_RAW[self._dtype])
            row = (record["shape"]) if "text" in record else [2, *record["shape"]]
            count = path.stat().st_size // (int(np.prod(row)) * raw.itemsize) if path.is_file() else 0
            shape = (count, *row)
            self._maps[record["file"]] = np.memmap(path, raw, "r", shape=shape) if count else np.zeros(shape, raw)
        return self._maps[record["file"]]

    def _tensor(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(rows)).view(DTYPES[self._dtype]).float()

    def latent_shape(self, entry: Entry) -> tuple[int, int, int]:
        """Return the size (t, h, w) of a window's latents."""
        _, t, h, w = self._records[entry.shard]["shape"]
        return (t, h, w)

    def read(self, entry: Entry) -> Sample:
        """Read one window.

        Args:
            entry: One of ``entries``.

        Returns:
            The sample with ``mean`` and ``logvar`` in float32 and, in a cache with text, ``text`` and ``text_mask``
            padded to the longest caption of the cache.

        Raises:
            BadSampleError: If its values are not finite.
        """
        record = self._records[entry.shard]
        mean, logvar = self._tensor(self._map(record)[record["row"]])
        if not (torch.isfinite(mean).all() and torch.isfinite(logvar).all()):
            raise BadSampleError("not_finite", "cached latents hold NaN or infinity")
        text, mask = self.text(record["caption"])
        return Sample(caption=record["caption"], fps=record["fps"], mean=mean, logvar=logvar, text=text, text_mask=mask)

    def blank_text(self) -> tuple[Tensor | None, Tensor | None]:
        """Make zeros of the size of an embedding and its mask; None in a cache without text."""
        if not self._texts:
            return None, None
        return torch.zeros(self.text_tokens, self.text_dim), torch.zeros(self.text_tokens, dtype=torch.bool)

    def text(self, caption: str) -> tuple[Tensor | None, Tensor | None]:
        """Read the embedding of a caption; "" is the null text.

        Args:
            caption: A caption of the cache.

        Returns:
            ``(n, d)`` float32 padded with zeros, and bool ``(n,)``; None twice in a cache without text.
        """
        text, mask = self.blank_text()
        if text is None or mask is None:
            return None, None
        record = self._texts[caption]
        tokens, row = record["tokens"], record["row"]
        text[:tokens] = self._tensor(self._map(record)[row : row + tokens])
        mask[:tokens] = True
        return text, mask
