"""What the loader hands to training: batches of samples and the bookkeeping of a step.

Knows nothing of files or plans.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltd.shapes import VideoShape


class BadSampleError(ValueError):
    """A sample that cannot be used.

    Args:
        cause: One of the short fixed causes the metrics count by, such as ``"undecodable"``.
        message: What was found.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """Record of a sample that failed: one line of ``quarantine.jsonl``."""

    key: str  #: Key of the sample in its shard.
    shard: str  #: Path of the tar or cache directory.
    cause: str  #: Short name the metrics count by.
    message: str  #: What was found.
    draw: int | None = None  #: Slot of the global sequence; None for samples that the index left out.

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a plain dict."""
        return dataclasses.asdict(self)


#: Size and crop that nothing is known of.
UNKNOWN_GEOMETRY = (math.nan, math.nan, math.nan, math.nan)


@dataclass(kw_only=True)
class Sample:
    """One sample before collation; either ``pixels`` or ``mean`` and ``logvar`` are set."""

    caption: str = ""  #: Caption, "" where there is none.
    caption_column: int = 0  #: Which of the sample's captions it is, from 0.
    fps: float = 0.0  #: Frames per second after the frame step; 0 for images and where unknown.
    label: int = -1  #: Class number; -1 where there is none.
    #: Height and width of the source, and rows and columns that the cut leaves out above and left of it, in pixels of
    #: the scaled picture; NaN where unknown.
    geometry: tuple[float, float, float, float] = UNKNOWN_GEOMETRY
    pixels: np.ndarray | None = None  #: uint8 (t, h, w, c), RGB.
    mean: Tensor | None = None  #: float (c, t, h, w), raw latents.
    logvar: Tensor | None = None  #: float (c, t, h, w).
    text: Tensor | None = None  #: float (n, d), zero where masked out.
    text_mask: Tensor | None = None  #: bool (n,), True = token.
    features: Tensor | None = None  #: float (d, t, h', w'), a vision network's.


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one shape, on one device."""

    keys: tuple[str, ...]  #: Key of each sample.
    draws: tuple[int, ...]  #: Slot of each sample in the global sequence of batches; seeds its random numbers.
    weight: Tensor  #: float32 (b,); 0 where the sample failed (its data are zeros), else 1.
    captions: tuple[str, ...]  #: Caption of each sample.
    fps: Tensor  #: float32 (b,); frames per second, 0 for images and where unknown.
    pixels: Tensor | None = None  #: uint8 (b, t, h, w, c), RGB.
    mean: Tensor | None = None  #: float, as a cache stores it, (b, c, t, h, w), raw latents.
    logvar: Tensor | None = None  #: Like ``mean``.
    text: Tensor | None = None  #: float, as a cache stores it, (b, n, d).
    text_mask: Tensor | None = None  #: bool (b, n), True = token.
    features: Tensor | None = None  #: float, as a cache stores it, (b, d, t, h', w'), a vision network's.
    kinds: tuple[str, ...] = field(default=())  #: "image" or "video" per sample.
    entries: tuple[int, ...] = field(default=())  #: Place of each sample in the index of all data sets.
    caption_columns: tuple[int, ...] = field(default=())  #: Which of its captions each sample has, from 0.
    label: Tensor | None = None  #: int64 (b,), class numbers; -1 where a sample has none.
    geometry: Tensor | None = None  #: float32 (b, 4), as in ``Sample``: height, width, top, left; NaN where unknown.

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def ids(self) -> tuple[str, ...]:
        """What names each sample among all: keys alone are unique in one tar only."""
        if not self.entries:
            return self.keys
        return tuple(f"{entry}:{key}" for entry, key in zip(self.entries, self.keys, strict=True))

    @property
    def shape(self) -> VideoShape:
        """Size of ``pixels``, or of the latents where there are no pixels."""
        if self.pixels is not None:
            return VideoShape(*self.pixels.shape[1:4])
        if self.mean is None:
            raise ValueError("a batch holds either pixels or latents")
        return VideoShape(*self.mean.shape[2:5])

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to a device.

        Args:
            device: Where to.

        Returns:
            A new batch; tensors already there are shared.
        """
        tensors: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)

    def select(self, rows: Sequence[int]) -> Batch:
        """Take samples in the order given.

        Args:
            rows: Places of samples.

        Returns:
            A new batch.
        """
        index = torch.tensor(rows, dtype=torch.long)
        values: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                values[f.name] = value[index.to(value.device)]
            elif isinstance(value, tuple) and value:
                values[f.name] = tuple(value[row] for row in rows)
        return dataclasses.replace(self, **values)

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """Put batches of one sample size one after the other; shorter texts are padded.

        Args:
            batches: One or more, all with the same fields.

        Returns:
            The batch of all samples.
        """
        if len(batches) == 1:
            return batches[0]
        longest = max(batch.text.shape[1] if batch.text is not None else 0 for batch in batches)
        values: dict[str, Any] = {}
        for f in dataclasses.fields(Batch):
            parts = [getattr(batch, f.name) for batch in batches]
            if isinstance(parts[0], tuple):
                values[f.name] = tuple(item for part in parts for item in part)
            elif parts[0] is not None:
                if f.name in ("text", "text_mask"):
                    parts = [_pad_tokens(part, longest) for part in parts]
                values[f.name] = torch.cat(parts)
        return Batch(**values)


def _pad_tokens(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[1]
    return torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1) if missing else x


@dataclass(frozen=True)
class PackedBatch:
    """Samples of several sizes that go through the denoiser as one sequence; one batch per size."""

    groups: tuple[Batch, ...]  #: Samples of one size each.

    @property
    def keys(self) -> tuple[str, ...]:
        """Key of each sample, group after group."""
        return tuple(key for group in self.groups for key in group.keys)

    @property
    def ids(self) -> tuple[str, ...]:
        """What names each sample among all, group after group."""
        return tuple(name for group in self.groups for name in group.ids)

    @property
    def draws(self) -> tuple[int, ...]:
        """Slot of each sample in the global sequence, group after group."""
        return tuple(draw for group in self.groups for draw in group.draws)

    @property
    def weight(self) -> Tensor:
        """float32 (b,); 0 where the sample failed."""
        return torch.cat([group.weight for group in self.groups])

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move every tensor to a device."""
        return PackedBatch(tuple(group.to(device) for group in self.groups))


