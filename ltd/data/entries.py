"""What a data set holds, as columns: millions of samples in memory without one Python object each.

Knows no files. ``Entry`` is one row, made when it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np

from ltd.data.decode import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

#: Members of a sample that are read; ``media`` stands for the one image or video.
ROLES = ("media", "txt", "captions.json", "json")
#: The number that means no label.
NO_LABEL = -1
KINDS: tuple[Literal["image"], Literal["video"]] = ("image", "video")
_MEDIA = IMAGE_EXTENSIONS + VIDEO_EXTENSIONS


@dataclass(frozen=True)
class Entry:
    """One sample of a tar or of a latent cache."""

    key: str  #: Key; the members' common name up to the first dot.
    kind: Literal["image", "video"]  #: Kind of sample.
    width: int  #: Pixels.
    height: int  #: Pixels.
    frames: int  #: Frames; 1 for an image.
    fps: float  #: Frames per second; 0 for an image and where unknown.
    caption_chars: tuple[int, ...] = ()  #: Characters of each caption; () where there is no caption member.
    members: Mapping[str, tuple[int, int]] = field(
        default_factory=dict
    )  #: Extension -> (offset, size) in the tar, bytes.
    shard: int = 0  #: Number of the tar in ``Index.shards``, or of the row in a latent cache.
    label: int = NO_LABEL  #: Class number; -1 where the sample has none.
    class_name: str = ""  #: Class name; "" where the sample has none.

    @property
    def media(self) -> str:
        """Extension of the media member."""
        return next(ext for ext in self.members if ext in _MEDIA)

    @property
    def captioned(self) -> bool:
        """Whether some caption is not empty."""
        return any(self.caption_chars)


class Strings(Sequence[str]):
    """A column of text: one buffer and the end of each string in it.

    Args:
        buffer: UTF-8 bytes of all strings, one after the other.
        ends: int64 ``(n,)``, byte after the last of each string.
    """

    def __init__(self, buffer: bytes, ends: np.ndarray) -> None:
        self.buffer, self.ends = buffer, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        """Encode strings."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
        return cls(b"".join(encoded), np.cumsum([len(text) for text in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        begin = int(self.ends[place - 1]) if place else 0
        return self.buffer[begin : int(self.ends[place])].decode("utf-8", "surrogateescape")

    def pick(self, places: np.ndarray) -> list[str]:
        """Read strings by place, int64 ``(n,)``."""
        buffer, ends = self.buffer, self.ends
        begins = np.where(places > 0, ends[places - 1], 0).tolist()
        pairs = zip(begins, ends[places].tolist(), strict=True)
        return [buffer[begin:end].decode("utf-8", "surrogateescape") for begin, end in pairs]

    def take(self, places: np.ndarray) -> Strings:
        """Pick strings by place."""
        return Strings.of(self.pick(places))


class Entries(Sequence[Entry]):
    """Rows of samples stored by column.

    Args:
        keys: Keys.
        columns: ``kind`` (uint8, place in ``KINDS``), ``width``, ``height``, ``frames`` (int32), ``fps`` (float64),
            ``shard`` (int32), ``captions`` (int32, how many), ``caption_chars`` (int32, of all captions one after the
            other) and, for tars, ``media`` (uint8, place among the media extensions), ``offset`` and ``size`` (int64
            ``(n, len(ROLES))``, -1 where a member is missing). ``label`` (int32, class number) and ``class_name``
            (int32, place in ``classes``) may be left out: no sample has any.
        classes: Class names that samples have.
    """

    def __init__(self, keys: Strings, columns: Mapping[str, np.ndarray], classes: Sequence[str] = ()) -> None:
        self.keys, self.columns, self.classes = keys, dict(columns), tuple(classes)
        for name in ("label", "class_name"):
            if name not in self.columns:
                self.columns[name] = np.full(len(self.columns["kind"]), NO_LABEL, dtype=np.int32)
        self._caption_ends = np.cumsum(self.columns["captions"], dtype=np.int64)

    @classmethod
    def of(cls, rows: Sequence[Entry]) -> Entries:
        """Put rows into columns."""
        places = [
            [row.members.get(row.media if role == "media" else role, (-1, -1)) for role in ROLES] if row.members else []
            for row in rows
        ]
        columns: dict[str, Any] = {
            "kind": np.array([KINDS.index(row.kind) for row in rows], dtype=np.uint8),
            "fps": np.array([row.fps for row in rows], dtype=np.float64),
            "captions": np.array([len(row.caption_chars) for row in rows], dtype=np.int32),
            "caption_chars": np.array([chars for row in rows for chars in row.caption_chars], dtype=np.int32),
        }
        classes = {name: place for place, name in enumerate(sorted({row.class_name for row in rows} - {""}))}
        columns["class_name"] = np.array([classes.get(row.class_name, NO_LABEL) for row in rows], dtype=np.int32)
        for name in ("width", "height", "frames", "shard", "label"):
            columns[name] = np.array([getattr(row, name) for row in rows], dtype=np.int32)
        if rows and rows[0].members:
            columns["media"] = np.array([_MEDIA.index(row.media) for row in rows], dtype=np.uint8)
            place = np.array(places, dtype=np.int64).reshape(len(rows), len(ROLES), 2)
            columns["offset"], columns["size"] = place[..., 0], place[..., 1]
        return cls(Strings.of(row.key for row in rows), columns, tuple(classes))

    @classmethod
    def concatenate(cls, parts: Sequence[Entries]) -> Entries:
        """Put the rows of several one after the other; their ``shard`` numbers are kept."""
        if len(parts) == 1:
            return parts[0]
        names = set.intersection(*(set(part.columns) for part in parts)) if parts else set()
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in sorted(names)}
        classes = {name: place for place, name in enumerate(dict.fromkeys(n for part in parts for n in part.classes))}
        if classes:
            columns["class_name"] = np.concatenate([part._renumbered(classes) for part in parts])
        keys = [part.keys for part in parts]
        ends = [strings.ends for strings in keys]
        starts = np.cumsum([0] + [len(strings.buffer) for strings in keys])
        joined = np.concatenate([end + start for end, start in zip(ends, starts, strict=False)])
        return cls(Strings(b"".join(strings.buffer for strings in keys), joined), columns, tuple(classes))

    def _renumbered(self, classes: Mapping[str, int]) -> np.ndarray:
        """Say the class name of every row as a place in other names."""
        places = np.array([*(classes[name] for name in self.classes), NO_LABEL], dtype=np.int32)
        return places[self.columns["class_name"]]

    def __len__(self) -> int:
        return len(self.columns["kind"])

    @overload
    def __getitem__(self, place: int) -> Entry: ...
    @overload
    def __getitem__(self, place: slice) -> list[Entry]: ...
    def __getitem__(self, place: int | slice) -> Entry | list[Entry]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        columns = self.columns
        end = int(self._caption_ends[place])
        first = end - int(columns["captions"][place])
        named = int(columns["class_name"][place])
        return Entry(
            self.keys[place],
            KINDS[columns["kind"][place]],
            int(columns["width"][place]),
            int(columns["height"][place]),
            int(columns["frames"][place]),
            float(columns["fps"][place]),
            tuple(columns["caption_chars"][first:end].tolist()),
            self._members(place),
            int(columns["shard"][place]),
            int(columns["label"][place]),
            self.classes[named] if named >= 0 else "",
        )

    def _members(self, place: int) -> dict[str, tuple[int, int]]:
        if "offset" not in self.columns:
            return {}
        found = {}
        pairs = zip(self.columns["offset"][place].tolist(), self.columns["size"][place].tolist(), strict=True)
        for role, (offset, size) in zip(ROLES, pairs, strict=True):
            if offset >= 0:
                found[_MEDIA[self.columns["media"][place]] if role == "media" else role] = (offset, size)
        return found

    @property
    def captioned(self) -> np.ndarray:
        """Bool ``(n,)``: whether a sample has a caption that is not empty."""
        chars = np.concatenate([[0], np.cumsum(self.columns["caption_chars"], dtype=np.int64)])
        return chars[self._caption_ends] > chars[self._caption_ends - self.columns["captions"]]

    def take(self, places: np.ndarray) -> Entries:
        """Pick rows by place."""
        counts = self.columns["captions"][places]
        firsts = self._caption_ends[places] - counts
        spread = np.repeat(firsts - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(counts.sum())
        columns = {n: c[places] for n, c in self.columns.items() if n != "caption_chars"}
        columns["caption_chars"] = self.columns["caption_chars"][spread.astype(np.int64)]
        return Entries(self.keys.take(places), columns, self.classes)

    @property
    def digest(self) -> str:
        """sha256 of keys, kinds and sizes, independent of where the samples lie."""
        state = hashlib.sha256()
        for name in ("kind", "width", "height", "frames"):
            state.update(np.ascontiguousarray(self.columns[name].astype(np.int32)).tobytes())
        state.update(self.keys.ends.tobytes())
        state.update(self.keys.buffer)
        return state.hexdigest()

    def with_shard(self, number: int | np.ndarray) -> Entries:
        """Give every row a shard number."""
        shard = np.broadcast_to(np.asarray(number, dtype=np.int32), (len(self),)).copy()
        return Entries(self.keys, {**self.columns, "shard": shard}, self.classes)
