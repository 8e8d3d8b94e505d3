"""What a denoiser is told besides the noisy latents: text tokens and class labels, with "nothing" as an ordinary value.

Knows no model. Objectives and samplers pass a ``Conditioning`` through without looking inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.rng import DrawRandom

NULL_LABEL = -1
"""The label that means no class."""


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
        if self.text is not None and self.label is not None and len(self.text) != len(self.label):
            raise ValueError(f"text has {len(self.text)} rows, label {len(self.label)}")

    @property
    def batch_size(self) -> int | None:
        """Number of rows; None when nothing is given."""
        field = self.text if self.text is not None else self.label
        return None if field is None else len(field)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every field to a device; ``dtype`` applies to the text only."""
        return Conditioning(
            text=None if self.text is None else self.text.to(device=device, dtype=dtype),
            text_mask=None if self.text_mask is None else self.text_mask.to(device=device),
            label=None if self.label is None else self.label.to(device=device),
        )

    def select(self, rows: Tensor | slice) -> Conditioning:
        """Take rows by a slice, or by a tensor of indices or booleans."""
        return Conditioning(*(None if field is None else field[rows] for field in self._fields()))

    def repeat(self, times: int) -> Conditioning:
        """Repeat every row ``times`` times, copies of a row side by side."""
        fields = self._fields()
        return Conditioning(*(None if field is None else field.repeat_interleave(times, dim=0) for field in fields))

    def where(self, keep: Tensor, other: Conditioning) -> Conditioning:
        """Take rows from here where ``keep`` is True and from ``other`` elsewhere.

        Args:
            keep: Bool ``(b,)``.
            other: Conditions of ``b`` rows, or of one row for all; texts of another length are padded.

        Returns:
            The mixture; a field that one side lacks counts as "nothing" there.
        """
        rows = len(keep)
        here, there = _fill(self, other, rows), _fill(other, self, rows)
        mixed: list[Tensor | None] = []
        for mine, theirs in zip(here._fields(), there._fields(), strict=True):
            if mine is None or theirs is None:
                mixed.append(None)
            else:
                mixed.append(torch.where(keep.to(mine.device).view(-1, *[1] * (mine.ndim - 1)), mine, theirs))
        return Conditioning(*mixed)

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

    def _fields(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.text, self.text_mask, self.label


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
        here, there = _fill(stacked, item, first), _fill(item, stacked, second)
        pairs = zip(here._fields(), there._fields(), strict=True)
        stacked = Conditioning(*(None if a is None or b is None else torch.cat((a, b)) for a, b in pairs))
    return stacked


def _is_mask_of(mask: Tensor, text: Tensor) -> bool:
    return text.ndim == 3 and mask.shape == text.shape[:2] and mask.dtype == torch.bool


def _fill(cond: Conditioning, like: Conditioning, rows: int) -> Conditioning:
    """Give ``cond`` every field that ``like`` has, the longer text length of the two, and ``rows`` rows."""
    text, text_mask, label = cond._fields()
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
    expanded = (None if field is None else field.expand(rows, *field.shape[1:]) for field in (text, text_mask, label))
    return Conditioning(*expanded)