MicroBatch = Batch | PackedBatch


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """Bookkeeping of one optimizer step of this process."""

    step: int  #: Step the batches belong to, from 0.
    state: dict[str, Any]  #: Plain dict that continues after this step; equal on every process.
    keys_hash: str  #: Running sha256 of all sample keys up to and with this step, in global order.
    bad: tuple[BadSample, ...]  #: Samples of this process that failed in this step.
    data_s: float  #: Seconds this process waited for its batches.
    metrics: dict[str, float] = field(
        default_factory=dict
    )  #: ``data/...`` of the global batch; equal on every process.
    too_many_bad: str | None = None  #: Why training must stop: more bad samples than ``max_bad_fraction`` allows.


def collate(
    samples: Sequence[Sample | None],
    *,
    blank: Sample,
    keys: Sequence[str],
    draws: Sequence[int],
    kind: str,
    entries: Sequence[int] = (),
) -> Batch:
    """Stack samples of one shape.

    Args:
        samples: ``b`` samples; None where one failed.
        blank: Sample of zeros that stands in for a failed one and says which tensors a batch has.
        keys: Key of each.
        draws: Slot of each in the global sequence.
        kind: "image" or "video".
        entries: Place of each in the index of all data sets.

    Returns:
        The batch; weight 0 where ``samples`` has None.
    """
    filled = [blank if sample is None else sample for sample in samples]

    def stack(name: str) -> Tensor | None:
        if getattr(blank, name) is None:
            return None
        values = [getattr(sample, name) for sample in filled]
        return torch.stack(values) if isinstance(values[0], Tensor) else torch.from_numpy(np.stack(values))

    return Batch(
        keys=tuple(keys),
        draws=tuple(draws),
        weight=torch.tensor([0.0 if sample is None else 1.0 for sample in samples]),
        captions=tuple(sample.caption for sample in filled),
        fps=torch.tensor([sample.fps for sample in filled], dtype=torch.float32),
        pixels=stack("pixels"),
        mean=stack("mean"),
        logvar=stack("logvar"),
        text=stack("text"),
        text_mask=stack("text_mask"),
        features=stack("features"),
        kinds=(kind,) * len(filled),
        entries=tuple(entries),
        caption_columns=tuple(sample.caption_column for sample in filled),
        label=torch.tensor([sample.label for sample in filled]),
        geometry=torch.tensor([sample.geometry for sample in filled], dtype=torch.float32),
    )
