"""What a denoiser is told besides the noisy latents: text, labels, known frames, with "nothing" as an ordinary value.

Knows no model. Objectives and samplers pass a ``Conditioning`` through without looking inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.rng import DrawRandom

NULL_LABEL = -1
"""The label that means no class."""


@dataclass(frozen=True)
class Frames:
    """Latents that are known beforehand: first frames, every other frame, what surrounds a hole, or nothing.

    Raises:
        ValueError: If the shapes do not agree.
    """

    latents: Tensor
    """Clean unit-scale latents ``(b, c, t, h, w)``; what they are where the mask is 0 does not matter."""
    mask: Tensor
    """``(b, m, t, h, w)``, bool or float, 1 = known. m is 1, or the mask channels of the model."""

    def __post_init__(self) -> None:
        latents, mask = self.latents, self.mask
        if latents.ndim != 5 or mask.ndim != 5 or (len(mask), *mask.shape[2:]) != (len(latents), *latents.shape[2:]):
            raise ValueError(
                f"frames: got latents {tuple(latents.shape)} and mask {tuple(mask.shape)}, needed (b, c, t, h, w) and "
                "(b, m, t, h, w)"
            )

    def map(self, function: Callable[[Tensor], Tensor]) -> Frames:
        """Apply a function to both tensors."""
        return Frames(function(self.latents), function(self.mask))


@dataclass(frozen=True)
class StepCondition:
    """What modulates the blocks at one time of a sampler: all of it is known before the first step."""

    time: float
    """The time as the network is given it."""
    blocks: tuple[Any, ...]
    """Of every block, or one for all, what its modulation made of the condition, or the shared projection."""
    final: Any
    """The same of the last layer; None behind a wide head, which is modulated by tokens."""


@dataclass(frozen=True)
class Prepared:
    """What a denoiser made of conditions once, for all steps of a sampler. Only that denoiser can read it."""

    text: Any
    """The text at the model's width and which of it is read; without its tokens where there are keys."""
    keys: tuple[Any, ...] = ()
    """Keys and values of every block that reads text; none where no block does."""
    pooled: Tensor | None = None
    """Mean text token ``(b, d)``, projected."""
    step: StepCondition | None = None
    """What modulates at the one time that this was made for; None = computed at every call."""


