"""Index of WebDataset tars: where every sample's bytes lie and what they hold, so that tars are read at random.

Beside ``name.tar`` stands ``name.tar.index.jsonl``: a header line (format, size of the tar, samples that were left out
and why) and one line per sample. Nothing in a tar ever touches the file system: members are only read into memory.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ltd.config import ConfigError, digest
from ltd.data.batch import BadSample, BadSampleError
from ltd.data.decode import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, probe
from ltd.data.write import write_bytes

logger = logging.getLogger(__name__)

FORMAT = 1
_SUFFIX = ".index.jsonl"
_COMMAND = "python tools/make_shards.py --index-only {}"


@dataclass(frozen=True)
class Entry:
    """One sample of a tar or of a latent cache."""

    key: str  #: Key; the members' common name up to the first dot.
    kind: Literal["image", "video"]  #: Kind of sample.
    width: int  #: Pixels.
    height: int  #: Pixels.
    frames: int  #: Frames; 1 for an image.
    fps: float  #: Frames per second; 0 for an image and where unknown.
    caption_chars: int | None  #: Characters of the caption; None where there is no caption member.
    members: dict[str, tuple[int, int]]  #: Extension -> (offset, size) in the tar, bytes.
    shard: int = 0  #: Number of the tar in ``Index.shards``.

    @property
    def media(self) -> str:
        """Extension of the media member."""
        return next(ext for ext in self.members if ext in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS)


def index_path(tar: str | Path) -> Path:
    """Name the index file of a tar."""
    return Path(f"{tar}{_SUFFIX}")


def _safe(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and name.isprintable() and not name.startswith("/") and ".." not in parts and "\\" not in name


class _Scan:
    """Samples and rejects of one tar while it is read."""

    def __init__(self, tar: Path) -> None:
        self.tar = tar
        self.samples: dict[str, dict[str, tuple[int, int]]] = {}
        self.bad: list[BadSample] = []

    def reject(self, key: str, cause: str, message: str) -> None:
        printable = key.encode("utf-8", "backslashreplace").decode()
        self.bad.append(BadSample(key=printable, shard=str(self.tar), cause=cause, message=message))

    def add(self, member: tarfile.TarInfo) -> None:
        name = member.name.removeprefix("./")
        if member.isdir():
            return
        if not member.isreg():
            self.reject(name, "unsafe_name", "a link or special file, which is never followed")
        elif not _safe(name):
            self.reject(name, "unsafe_name", "its name leaves the archive or is not printable text")
        else:
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            members = self.samples.setdefault(key, {})
            if extension.lower() in members:
                self.reject(key, "duplicate", f"a second member {extension!r} of the same key; the first is kept")
            else:
                members[extension.lower()] = (member.offset_data, member.size)


def _scan(tar: Path) -> _Scan:
    scan = _Scan(tar)
    size = tar.stat().st_size
    if size == 0:
        raise ConfigError(f"data.shards: {tar} has zero bytes; needed a tar of samples")
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.offset_data + member.size > size:
                    scan.reject(member.name, "truncated", f"the tar ends inside this member, at byte {size}")
                    break
                scan.add(member)
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if not scan.samples:
            raise ConfigError(
                f"data.shards: {tar} is not a plain tar: {error}; needed an uncompressed tar (for random access)"
            ) from error
        scan.reject("", "truncated", f"the tar breaks off: {error}")
    return scan


def _inspect(key: str, members: dict[str, tuple[int, int]], read: Callable[[str], bytes]) -> Entry:
    media = [ext for ext in members if ext in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS]
    if not media:
        raise BadSampleError("no_media", f"no image or video among its members: {', '.join(members)}")
    if len(media) > 1:
        raise BadSampleError("duplicate", f"more than one medium: {', '.join(media)}")
    info = probe(read(media[0]), media[0])
    caption_chars = None
    if "txt" in members:
        caption_chars = len(decode_caption(read("txt")))
    wanted = {ext: place for ext, place in members.items() if ext in (media[0], "txt", "json")}
    return Entry(key, info.kind, info.width, info.height, info.frames, info.fps, caption_chars, wanted)


def decode_caption(data: bytes) -> str:
    """Decode a caption member.

    Args:
        data: Its bytes.

    Returns:
        The text without surrounding white space.

    Raises:
        BadSampleError: If it is not UTF-8.
    """
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError("caption_not_utf8", f"caption is not UTF-8: {error}") from error


def index_tar(tar: str | Path) -> tuple[list[Entry], list[BadSample]]:
    """Read a tar once, probe every sample and write the index beside it.

    Args:
        tar: An uncompressed tar.

    Returns:
        The usable samples in tar order, and a record of each that was left out.

    Raises:
        ConfigError: If the file is missing, empty or no plain tar.
    """
    tar = Path(tar)
    if not tar.is_file():
        raise ConfigError(f"data.shards: {tar} does not exist")
    scan = _scan(tar)
    entries: list[Entry] = []
    with tar.open("rb") as file:

        def read(key: str, extension: str) -> bytes:
            offset, size = scan.samples[key][extension]
            file.seek(offset)
            return file.read(size)

        for key, members in scan.samples.items():
            try:
                entries.append(_inspect(key, members, lambda extension, key=key: read(key, extension)))  # type: ignore[misc]
            except BadSampleError as error:
                scan.reject(key, error.cause, str(error))
            except Exception as error:  # a decoder's own surprise must not lose the other samples
                scan.reject(key, "undecodable", f"{type(error).__name__}: {error}")
    header = {"format": FORMAT, "tar": tar.name, "bytes": tar.stat().st_size, "samples": len(entries)}
    header["bad"] = [{"key": b.key, "cause": b.cause, "message": b.message} for b in scan.bad]
    lines = [json.dumps(header)] + [json.dumps(_to_record(entry)) for entry in entries]
    write_bytes(index_path(tar), ("\n".join(lines) + "\n").encode())
    return entries, scan.bad


def _to_record(entry: Entry) -> dict[str, Any]:
    record = asdict(entry)
    record.pop("shard")
    return record


def read_index(tar: str | Path) -> tuple[list[Entry], list[BadSample]]:
    """Read the index beside a tar.

    Args:
        tar: The tar.

    Returns:
        As ``index_tar``.

    Raises:
        ConfigError: If tar or index is missing, unreadable or stale; names the command that mends it.
    """
    tar, path = Path(tar), index_path(tar)
    mend = f"run: {_COMMAND.format(tar)}"
    if not tar.is_file():
        raise ConfigError(f"data.shards: {tar} does not exist")
    if not path.is_file():
        raise ConfigError(f"data.shards: {tar} has no index ({path.name}); {mend}")
    try:
        problem, entries, bad = _parse_index(path, tar)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        problem, entries, bad = f"is not an index ({type(error).__name__}: {error})", [], []
    if problem:
        raise ConfigError(f"data.shards: {path} {problem}; {mend}")
    return entries, bad


def _parse_index(path: Path, tar: Path) -> tuple[str, list[Entry], list[BadSample]]:
    """Parse an index; the first value says what is wrong with it, "" for nothing."""
    header, *rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    size = tar.stat().st_size
    if header["format"] != FORMAT:
        return f"has format {header['format']}, needed {FORMAT}", [], []
    if header["bytes"] != size:
        return f"is of a tar of {header['bytes']} bytes, got {size} (truncated or rewritten tar)", [], []
    if header["samples"] != len(rows):
        return f"has {len(rows)} samples, needed {header['samples']}", [], []
    entries = [Entry(**{**r, "members": {e: (p[0], p[1]) for e, p in r["members"].items()}}) for r in rows]
    return "", entries, [BadSample(shard=str(tar), **record) for record in header["bad"]]


def _braces(pattern: str) -> Iterator[str]:
    """Expand ``{000..012}`` and ``{a,b}``, any number of them."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    body = match.group(1)
    span = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if span:
        low, high = span.groups()
        choices = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    else:
        choices = body.split(",")
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def find_shards(shards: str | Sequence[str]) -> tuple[Path, ...]:
    """List the tars that ``data.shards`` means.

    Args:
        shards: Paths, directories of tars, globs or brace patterns.

    Returns:
        Paths in a fixed order: as given, sorted within a directory or glob.

    Raises:
        ConfigError: If one of them means no tar.
    """
    found: list[Path] = []
    for given in (shards,) if isinstance(shards, str) else shards:
        for pattern in _braces(given):
            path = Path(pattern)
            if path.is_dir():
                matches = sorted(path.glob("*.tar"))
            elif glob.has_magic(pattern):
                matches = sorted(Path(p) for p in glob.glob(pattern))
            else:
                matches = [path] if path.exists() else []
            if not matches:
                hint = "the directory holds no .tar" if path.is_dir() else "no such path"
                nested = sorted(p.name for p in path.glob("*") if any(p.glob("*.tar"))) if path.is_dir() else []
                more = f"; did you mean its folder {' or '.join(nested)}?" if nested else ""
                raise ConfigError(
                    f"data.shards: got {pattern!r}: {hint}; needed tars made by tools/make_shards.py{more}"
                )
            found += [match for match in matches if match not in found]
    return tuple(found)


