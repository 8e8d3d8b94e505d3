"""Write the latent cache that ``ltd.data.latents`` reads: resumable, shared out over any number of processes.

Knows no models: windows, hashes and tensors are handed in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ltd.config import ConfigError, digest
from ltd.data.latents import DTYPES, FORMAT, CacheIdentity, read_lines
from ltd.data.windows import Window
from ltd.data.write import write_bytes


def _to_bytes(tensor: Tensor, dtype: str) -> bytes:
    raw = torch.int32 if dtype == "fp32" else torch.int16
    return tensor.detach().cpu().to(DTYPES[dtype]).contiguous().view(raw).numpy().tobytes()


@dataclass
class _Rows:
    """A growing file of equal rows."""

    path: Path
    row_bytes: int
    count: int = 0
    file: IO[bytes] | None = field(default=None, repr=False)

    def append(self, data: bytes) -> int:
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self.file = self.path.open("r+b")
            self.file.truncate(self.count * self.row_bytes)  # what a killed run wrote without recording it
            self.file.seek(0, os.SEEK_END)
        first = self.count
        self.file.write(data)
        self.file.flush()
        self.count += len(data) // self.row_bytes
        return first

    def close(self) -> None:
        if self.file is not None:
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


class LatentCacheWriter:
    """Write one process's share of a cache; an interrupted job goes on where it stopped.

    Args:
        directory: The cache.
        identity: What the numbers depend on.
        windows: All windows of the cache, equal on every process.
        global_rank: This process.
        world_size: Processes that share the work.

    A directory that holds a cache of another identity, or something else, is refused with a ``ConfigError``.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: CacheIdentity,
        windows: Sequence[Window],
        *,
        global_rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.directory, self.identity, self.windows = Path(directory), identity, tuple(windows)
        self.global_rank, self.world_size = global_rank, world_size
        self._begin()
        self.part = self.directory / "parts" / f"{global_rank:05d}-of-{world_size:05d}"
        self.part.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, _Rows] = {}
        self._done: set[int] = set()
        self._texts: set[str] = set()
        for part in sorted((self.directory / "parts").iterdir()):
            self._resume(part)
        self._log = (self.part / "records.jsonl").open("ab")

    def _begin(self) -> None:
        marker = self.directory / "writing.json"
        plan = {
            "format": FORMAT,
            **asdict(self.identity),
            "identity": digest({"of": self.identity.digest, "keys": [w.key for w in self.windows]}),
            "windows": len(self.windows),
        }
        # Another process of this job may be writing the marker at this moment.
        foreign = [p for p in self.directory.glob("*") if not p.name.startswith(marker.name)]
        if foreign and not marker.is_file():
            raise ConfigError(f"out: {self.directory} is not empty and holds no latent cache; choose another directory")
        if marker.is_file():
            found = json.loads(marker.read_text("utf-8"))
            names = [n for n in plan if found.get(n) != json.loads(json.dumps(plan[n]))]
            if names:
                raise ConfigError(
                    f"out: {self.directory} holds a cache that differs in {', '.join(names)}; "
                    "delete it or choose another directory"
                )
        else:
            write_bytes(marker, json.dumps(plan, indent=1).encode())

    def _resume(self, part: Path) -> None:
        mine = part == self.part
        path = part / "records.jsonl"
        records = read_lines(path)
        if mine and path.is_file():
            whole = path.read_bytes().rfind(b"\n") + 1
            os.truncate(path, whole)
        for record in records:
            if "text" in record:
                if mine:
                    self._texts.add(record["text"])
                    self._rows(record).count = record["row"] + record["tokens"]
                continue
            self._done.add(record["position"])
            if mine and "file" in record:
                self._rows(record).count = record["row"] + 1

    def _rows(self, record: Mapping[str, Any]) -> _Rows:
        if record["file"] not in self._files:
            itemsize = DTYPES[self.identity.dtype].itemsize
            size = int(np.prod(record["shape"])) * itemsize * (1 if "text" in record else 2)
            self._files[record["file"]] = _Rows(self.directory / record["file"], size)
        return self._files[record["file"]]

    def _record(self, record: Mapping[str, Any]) -> None:
        self._log.write(json.dumps(record).encode() + b"\n")
        self._log.flush()

    @property
    def complete(self) -> bool:
        """Whether the cache is finished."""
        return (self.directory / "manifest.json").is_file()

    def pending(self) -> list[Window]:
        """List the windows of this process's share that no run has done yet."""
        share = self.windows[self.global_rank :: self.world_size]
        return [window for window in share if window.position not in self._done]

    def add(self, window: Window, *, caption: str, mean: Tensor, logvar: Tensor) -> None:
        """Append a window.

        Args:
            window: The window.
            caption: Its caption, "" for none.
            mean: ``(c, t, h, w)``, raw latents.
            logvar: ``(c, t, h, w)``.

        Raises:
            ValueError: If the latents have other channels than the identity says, or differ in shape.
        """
        if mean.shape != logvar.shape or mean.ndim != 4 or mean.shape[0] != self.identity.latent_channels:
            raise ValueError(
                f"latents of {window.key}: got mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)}, "
                f"needed ({self.identity.latent_channels}, t, h, w) twice"
            )
        shape = list(mean.shape)
        name = f"latents_{'x'.join(map(str, shape))}.bin"
        record: dict[str, Any] = {
            "position": window.position,
            "key": window.key,
            "kind": window.view.kind,
            "width": window.view.width,
            "height": window.view.height,
            "frames": window.view.num_frames,
            "fps": window.fps,
            "caption": caption,
            "file": str((self.part / name).relative_to(self.directory)),
            "shape": shape,
        }
        record["row"] = self._rows(record).append(_to_bytes(torch.stack([mean, logvar]), self.identity.dtype))
        self._record(record)
        self._done.add(window.position)

    def skip(self, window: Window, *, cause: str, message: str) -> None:
        """Record a window that cannot be cached.

        Args:
            window: The window.
            cause: Short name of the cause.
            message: What was found.
        """
        self._record({"position": window.position, "key": window.key, "cause": cause, "message": message})
        self._done.add(window.position)

    def missing_texts(self, captions: Sequence[str]) -> list[str]:
        """List the captions, each once, that this process has no embedding of yet; "" is the null text."""
        return [caption for caption in dict.fromkeys(captions) if caption not in self._texts]

    def add_text(self, caption: str, embedding: Tensor, mask: Tensor) -> None:
        """Append the embedding of a caption; masked-out tokens are not stored.

        Args:
            caption: The caption; "" is the null text, which every cache with text needs.
            embedding: ``(n, d)``.
            mask: bool ``(n,)``, True = token.
        """
        tokens = embedding[mask.bool()]
        record: dict[str, Any] = {
            "text": caption,
            "file": str((self.part / "text.bin").relative_to(self.directory)),
            "shape": [int(embedding.shape[1])],
            "tokens": int(tokens.shape[0]),
        }
        record["row"] = self._rows(record).append(_to_bytes(tokens, self.identity.dtype))
        self._record(record)
        self._texts.add(caption)

    def close(self) -> None:
        """Flush this process's part to the disk."""
        for rows in self._files.values():
            rows.close()
        os.fsync(self._log.fileno())
        self._log.close()


