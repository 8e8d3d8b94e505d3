"""Frames in bands of rows: each band has a storage of its own, so that what was read can be let go of early.

Knows nothing of convolutions or time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

#: One frame ``(b, c, 1, h, w)``, or its bands of rows from top to bottom.
Frame: TypeAlias = "Tensor | tuple[Tensor, ...]"

#: Fewest pixels, over frames and batch, that an accelerator is given at once: with fewer it waits for the next launch.
ACCELERATOR_PIXELS = 1 << 17


def pixels_at_once(on_cpu: int, device: torch.device) -> int:
    """Say how many pixels are worked on at once.

    Args:
        on_cpu: What caches and threads of a CPU ask for.
        device: Where they are worked on.

    Returns:
        That many on a CPU; elsewhere at least ``ACCELERATOR_PIXELS``.
    """
    return on_cpu if device.type == "cpu" else max(on_cpu, ACCELERATOR_PIXELS)


def even_cuts(rows: int, row_pixels: int, most_pixels: int) -> list[tuple[int, int]]:
    """Cut rows of ``row_pixels`` into bands ``(start, stop)`` of about equal height and at most ``most_pixels``.

    Args:
        rows: Rows of a frame.
        row_pixels: Pixels of a row, over the batch.
        most_pixels: Most pixels of a band; a band has one row at least.

    Returns:
        Bands from top to bottom.
    """
    count = -(-rows // max(1, most_pixels // row_pixels))
    return [(rows * band // count, rows * (band + 1) // count) for band in range(count)]


def bands_of(frame: Frame) -> tuple[Tensor, ...]:
    """List the bands of a frame; a whole one is its only band."""
    return frame if isinstance(frame, tuple) else (frame,)


def whole(frame: Frame) -> Tensor:
    """Join the bands of a frame."""
    return torch.cat(frame, dim=3) if isinstance(frame, tuple) else frame


def frame_size(frame: Frame) -> tuple[int, int, int]:
    """Give batch, rows and columns of a frame."""
    bands = bands_of(frame)
    return len(bands[0]), sum(band.shape[3] for band in bands), bands[0].shape[4]


class Rows:
    """Rows of one frame, of which the upper ones can be let go of.

    Args:
        frame: The frame.
    """

    def __init__(self, frame: Frame) -> None:
        self._bands: list[tuple[int, Tensor]] = []
        self.height = 0
        for band in bands_of(frame):
            self._bands.append((self.height, band))
            self.height += band.shape[3]

    def take(self, start: int, stop: int) -> Tensor:
        """Give rows within the frame, ``(b, c, stop - start, w)``: a view where one band has them all."""
        parts = [
            band[:, :, 0, max(start - first, 0) : stop - first]
            for first, band in self._bands
            if first < stop and start < first + band.shape[3]
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def gather(self, start: int, stop: int, out: Tensor) -> None:
        """Copy rows; those beyond the frame's edge become zeros.

        Args:
            start: First row; may be negative.
            stop: Behind the last row; may lie beyond the frame.
            out: ``(b, c, stop - start, w)``.
        """
        out[:, :, : max(-start, 0)].zero_()
        out[:, :, min(self.height, stop) - start :].zero_()
        for first, band in self._bands:
            above, below = max(first, start), min(first + band.shape[3], stop)
            if above < below:
                out[:, :, above - start : below - start] = band[:, :, 0, above - first : below - first]

    def drop_above(self, row: int) -> None:
        """Let go of bands that lie above a row as a whole."""
        self._bands = [(first, band) for first, band in self._bands if first + band.shape[3] > row]


def join_bands(bands: Iterable[Tensor], out: Tensor, kept: Tensor | None = None) -> Tensor:
    """Write bands ``(b, c, t, rows, w)`` into a tensor one by one, as they come.

    Args:
        bands: From top to bottom.
        out: ``(b, c, t, h, w)``, is written.
        kept: Is added, of the same shape.

    Returns:
        ``out``.
    """
    start = 0
    for band in bands:
        stop = start + band.shape[3]
        rows = out[:, :, :, start:stop]
        rows.copy_(band) if kept is None else torch.add(band, kept[:, :, :, start:stop], out=rows)
        start = stop
        del band  # not beside the next one
    return out