class Index:
    """All samples of a set of tars.

    Args:
        shards: The tars, each with its index beside it.

    Raises:
        ConfigError: If an index is missing or stale, or there is no sample at all.
    """

    def __init__(self, shards: Sequence[str | Path]) -> None:
        self.shards = tuple(str(shard) for shard in shards)
        self.entries: list[Entry] = []
        self.bad: list[BadSample] = []  #: Samples that indexing left out.
        for number, shard in enumerate(self.shards):
            entries, bad = read_index(shard)
            self.entries += [replace(entry, shard=number) for entry in entries]
            self.bad += bad
        if not self.entries:
            causes = dict(Counter(b.cause for b in self.bad))
            raise ConfigError(
                f"data.shards: {', '.join(self.shards)} hold no usable sample (left out: {causes or 'none'})"
            )

    @property
    def digest(self) -> str:
        """sha256 of keys and sizes, independent of where the tars lie."""
        return digest({"entries": [[e.key, e.kind, e.width, e.height, e.frames] for e in self.entries]})

    def read(self, entry: Entry, extension: str) -> bytes:
        """Read one member of a sample.

        Args:
            entry: The sample.
            extension: Extension of the member.

        Returns:
            Its bytes.

        Raises:
            BadSampleError: If the tar ends before them.
        """
        offset, size = entry.members[extension]
        descriptor = os.open(self.shards[entry.shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            data = os.pread(descriptor, size, offset)
            while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
                data += more
        finally:
            os.close(descriptor)
        if len(data) < size:
            raise BadSampleError("truncated", f"the tar ends {size - len(data)} bytes before the end of the member")
        return data

    def caption(self, entry: Entry) -> str:
        """Read the caption of a sample; "" where it has none.

        Args:
            entry: The sample.

        Returns:
            The caption.
        """
        return decode_caption(self.read(entry, "txt")) if "txt" in entry.members else ""


def open_index(shards: str | Sequence[str]) -> Index:
    """Open the index of everything ``data.shards`` means.

    Args:
        shards: Paths, directories, globs or brace patterns.

    Returns:
        The index.
    """
    return Index(find_shards(shards))
