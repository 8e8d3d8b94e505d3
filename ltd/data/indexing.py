"""Make the index of a tar: read it once, probe every sample, say which are left out and why.

Nothing in a tar ever touches the file system: members are only read into memory, links are never followed.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ltd.config import ConfigError
from ltd.data.batch import BadSample, BadSampleError
from ltd.data.decode import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, probe
from ltd.data.entries import ROLES, Entries, Entry
from ltd.data.index_file import SUFFIX, encode_index
from ltd.data.labels import label_of_members
from ltd.data.store import Store

#: Members larger than this are not read: no caption is that long.
_MAX_TEXT_BYTES = 16 * 2**20


def _safe(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and name.isprintable() and not name.startswith("/") and ".." not in parts and "\\" not in name


class _Scan:
    """Samples and rejects of one tar while it is read."""

    def __init__(self, tar: str) -> None:
        self.tar = tar
        self.samples: dict[str, dict[str, tuple[int, int]]] = {}
        self.bad: list[BadSample] = []

    def reject(self, key: str, cause: str, message: str) -> None:
        printable = key.encode("utf-8", "backslashreplace").decode()
        self.bad.append(BadSample(key=printable, shard=self.tar, cause=cause, message=message))

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


class _Bytes(io.RawIOBase):
    """A tar in a store as a file, for tarfile."""

    def __init__(self, store: Store, path: str, size: int) -> None:
        self.store, self.path, self.size, self.place = store, path, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        data = self.store.read(self.path, self.place, min(len(buffer), max(0, self.size - self.place)))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def _scan(tar: str, store: Store, size: int) -> _Scan:
    scan = _Scan(tar)
    if size == 0:
        raise ConfigError(f"data.shards: {tar} has zero bytes; needed a tar of samples")
    try:
        with tarfile.open(fileobj=_Bytes(store, tar, size), mode="r:") as archive:
            for member in archive:
                if member.offset_data + member.size > size:
                    scan.reject(member.name, "truncated", f"the tar ends inside this member, at byte {size}")
                    break
                scan.add(member)
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            else:
                _check_end(scan, archive.offset, store.read(tar, archive.offset, tarfile.BLOCKSIZE))
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        if not scan.samples:
            raise ConfigError(
                f"data.shards: {tar} is not a plain tar: {error}; needed an uncompressed tar (for random access)"
            ) from error
        scan.reject("", "truncated", f"the tar breaks off: {error}")
    return scan


def _check_end(scan: _Scan, end: int, block: bytes) -> None:
    """Note a header that cannot be read: tarfile takes it for the end of the archive without a word."""
    if any(block):
        scan.reject("", "truncated", f"the header at byte {end} is damaged: what lies behind it is lost")


def _inspect(key: str, members: dict[str, tuple[int, int]], read: Callable[[str], bytes]) -> Entry:
    media = [ext for ext in members if ext in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS]
    if not media:
        raise BadSampleError("no_media", f"no image or video among its members: {', '.join(members)}")
    if len(media) > 1:
        raise BadSampleError("duplicate", f"more than one medium: {', '.join(media)}")
    for extension in ("txt", "captions.json"):
        if extension in members and members[extension][1] > _MAX_TEXT_BYTES:
            raise BadSampleError("too_large", f"a caption member of {members[extension][1]} bytes")
    info = probe(read(media[0]), media[0])
    captions: tuple[tuple[str, float], ...] = ()
    if "captions.json" in members:
        captions = decode_captions(read("captions.json"))
    elif "txt" in members:
        captions = ((decode_caption(read("txt")), 1.0),)
    wanted = {ext: place for ext, place in members.items() if ext in (media[0], *ROLES)}
    chars = tuple(len(text) for text, _ in captions)
    told = [name for name in ("cls", "json") if name in members and members[name][1] <= _MAX_TEXT_BYTES][:1]
    number, name = label_of_members(*(read(member) if member in told else None for member in ("cls", "json")))
    sizes = (info.width, info.height, info.frames, info.fps)
    return Entry(key, info.kind, *sizes, chars, wanted, label=number, class_name=name)


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


def decode_captions(data: bytes) -> tuple[tuple[str, float], ...]:
    """Decode a member of several weighted captions.

    Args:
        data: JSON list of ``[text, weight]`` pairs.

    Returns:
        Texts without surrounding white space, with their weights.

    Raises:
        BadSampleError: If it is not UTF-8 or not such a list, or a weight is not a positive number.
    """
    try:
        pairs = tuple((str(text).strip(), float(weight)) for text, weight in json.loads(decode_caption(data)))
    except (ValueError, TypeError) as error:
        if isinstance(error, BadSampleError):
            raise
        raise BadSampleError("caption_invalid", f"not a JSON list of [text, weight] pairs: {error}") from error
    if not pairs or not all(0 < weight < math.inf for _, weight in pairs):
        raise BadSampleError("caption_invalid", "needed one caption or more, each with a positive weight")
    return pairs


def index_tar(tar: str | Path, store: Store | None = None) -> tuple[Entries, list[BadSample]]:
    """Read a tar once, probe every sample and write the index beside it.

    Args:
        tar: An uncompressed tar, local or remote (where the remote can be written to).
        store: Reads it; None makes one.

    Returns:
        The usable samples in tar order, and a record of each that was left out.

    Raises:
        ConfigError: If the file is missing, empty or no plain tar.
    """
    tar, store = str(tar), store or Store()
    try:
        size = store.size(tar)
    except FileNotFoundError:
        raise ConfigError(f"data.shards: {tar} does not exist") from None
    scan = _scan(tar, store, size)
    rows: list[Entry] = []

    for key, members in scan.samples.items():

        def read(extension: str, members: dict[str, tuple[int, int]] = members) -> bytes:
            return store.read(tar, *members[extension])

        try:
            rows.append(_inspect(key, members, read))
        except BadSampleError as error:
            scan.reject(key, error.cause, str(error))
        except Exception as error:  # a decoder's own surprise must not lose the other samples
            scan.reject(key, "undecodable", f"{type(error).__name__}: {error}")
    entries = Entries.of(rows)
    store.write(f"{tar}{SUFFIX}", encode_index(entries, scan.bad, tar=tar.rpartition("/")[2], num_bytes=size))
    return entries, scan.bad
