"""The latent cache: raw posterior means and log-variances, and text embeddings, on disk at a fixed stride.

A cache is a directory. Each writing process appends to a part of its own: one file of rows per latent shape, one of
text tokens, and a line of ``records.jsonl`` after each row, so that a killed job goes on where it stopped, with any
number of processes. Joining the parts writes what the windows are as columns (``columns/``) and, last,
``manifest.json``, without which nothing reads the cache. ``ltd.data.latent_writer`` writes the parts,
``ltd.data.latent_join`` joins them; here are the format, its check and the reader. Knows no models, only hashes.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ltd.config import ConfigError, digest
from ltd.data.buffers import Buffers
from ltd.data.entries import Entries, Strings
from ltd.data.index import Index
from ltd.data.row_file import RowFile
from ltd.data.transforms import FILTER

FORMAT = 3
#: Formats that are read; 2 has neither labels nor where a window was cut.
READ_FORMATS = (2, 3)
#: Columns of where windows were cut, as ``Sample.geometry``.
GEOMETRY = ("source_height", "source_width", "crop_top", "crop_left")
Dtype = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: torch copies whole rows as integers; numpy has no bf16.
RAW = {"bf16": np.int16, "fp16": np.int16, "fp32": np.int32}
#: Names of the rules by which the running code turns media into windows. Change a name with the rule.
RULES = {"filter": FILTER, "crop": "largest part, centre", "windows": "evenly spread, centred"}
_COMMAND = "python tools/cache_latents.py CONFIG"


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """Everything the numbers in a cache depend on; a cache of another identity is stale."""

    autoencoder_hash: str  #: Hash of the autoencoder's configuration and weights.
    compression: tuple[int, int, int]  #: Pixels per latent cell along (t, h, w).
    latent_channels: int  #: Channels of the latents.
    data_digest: str  #: ``Index.digest`` of the shards.
    transforms: dict[str, Any]  #: Views, flip, window step, precision: whatever was chosen for the pixels.
    text_encoder: str | None = None  #: Name of the text encoder; None for a cache without text.
    text_encoder_hash: str | None = None  #: Hash of its configuration and weights.
    #: (tokens, channels) of each of several text encoders joined along tokens; () else.
    text_parts: tuple[tuple[int, int], ...] = ()
    dtype: Dtype = "bf16"  #: Stored precision of latents, embeddings and features.
    features: dict[str, Any] | None = None  #: Vision network whose features are stored too, and the frames it saw.
    rules: dict[str, str] = field(default_factory=lambda: dict(RULES))  #: ``RULES`` of the code that wrote it.

    @property
    def digest(self) -> str:
        """sha256 of all fields; without features and parts of the text the same as before there were any."""
        fields = asdict(self)
        if not self.text_parts:
            del fields["text_parts"]
        if self.features is None:
            del fields["features"]
        return digest(fields)


@dataclass(frozen=True, kw_only=True)
class CachedRows:
    """Windows of one latent shape, in the stored precision."""

    mean: Tensor  #: (b, c, t, h, w), raw latents.
    logvar: Tensor  #: (b, c, t, h, w).
    captions: tuple[str, ...]  #: Caption of each window, "" where it has none.
    fps: Tensor  #: float32 (b,); frames per second, 0 for images and where unknown.
    caption_columns: tuple[int, ...]  #: Which of its captions each window has, from 0.
    geometry: Tensor  #: float32 (b, 4), as ``Sample.geometry``.
    text: Tensor | None = None  #: (b, n, d), zero where masked out; None in a cache without text.
    text_mask: Tensor | None = None  #: bool (b, n), True = token.
    features: Tensor | None = None  #: (b, d, t, h', w'), one map per latent frame; None where not asked for.


def is_cache(path: str | Path) -> bool:
    """Say whether a directory is a latent cache, finished or not."""
    with suppress(OSError):  # a pattern may be longer than a file's name can be
        return any((Path(path) / name).is_file() for name in ("manifest.json", "writing.json"))
    return False


def read_cache_manifest(directory: str | Path) -> dict[str, Any]:
    """Read the manifest of a finished cache.

    Args:
        directory: The cache.

    Returns:
        The fields of ``CacheIdentity`` with ``format``, ``identity``, ``shards``, ``files`` and ``counts``.

    Raises:
        ConfigError: If the cache is missing, unfinished or of another format.
    """
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        what = f"is not finished: run {_COMMAND} again" if is_cache(directory) else "is no latent cache"
        raise ConfigError(f"data.shards: {directory} {what}")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"data.shards: {path} is not a cache manifest: {error}") from error
    if found not in READ_FORMATS:
        raise ConfigError(
            f"data.shards: {directory} is a latent cache of format {found}, needed {FORMAT} or {READ_FORMATS[0]}; make "
            f"it again in another directory: {_COMMAND}"
        )
    return dict(manifest)


def check_cache(manifest: Mapping[str, Any], **expected: Any) -> None:
    """Refuse a stale cache: one made by other window rules than the running code's, or with another field.

    Args:
        manifest: Manifest of the cache.
        **expected: Fields of ``CacheIdentity`` with the values that training has now.

    Raises:
        ConfigError: If a field differs; names it and both values.
        TypeError: If an expected name is no field of ``CacheIdentity``.
    """
    for name, wanted in {"rules": RULES, **expected}.items():
        if name not in CacheIdentity.__dataclass_fields__:
            raise TypeError(f"check_cache: {name!r} is no field of CacheIdentity")
        found, wanted = (json.loads(json.dumps(value)) for value in (manifest.get(name), wanted))
        if isinstance(found, dict) and isinstance(wanted, dict):
            changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
            differences = [(f"{name}.{key}", found.get(key), wanted.get(key)) for key in changed]
        else:
            differences = [(name, found, wanted)] if found != wanted else []
        if differences:
            pairs = "; ".join(f"made with {name} = {old}, but this run has {new}" for name, old, new in differences)
            raise ConfigError(
                f"data.shards: the latent cache was {pairs}; make it again in another directory: {_COMMAND} "
                "(or point data.shards at the cache that belongs to this run)"
            )


def check_source(manifest: Mapping[str, Any]) -> bool:
    """Refuse a cache whose tars have changed since, where they still lie where they were.

    Args:
        manifest: Manifest of the cache.

    Returns:
        Whether it could be told: False where tars are gone, remote, or were not recorded.

    Raises:
        ConfigError: If the tars hold other samples now.
    """
    shards = [str(shard) for shard in manifest.get("shards", ())]
    if not shards or not all(Path(shard).is_file() for shard in shards):
        return False
    check_cache(manifest, data_digest=Index(shards).digest)
    return True


def read_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Read the whole lines of a JSONL file that may end in half a line.

    Args:
        path: The file; may be missing.
        offset: Byte to start at, the begin of a line.

    Returns:
        The lines; the byte after the last whole one.
    """
    if not path.is_file():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    end = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:end].splitlines()], offset + end


