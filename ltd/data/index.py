"""Index of WebDataset tars: where every sample's bytes lie and what they hold, so that tars are read at random.

Beside ``name.tar`` stands ``name.tar.index.npz``, made by ``ltd.data.indexing`` in the format of
``ltd.data.index_file``. Tars lie in a store: local, or remote by URL.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ltd.config import ConfigError
from ltd.data.batch import BadSample, BadSampleError
from ltd.data.entries import Entries, Entry
from ltd.data.index_file import FORMAT, SUFFIX, decode_index, index_command, index_path
from ltd.data.indexing import decode_caption, decode_captions, index_tar
from ltd.data.store import Store, is_remote

__all__ = [
    "FORMAT",
    "Entries",
    "Entry",
    "Index",
    "decode_caption",
    "find_shards",
    "index_path",
    "index_tar",
    "open_index",
    "read_index",
]

#: Members that lie this near to each other are read together, bytes in between included.
_GAP_BYTES = 4096
#: Indexes read at once.
_READERS = 16


def read_index(tar: str | Path, store: Store | None = None) -> tuple[Entries, list[BadSample]]:
    """Read the index beside a tar.

    Args:
        tar: The tar, a path or URL.
        store: Reads it; None makes one.

    Returns:
        As ``index_tar``.

    Raises:
        ConfigError: If tar or index is missing, unreadable or stale; names the command that mends it.
    """
    tar, store = str(tar), store or Store()
    path, mend = f"{tar}{SUFFIX}", index_command(tar)
    try:
        size = store.size(tar)
    except FileNotFoundError:
        raise ConfigError(f"data.shards: {tar} does not exist") from None
    try:
        data = store.read_all(path)
    except FileNotFoundError:
        raise ConfigError(f"data.shards: {tar} has no index ({path.rpartition('/')[2]}); {mend}") from None
    problem, entries, bad = decode_index(data, num_bytes=size, shard=tar)
    if entries is None:
        raise ConfigError(f"data.shards: {path} {problem}; {mend}")
    return entries, bad


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


def find_shards(shards: str | Sequence[str], store: Store | None = None) -> tuple[str, ...]:
    """List the tars that ``data.shards`` means.

    Args:
        shards: Paths or URLs, directories of tars, globs or brace patterns.
        store: Lists them; None makes one.

    Returns:
        Paths in a fixed order: as given, sorted within a directory or glob.

    Raises:
        ConfigError: If one of them means no tar.
    """
    store = store or Store()
    found: dict[str, None] = {}
    for given in (shards,) if isinstance(shards, str) else shards:
        for pattern in _braces(given):
            matches = store.find(pattern)
            if not matches:
                raise ConfigError(_nothing_found(pattern))
            found |= dict.fromkeys(matches)
    return tuple(found)


def _nothing_found(pattern: str) -> str:
    path = Path(pattern)
    local = not is_remote(pattern) and path.is_dir()
    hint = "the directory holds no .tar" if local else "no such path"
    nested = sorted(p.name for p in path.glob("*") if any(p.glob("*.tar"))) if local else []
    more = f"; did you mean its folder {' or '.join(nested)}?" if nested else ""
    return f"data.shards: got {pattern!r}: {hint}; needed tars made by tools/make_shards.py{more}"


class Index:
    """All samples of a set of tars.

    Args:
        shards: The tars, each with its index beside it.
        store: Where they lie; None makes one for local paths and plain URLs.

    Raises:
        ConfigError: If an index is missing or stale, or there is no sample at all.
    """

    def __init__(self, shards: Sequence[str | Path], store: Store | None = None) -> None:
        self.shards = tuple(str(shard) for shard in shards)
        self.store = store or Store()
        parts: list[Entries] = []
        self.bad: list[BadSample] = []  #: Samples that indexing left out.
        with ThreadPoolExecutor(_READERS) as pool:
            read = list(pool.map(lambda shard: read_index(shard, self.store), self.shards))
        for number, (entries, bad) in enumerate(read):
            if len(entries):
                parts.append(entries.with_shard(number))
            self.bad += bad
        if not parts:
            causes = dict(Counter(b.cause for b in self.bad))
            raise ConfigError(
                f"data.shards: {', '.join(self.shards)} hold no usable sample (left out: {causes or 'none'})"
            )
        self.entries = Entries.concatenate(parts)

    @property
    def digest(self) -> str:
        """sha256 of keys and sizes, independent of where the tars lie."""
        return self.entries.digest

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
        data = self.store.read(self.shards[entry.shard], offset, size)
        if len(data) < size:
            raise BadSampleError("truncated", f"the tar ends {size - len(data)} bytes before the end of the member")
        return data

    def load(self, entry: Entry) -> tuple[bytes, tuple[tuple[str, float], ...]]:
        """Read the medium and the captions of a sample, in one request where they lie side by side.

        Args:
            entry: The sample.

        Returns:
            Bytes of the medium; the weighted captions, () for none.
        """
        caption = next((name for name in ("captions.json", "txt") if name in entry.members), None)
        places = [entry.members[entry.media]] + ([entry.members[caption]] if caption else [])
        begin, end = min(offset for offset, _ in places), max(offset + size for offset, size in places)
        if end - begin - sum(size for _, size in places) > _GAP_BYTES:
            return self.read(entry, entry.media), self.captions(entry)
        data = self.store.read(self.shards[entry.shard], begin, end - begin)
        if len(data) < end - begin:
            raise BadSampleError("truncated", f"the tar ends {end - begin - len(data)} bytes before the sample does")
        pieces = [data[offset - begin : offset - begin + size] for offset, size in places]
        return pieces[0], _captions(caption, pieces[-1])

    def captions(self, entry: Entry) -> tuple[tuple[str, float], ...]:
        """Read all captions of a sample.

        Args:
            entry: The sample.

        Returns:
            Texts and their weights; () where it has none.
        """
        caption = next((name for name in ("captions.json", "txt") if name in entry.members), None)
        return _captions(caption, self.read(entry, caption) if caption else b"")

    def caption(self, entry: Entry) -> str:
        """Read the first caption of a sample; "" where it has none.

        Args:
            entry: The sample.

        Returns:
            The caption.
        """
        captions = self.captions(entry)
        return captions[0][0] if captions else ""


def _captions(member: str | None, data: bytes) -> tuple[tuple[str, float], ...]:
    if member is None:
        return ()
    return decode_captions(data) if member == "captions.json" else ((decode_caption(data), 1.0),)


def open_index(shards: str | Sequence[str], store: Store | None = None) -> Index:
    """Open the index of everything ``data.shards`` means.

    Args:
        shards: Paths or URLs, directories, globs or brace patterns.
        store: Where they lie; None makes one.

    Returns:
        The index.
    """
    store = store or Store()
    return Index(find_shards(shards, store), store)