@dataclass(frozen=True)
class Conditioning:
    """Conditions of a batch; a field that is None is absent for every row.

    Raises:
        ValueError: If the fields' shapes do not agree, or one of text and its mask is missing.
    """

    text: Tensor | None = None
    """Token embeddings ``(b, n, d)``, float."""
    text_mask: Tensor | None = None
    """Bool ``(b, n)``, True = a real token; an all-False row has no text."""
    label: Tensor | None = None
    """Class indices ``(b,)``, long; negative = no class."""
    frames: Frames | tuple[Frames, ...] | None = None
    """Known latents of all rows; of samples of several sizes, one of a single row for each of them."""
    scalars: Tensor | None = None
    """Numbers ``(b, k)``, float, in the order of the model's ``scalars``; NaN = unknown."""
    image: Tensor | None = None
    """Tokens of an image encoder ``(b, n, d)``, float."""
    kept: Tensor | None = None
    """Tokens that are not dropped, ``(b, k)``, long: their numbers in the order of ``patchify``, rising."""
    prepared: Prepared | None = None
    """What ``Dit.prepare`` made of the text and the image."""

    def __post_init__(self) -> None:
        if (self.text is None) != (self.text_mask is None):
            raise ValueError("text and text_mask come together, got only one of them")
        if self.text is not None and self.text_mask is not None and not _is_mask_of(self.text_mask, self.text):
            raise ValueError(
                f"text_mask: got {self.text_mask.dtype} {tuple(self.text_mask.shape)}, needed bool (b, n) "
                f"for text (b, n, d) = {tuple(self.text.shape)}"
            )
        if self.label is not None and (self.label.ndim != 1 or self.label.is_floating_point()):
            raise ValueError(f"label: got {self.label.dtype} {tuple(self.label.shape)}, needed long (b,)")
        for name, ndim in (("scalars", 2), ("image", 3), ("kept", 2)):
            field = getattr(self, name)
            if field is not None and field.ndim != ndim:
                raise ValueError(f"{name}: got {tuple(field.shape)}, needed {ndim} dimensions")
        rows = {name: len(field) for name, field in self._tensors().items()}
        if self.frames is not None:
            rows["frames"] = _num_rows(self.frames)
        if len(set(rows.values())) > 1:
            raise ValueError(f"conditions: the fields differ in their number of rows: {rows}")

    @property
    def batch_size(self) -> int | None:
        """Number of rows; None when nothing is given."""
        if self.frames is not None:
            return _num_rows(self.frames)
        return next((len(field) for field in self._tensors().values()), None)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every field to a device; ``dtype`` applies to what is float besides ``scalars``."""

        def move(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

        moved = self._map(move)
        if self.scalars is not None:
            moved = dataclasses.replace(moved, scalars=self.scalars.to(device=device))
        return moved

    def select(self, rows: Tensor | slice) -> Conditioning:
        """Take rows by a slice, or by a tensor of indices or booleans."""
        return self._map(lambda x: x[rows], rows)

    def repeat(self, times: int) -> Conditioning:
        """Repeat every row ``times`` times, copies of a row side by side."""
        rows = None if self.batch_size is None else torch.arange(self.batch_size).repeat_interleave(times)
        return self._map(lambda x: x.repeat_interleave(times, dim=0), rows)

    def where(self, keep: Tensor, other: Conditioning) -> Conditioning:
        """Take rows from here where ``keep`` is True and from ``other`` elsewhere; what is not text or label stays.

        Args:
            keep: Bool ``(b,)``.
            other: Conditions of ``b`` rows, or of one row for all; texts of another length are padded.

        Returns:
            The mixture; a field that one side lacks counts as "nothing" there.
        """
        rows = len(keep)
        here, there = _fill(self, other, rows), _fill(other, self, rows)
        mixed: dict[str, Any] = {"text": None, "text_mask": None, "label": None}
        for name in ("text", "text_mask", "label"):
            mine, theirs = getattr(here, name), getattr(there, name)
            if mine is not None and theirs is not None:
                mixed[name] = torch.where(keep.to(mine.device).view(-1, *[1] * (mine.ndim - 1)), mine, theirs)
        return dataclasses.replace(self, prepared=None, **mixed)

    def drop(self, rate: float, null: Conditioning, random: DrawRandom) -> Conditioning:
        """Replace each row by the null condition with probability ``rate``, for classifier-free guidance.

        Args:
            rate: Probability in [0, 1]; 0 returns the conditions unchanged.
            null: What to put instead: one row, or one per row.
            random: Random numbers of the batch; stream ``"condition"``.

        Returns:
            Conditions with some rows replaced.
        """
        if rate == 0:
            return self
        return self.where(random.uniform((), "condition") >= rate, null)

    def _tensors(self) -> dict[str, Tensor]:
        names = ("text", "text_mask", "label", "scalars", "image", "kept")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _map(self, function: Callable[[Tensor], Tensor], rows: Tensor | slice | None = None) -> Conditioning:
        """Apply a function to every tensor, or the rows it takes to samples; what was prepared is left behind."""
        fields: dict[str, Any] = {name: function(field) for name, field in self._tensors().items()}
        if isinstance(self.frames, Frames):
            fields["frames"] = self.frames.map(function)
        elif self.frames is not None:
            if rows is None:
                fields["frames"] = tuple(frames.map(function) for frames in self.frames)
            else:
                places = torch.arange(len(self.frames))[rows if isinstance(rows, slice) else rows.cpu()].tolist()
                fields["frames"] = tuple(self.frames[place] for place in places)
        return Conditioning(**fields)


def stack(conditions: Sequence[Conditioning]) -> Conditioning:
    """Concatenate batches of conditions row by row; texts of different lengths are padded.

    Args:
        conditions: One or more, each with at least one field.

    Returns:
        All rows, in order.

    Raises:
        ValueError: If one of them is empty, so that its number of rows is unknown.
    """
    stacked = conditions[0]
    for item in conditions[1:]:
        first, second = stacked.batch_size, item.batch_size
        if first is None or second is None:
            raise ValueError(
                "an empty Conditioning has no number of rows: give it an all-False text_mask or labels of -1"
            )
        stacked = _joined(_fill(stacked, item, first), _fill(item, stacked, second))
    return stacked


def _joined(first: Conditioning, second: Conditioning) -> Conditioning:
    ours, theirs = first._tensors(), second._tensors()
    lacking = sorted(ours.keys() ^ theirs.keys())
    if lacking or (first.frames is None) != (second.frames is None):
        raise ValueError(f"conditions: only one of two has {lacking or ['frames']}; give both, or neither")
    fields: dict[str, Any] = {name: torch.cat((field, theirs[name])) for name, field in ours.items()}
    if isinstance(first.frames, tuple) and isinstance(second.frames, tuple):
        fields["frames"] = first.frames + second.frames
    elif isinstance(first.frames, tuple) or isinstance(second.frames, tuple):
        raise ValueError("conditions: frames of samples of several sizes and frames of a batch cannot be stacked")
    elif first.frames is not None and second.frames is not None:
        pairs = zip(vars(first.frames).values(), vars(second.frames).values(), strict=True)
        fields["frames"] = Frames(*(torch.cat(pair) for pair in pairs))
    return Conditioning(**fields)


def _num_rows(frames: Frames | tuple[Frames, ...]) -> int:
    return len(frames.latents) if isinstance(frames, Frames) else len(frames)


def _is_mask_of(mask: Tensor, text: Tensor) -> bool:
    return text.ndim == 3 and mask.shape == text.shape[:2] and mask.dtype == torch.bool


def _fill(cond: Conditioning, like: Conditioning, rows: int) -> Conditioning:
    """Give ``cond`` the text and label that ``like`` has, the longer text length of the two, and ``rows`` rows."""
    text, text_mask, label = cond.text, cond.text_mask, cond.label
    if like.text is not None and like.text_mask is not None:
        length = like.text.shape[1]
        if text is None or text_mask is None:
            text = like.text.new_zeros(rows, length, like.text.shape[2])
            text_mask = like.text_mask.new_zeros(rows, length)
        elif text.shape[1] < length:
            text = F.pad(text, (0, 0, 0, length - text.shape[1]))
            text_mask = F.pad(text_mask, (0, length - text_mask.shape[1]))
    if like.label is not None and label is None:
        label = like.label.new_full((rows,), NULL_LABEL)
    fields = {"text": text, "text_mask": text_mask, "label": label}
    expanded: dict[str, Any] = {
        name: None if field is None else field.expand(rows, *field.shape[1:]) for name, field in fields.items()
    }
    return dataclasses.replace(cond, prepared=None, **expanded)