class LatentCache:
    """Read a finished cache by memory map, from any number of threads.

    Args:
        directory: The cache.

    Raises:
        ConfigError: If it is unfinished, empty, damaged, or a file is shorter than its records say.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_cache_manifest(directory)
        counts = self.manifest["counts"]
        self.channels = int(self.manifest["latent_channels"])
        self.text_tokens, self.text_dim = int(counts["text_tokens"]), int(counts["text_dim"])
        self.dtype = DTYPES[self.manifest["dtype"]]  #: Stored precision.
        self._buffers = Buffers()
        self._raw = np.dtype(RAW[self.manifest["dtype"]])
        if not counts["windows"]:
            raise ConfigError(f"data.shards: the latent cache {directory} holds no windows")
        try:
            self._open_columns(counts["windows"])
            self._files = [self._open(file, (2, *file["shape"])) for file in self.manifest["files"]]
            self._text_files = [self._open(file, (self.text_dim,)) for file in self.manifest["text_files"]]
            shapes = [file["shape"] for file in self.manifest["files"]]
            self._features = self._open_features()
        except ConfigError:
            raise
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise ConfigError(
                f"data.shards: the latent cache {directory} is damaged ({error}); make it again"
            ) from None
        # Mean and log-variance are rows of their own: both come out whole, by one gather.
        self._latents = [file.rows.reshape(-1, *shape) for file, shape in zip(self._files, shapes, strict=True)]
        self._shapes = np.array(shapes, dtype=np.int32)
        self._rows = np.array([file["rows"] for file in self.manifest["files"]], dtype=np.int64)
        #: int32 ``(n, 3)``, size (t, h, w) of each window's latents.
        self.latent_shapes = self._shapes[:, 1:][self._file]

    def _open_columns(self, count: int) -> None:
        column = self._column
        self._file, self._row, self._fps = column("file"), column("row"), column("fps")
        self._captions, chars = column("captions"), column("caption_chars")
        self._caption_text, self._caption_weight = column("caption_text"), column("caption_weight")
        self._caption_ends = np.cumsum(self._captions, dtype=np.int64)
        names = ("kind", "frames", "height", "width")
        columns = {name: column(name) for name in names} | {"fps": self._fps, "captions": self._captions}
        columns |= {"caption_chars": chars, "shard": np.arange(count, dtype=np.int32)}
        classes: list[str] = []
        self._geometry = np.full((count, len(GEOMETRY)), np.nan, dtype=np.float32)
        if self.manifest["format"] != READ_FORMATS[0]:
            classes = [str(name) for name in self.manifest["classes"]]
            columns |= {name: column(name) for name in ("label", "class_name")}
            self._geometry = np.stack([column(name) for name in GEOMETRY], axis=1)
            if len(self._geometry) != count or not (columns["class_name"] < len(classes)).all():
                raise ValueError("the columns of labels and cuts do not fit the others")
        keys, self._strings = self._open_strings("keys"), self._open_strings("texts")
        if self.manifest["text_files"]:
            self._text_place = tuple(column(f"text_{name}") for name in ("file", "row", "tokens"))
            self._open_text_parts()
        lengths = {len(values) for name, values in columns.items() if name != "caption_chars"} | {len(keys)}
        if lengths | {len(self._file), len(self._row)} != {count}:
            raise ValueError(f"the columns have {sorted(lengths)} rows, needed {count}")
        #: What the windows are, one entry each; ``shard`` is the number ``load`` takes.
        self.entries = Entries(keys, columns, classes)

    def _open_text_parts(self) -> None:
        """Find where the tokens of each text go, of several encoders that have a stretch each."""
        lengths = [int(tokens) for tokens, _ in self.manifest.get("text_parts", ())]
        self._text_begins = np.cumsum([0, *lengths[:-1]])
        self._text_counts = self._column("text_parts") if lengths else None
        if self._text_counts is not None and (
            self._text_counts.shape != (len(self._text_place[0]), len(lengths))
            or (self._text_counts > lengths).any()
            or (self._text_counts.sum(1) != self._text_place[2]).any()
        ):
            raise ValueError("the tokens of several text encoders do not fit the texts")

    def _column(self, name: str) -> np.ndarray:
        # As a plain array: indexing a memmap object costs several times as much.
        path = self.directory / "columns" / f"{name}.npy"
        return cast("np.ndarray", np.load(path, mmap_mode="r")).view(np.ndarray)

    def _open_strings(self, name: str) -> Strings:
        ends, path = self._column(f"{name}_ends"), self.directory / "columns" / f"{name}.bin"
        size = path.stat().st_size
        if size != int(ends[-1]):
            raise ValueError(f"{path} has {size} bytes, needed {ends[-1]}")
        if not size:
            return Strings(b"", ends)
        with path.open("rb") as file:  # slices of a map are bytes
            return Strings(cast("bytes", mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), ends)

    def _open(self, file: Mapping[str, Any], shape: Sequence[int]) -> RowFile:
        return RowFile(self.directory / file["path"], num_rows=int(file["rows"]), shape=shape, dtype=self._raw)

    def _open_features(self) -> list[RowFile]:
        if self.manifest.get("features") is None:
            return []
        files = self.manifest["files"]
        return [self._open({**file["features"], "rows": file["rows"]}, file["features"]["shape"]) for file in files]

    @property
    def num_features(self) -> int | None:
        """Channels of the stored features; None in a cache without."""
        return int(self._features[0].rows.shape[1]) if self._features else None

    def features_shape(self, row: int) -> tuple[int, ...]:
        """Tell the size (d, t, h, w) of a window's features, in a cache that has some."""
        return tuple(self._features[int(self._file[row])].rows.shape[1:])

    @property
    def num_windows(self) -> int:
        """How many windows the cache holds."""
        return len(self.entries)

    def load(
        self, rows: np.ndarray, caption_uniform: np.ndarray | None = None, *, features: bool = False
    ) -> CachedRows:
        """Read windows of one latent shape in one go.

        Args:
            rows: int ``(b,)``, numbers of windows, each in [0, num_windows).
            caption_uniform: ``(b,)``, each in [0, 1); chooses among the weighted captions of a window. None takes the
                first.
            features: Whether to read the features too, in a cache that has some.

        Returns:
            The windows, in the order given.

        Raises:
            IndexError: If there is no such window.
            ValueError: If the windows differ in latent shape.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and rows.min() < 0:
            raise IndexError(f"rows: got {rows.min()}, needed 0 <= row < {self.num_windows}")
        latents = self._gather(self._file[rows], self._row[rows])
        ids, columns = self._choose(rows, caption_uniform)
        text, mask = self._gather_text(ids)
        return CachedRows(
            mean=latents[0],
            logvar=latents[1],
            captions=self._captions_of(ids),
            fps=torch.from_numpy(self._fps[rows].astype(np.float32)),
            caption_columns=tuple(columns.tolist()),
            geometry=torch.from_numpy(self._geometry[rows]),
            text=text,
            text_mask=mask,
            features=self._gather_features(self._file[rows], self._row[rows]) if features else None,
        )

    def _gather_features(self, files: np.ndarray, rows: np.ndarray) -> Tensor:
        """Read the features of windows whose latents were read, ``(b, d, t, h, w)``."""
        _fetch(self._features, files, rows)
        out = self._buffers.take((len(rows), *self._features[int(files[0])].rows.shape[1:]), self._raw)
        for place, (file, row) in enumerate(zip(files.tolist(), rows.tolist(), strict=True)):
            out[place] = self._features[file].rows[row]
        return torch.from_numpy(out).view(self.dtype)

    def _gather(self, files: np.ndarray, rows: np.ndarray) -> Tensor:
        """Read rows of latents, ``(2, b, c, t, h, w)``: all means, then all log-variances."""
        first = int(files[0]) if len(files) else 0
        one_file = bool((files == first).all())
        shape = self._shapes[first]
        if not one_file and (self._shapes[files] != shape).any():
            raise ValueError("rows: got windows of more than one latent shape, needed one shape a call")
        if (rows >= (self._rows[first] if one_file else self._rows[files])).any():
            raise ConfigError(f"data.shards: the latent cache {self.directory} is damaged: a row is not in its file")
        _fetch(self._files, files, rows)
        out = self._buffers.take((2, len(rows), *shape.tolist()), self._raw)
        if one_file:
            places = np.concatenate([2 * rows, 2 * rows + 1])
            # "clip" writes into ``out`` at once, "raise" would buffer it; the rows are checked above.
            np.take(self._latents[first], places, axis=0, out=out.reshape(-1, *out.shape[2:]), mode="clip")
        else:
            for place, (file, row) in enumerate(zip(files.tolist(), rows.tolist(), strict=True)):
                out[:, place] = self._latents[file][2 * row : 2 * row + 2]
        return torch.from_numpy(out).view(self.dtype)

    def _choose(self, rows: np.ndarray, uniform: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Choose a caption of each window.

        Returns its number among the texts, 0 (the null text) where it has none; and which of the window's it is.
        """
        counts = self._captions[rows]
        begins = self._caption_ends[rows] - counts
        firsts = begins.copy()
        if uniform is not None and (counts > 1).any():
            for place in np.flatnonzero(counts > 1).tolist():
                begin = int(firsts[place])
                edges = np.cumsum(self._caption_weight[begin : begin + int(counts[place])])
                chosen = int(np.searchsorted(edges, uniform[place] * edges[-1], side="right"))
                firsts[place] += min(chosen, len(edges) - 1)
        if counts.all():
            return self._caption_text[firsts].astype(np.int64), firsts - begins
        ids = np.zeros(len(rows), dtype=np.int64)
        ids[counts > 0] = self._caption_text[firsts[counts > 0]]
        return ids, firsts - begins

    def _captions_of(self, ids: np.ndarray) -> tuple[str, ...]:
        buffer, ends = self._strings.buffer, self._strings.ends
        begins = np.where(ids > 0, ends[ids - 1], 0).tolist()
        pairs = zip(begins, ends[ids].tolist(), strict=True)
        return tuple([buffer[begin:end].decode("utf-8", "surrogateescape") for begin, end in pairs])

    def _gather_text(self, ids: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
        if not self._text_files:
            return None, None
        out = self._buffers.take((len(ids), self.text_tokens, self.text_dim), self._raw)
        file, row, tokens = (column[ids] for column in self._text_place)
        _fetch(self._text_files, file, row, tokens)
        for place, (number, begin, count) in enumerate(zip(file.tolist(), row.tolist(), tokens.tolist(), strict=True)):
            out[place, :count] = self._text_files[number].rows[begin : begin + count]
            out[place, count:] = 0
        mask = np.arange(self.text_tokens) < tokens[:, None]
        if self._text_counts is not None:
            self._spread(out, mask, self._text_counts[ids])
        return torch.from_numpy(out).view(self.dtype), torch.from_numpy(mask)

    def _spread(self, text: np.ndarray, mask: np.ndarray, counts: np.ndarray) -> None:
        """Move the tokens of each encoder from behind one another to the begin of its stretch."""
        for row, kept, numbers in zip(text, mask, counts.tolist(), strict=True):
            stored = row.copy()
            row[:], kept[:], end = 0, False, 0
            for begin, count in zip(self._text_begins.tolist(), numbers, strict=True):
                row[begin : begin + count] = stored[end : end + count]
                kept[begin : begin + count] = True
                end += count

    def blank_text(self) -> tuple[Tensor | None, Tensor | None]:
        """Make zeros of the size of an embedding and its mask; None in a cache without text."""
        if not self._text_files:
            return None, None
        text = torch.zeros(self.text_tokens, self.text_dim, dtype=self.dtype)
        return text, torch.zeros(self.text_tokens, dtype=torch.bool)

    def text(self, caption: str) -> tuple[Tensor | None, Tensor | None]:
        """Read the embedding of a caption; "" is the null text, and found at once.

        Args:
            caption: A caption of the cache.

        Returns:
            ``(n, d)`` float32 padded with zeros, and bool ``(n,)``; None twice in a cache without text.
        """
        if not self._text_files:
            return None, None
        text, mask = self._gather_text(np.array([self._strings.index(caption)]))
        assert text is not None and mask is not None
        return text[0].float(), mask[0]


def _fetch(files: Sequence[RowFile], numbers: np.ndarray, rows: np.ndarray, counts: np.ndarray | None = None) -> None:
    """Ask for all rows of a batch at once where they do not seem to be in memory; the first and last stand for all."""
    if all(files[int(numbers[place])].in_memory(int(rows[place])) for place in ((0, -1) if len(rows) else ())):
        return
    spans = zip(numbers.tolist(), rows.tolist(), [1] * len(rows) if counts is None else counts.tolist(), strict=True)
    for number, row, count in spans:
        files[number].request(row, count)