def finish_cache(directory: str | Path) -> dict[str, Any]:
    """Join the parts of all processes once each has closed its writer; one process calls this.

    Args:
        directory: The cache.

    Returns:
        The manifest.

    Raises:
        ConfigError: If windows or embeddings are missing; says how many.
    """
    directory = Path(directory)
    manifest = json.loads((directory / "writing.json").read_text("utf-8"))
    found: dict[int, dict[str, Any]] = {}
    texts: dict[str, dict[str, Any]] = {}
    for part in sorted((directory / "parts").iterdir()):
        for record in read_lines(part / "records.jsonl"):
            if "text" in record:
                texts.setdefault(record["text"], record)
            else:
                found.setdefault(record["position"], record)
    records = [found[position] for position in sorted(found)]
    entries = [record for record in records if "file" in record]
    bad = [record for record in records if "file" not in record]
    if len(records) < manifest["windows"]:
        raise ConfigError(
            f"out: {directory} has {len(records)} of {manifest['windows']} windows; run the command again"
        )
    if manifest["text_encoder"] is not None:
        missing = {"", *(entry["caption"] for entry in entries)} - texts.keys()
        if missing:
            raise ConfigError(f"out: {directory} lacks {len(missing)} text embeddings; run the command again")
    for name, rows in (("entries", entries), ("texts", list(texts.values())), ("bad", bad)):
        write_bytes(directory / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    manifest["counts"] = {
        "windows": len(entries),
        "bad": len(bad),
        "captions": len(texts),
        "text_tokens": max((text["tokens"] for text in texts.values()), default=0),
        "text_dim": next((text["shape"][0] for text in texts.values()), 0),
    }
    write_bytes(directory / "manifest.json", json.dumps(manifest, indent=1).encode())
    return dict(manifest)
