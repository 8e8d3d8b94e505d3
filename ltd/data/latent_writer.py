"""Write the parts of a latent cache that ``ltd.data.latents`` reads: resumable, for any number of processes.

Knows no models: windows, hashes and tensors are handed in. ``ltd.data.latent_join`` makes one cache of the parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ltd.config import ConfigError, digest
from ltd.data.latents import DTYPES, FORMAT, READ_FORMATS, CacheIdentity, read_lines
from ltd.data.windows import Window, Windows
from ltd.data.write import write_bytes

#: Seconds between looks at what the other processes have embedded.
_REFRESH_S = 10.0


def _to_bytes(tensor: Tensor, dtype: str, what: str) -> bytes:
    stored = tensor.detach().cpu().to(DTYPES[dtype]).contiguous()
    if not torch.isfinite(stored).all():
        raise ConfigError(
            f"dtype: got {dtype}, which ends at {torch.finfo(DTYPES[dtype]).max:.6g}, but {what} reach "
            f"{float(tensor.abs().max()):.6g}; needed dtype: {'bf16' if dtype == 'fp16' else 'fp32'}"
        )
    return stored.view(torch.int32 if dtype == "fp32" else torch.int16).numpy().tobytes()


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
        shards: The tars that the windows were listed from, kept in the manifest.

    A directory that holds a cache of another identity, or something else, is refused with a ``ConfigError``.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: CacheIdentity,
        windows: Windows,
        *,
        global_rank: int = 0,
        world_size: int = 1,
        shards: Sequence[str] = (),
    ) -> None:
        self.directory, self.identity, self.windows = Path(directory), identity, windows
        self.global_rank, self.world_size = global_rank, world_size
        self._begin(shards)
        self.part = self.directory / "parts" / f"{global_rank:05d}-of-{world_size:05d}"
        self._files: dict[str, _Rows] = {}
        self._done = np.zeros(int(windows.positions.max(initial=-1)) + 1, dtype=bool)
        self.num_done = 0  #: Windows that all processes have done, as of the last look at the others.
        self._texts: set[str] = set()
        self._read: dict[Path, int] = {}  # bytes seen of the records of each part
        self._refreshed_s = -float("inf")
        self._log: IO[bytes] | None = None
        if self.complete:
            self._done[:] = True
            return
        self.part.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.refresh()
        self._log = (self.part / "records.jsonl").open("ab")

    def _begin(self, shards: Sequence[str]) -> None:
        marker = self.directory / "writing.json"
        keys = hashlib.sha256()
        for window in self.windows:
            keys.update(f"{window.key}\n".encode("utf-8", "surrogateescape"))
        plan = {
            "format": FORMAT,
            **asdict(self.identity),
            "identity": digest({"of": self.identity.digest, "keys": keys.hexdigest()}),
            "windows": len(self.windows),
        }
        # Another process of this job may be writing the marker at this moment.
        foreign = [p for p in self.directory.glob("*") if not p.name.startswith(marker.name)]
        if foreign and not marker.is_file():
            raise ConfigError(f"out: {self.directory} is not empty and holds no latent cache; choose another directory")
        if marker.is_file():
            found = json.loads(marker.read_text("utf-8"))
            found.setdefault("text_parts", [])
            names = [n for n in plan if found.get(n) != json.loads(json.dumps(plan[n]))]
            if names == ["format"] and found["format"] in READ_FORMATS:
                return  # begun by an earlier release: it is finished, and read, in that format
            if names:
                raise ConfigError(
                    f"out: {self.directory} holds a cache that differs in {', '.join(names)}; "
                    "delete it or choose another directory"
                )
        else:
            write_bytes(marker, json.dumps({**plan, "shards": list(shards)}, indent=1).encode())

    def _resume(self) -> None:
        """Go on behind the last whole record of this process's part."""
        path = self.part / "records.jsonl"
        records, end = read_lines(path)
        if path.is_file():
            os.truncate(path, end)
        self._read[path] = end
        for record in records:
            self._know(record)
            if "file" in record:
                self._rows(record).count = record["row"] + record.get("tokens", 1)
                if "features" in record:
                    self._feature_rows(record).count = record["row"] + 1

    def _know(self, record: Mapping[str, Any]) -> None:
        if "text" in record:
            self._texts.add(record["text"])
        # What could not be read is tried again by the next run of the command.
        elif not self._done[record["position"]] and record.get("cause") != "unreadable":
            self._done[record["position"]] = True
            self.num_done += 1

    def refresh(self, *, every_s: float = 0.0) -> None:
        """Read what the other processes, and earlier runs, have recorded since the last look.

        Args:
            every_s: Seconds since the last look within which nothing is done.
        """
        if time.monotonic() - self._refreshed_s < every_s:
            return
        mine = self.part / "records.jsonl"
        for path in sorted((self.directory / "parts").glob("*/records.jsonl")):
            if path == mine:
                continue
            records, self._read[path] = read_lines(path, self._read.get(path, 0))
            for record in records:
                self._know(record)
        self._refreshed_s = time.monotonic()

    def _feature_rows(self, record: Mapping[str, Any]) -> _Rows:
        """Find the file of features whose rows are those of the record's file of latents."""
        path, shape = record["features"]["path"], record["features"]["shape"]
        size = int(np.prod(shape)) * DTYPES[self.identity.dtype].itemsize
        rows = self._files.setdefault(path, _Rows(self.directory / path, size))
        if rows.row_bytes != size:
            raise ValueError(f"features of {record['key']}: got {shape}, other windows of {path} have another size")
        return rows

    def _rows(self, record: Mapping[str, Any]) -> _Rows:
        if record["file"] not in self._files:
            itemsize = DTYPES[self.identity.dtype].itemsize
            size = int(np.prod(record["shape"])) * itemsize * (1 if "text" in record else 2)
            self._files[record["file"]] = _Rows(self.directory / record["file"], size)
        return self._files[record["file"]]

    def _record(self, record: Mapping[str, Any]) -> None:
        assert self._log is not None, "the cache is complete or closed"
        self._log.write(json.dumps(record).encode() + b"\n")
        self._log.flush()
        self._know(record)

    @property
    def complete(self) -> bool:
        """Whether the cache is finished."""
        return (self.directory / "manifest.json").is_file()

    def pending(self) -> Windows:
        """List the windows of this process's share that no run has done yet."""
        share = self.windows[self.global_rank :: self.world_size]
        return share.take(~self._done[share.positions])

    def add(
        self,
        window: Window,
        *,
        captions: Sequence[tuple[str, float]] = (),
        mean: Tensor,
        logvar: Tensor,
        features: Tensor | None = None,
    ) -> bool:
        """Append a window; one whose latents or features are not finite is recorded as skipped.

        Args:
            window: The window.
            captions: Its captions with their weights; () for none.
            mean: ``(c, t, h, w)``, raw latents.
            logvar: ``(c, t, h, w)``.
            features: ``(d, t, h', w')``, one map per latent frame; given where the identity has features.

        Returns:
            Whether it was stored.

        Raises:
            ValueError: If the latents have other channels than the identity says, or differ in shape; or features are
                missing, not wanted, or of another number of frames. Values beyond the stored precision give a
                ``ConfigError``.
        """
        self._check(window, mean, logvar, features)
        values = torch.stack([mean, logvar])
        if not torch.isfinite(values).all():
            self.skip(window, cause="not_finite", message="the autoencoder gave NaN or infinity")
            return False
        if features is not None and not torch.isfinite(features).all():
            self.skip(window, cause="not_finite", message="the vision network gave NaN or infinity")
            return False
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
            "captions": [[text, weight] for text, weight in captions],
            "label": window.entry.label,
            "class": window.entry.class_name,
            "geometry": window.geometry,
            "file": str((self.part / name).relative_to(self.directory)),
            "shape": shape,
        }
        data = _to_bytes(values, self.identity.dtype, f"the latents of {window.key}")
        if features is not None:
            path = str((self.part / f"features_{'x'.join(map(str, shape))}.bin").relative_to(self.directory))
            record["features"] = {"path": path, "shape": list(features.shape)}
            rows = self._feature_rows(record)
            rows.append(_to_bytes(features, self.identity.dtype, f"the features of {window.key}"))
        record["row"] = self._rows(record).append(data)
        self._record(record)
        return True

    def _check(self, window: Window, mean: Tensor, logvar: Tensor, features: Tensor | None) -> None:
        if mean.shape != logvar.shape or mean.ndim != 4 or mean.shape[0] != self.identity.latent_channels:
            raise ValueError(
                f"latents of {window.key}: got mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)}, "
                f"needed ({self.identity.latent_channels}, t, h, w) twice"
            )
        if (features is None) != (self.identity.features is None) or (
            features is not None and (features.ndim != 4 or features.shape[1] != mean.shape[1])
        ):
            got = None if features is None else tuple(features.shape)
            wanted = None if self.identity.features is None else f"(d, {mean.shape[1]}, h, w)"
            raise ValueError(f"features of {window.key}: got {got}, needed {wanted}")

    def skip(self, window: Window, *, cause: str, message: str) -> None:
        """Record a window that cannot be cached.

        Args:
            window: The window.
            cause: Short name of the cause; windows that are ``"unreadable"`` are tried again by the next run.
            message: What was found.
        """
        self._record({"position": window.position, "key": window.key, "cause": cause, "message": message})

    def missing_texts(self, captions: Sequence[str]) -> list[str]:
        """List the captions, each once, that no process is known to have embedded; "" is the null text."""
        if self.world_size > 1:
            self.refresh(every_s=_REFRESH_S)
        return [caption for caption in dict.fromkeys(captions) if caption not in self._texts]

    def add_text(self, caption: str, embedding: Tensor, mask: Tensor) -> None:
        """Append the embedding of a caption; masked-out tokens are not stored.

        Args:
            caption: The caption; "" is the null text, which every cache with text needs.
            embedding: ``(n, d)``.
            mask: bool ``(n,)``, True = token.

        Raises:
            ConfigError: If values of the embedding are not finite in the stored precision.
        """
        tokens = embedding[mask.bool()]
        if not torch.isfinite(tokens).all():
            raise ConfigError(f"text: the text encoder gave NaN or infinity for {caption!r}; needed finite embeddings")
        record: dict[str, Any] = {
            "text": caption,
            "file": str((self.part / "text.bin").relative_to(self.directory)),
            "shape": [int(embedding.shape[1])],
            "tokens": int(tokens.shape[0]),
        }
        lengths = [length for length, _ in self.identity.text_parts]
        if lengths:
            record["parts"] = [int(part.sum()) for part in mask.bool().split(lengths)]
        data = _to_bytes(tokens, self.identity.dtype, f"the embedding of {caption!r}")
        record["row"] = self._rows(record).append(data)
        self._record(record)

    def close(self) -> None:
        """Flush this process's part to the disk."""
        for rows in self._files.values():
            rows.close()
        if self._log is not None:
            os.fsync(self._log.fileno())
            self._log.close()
            self._log = None
