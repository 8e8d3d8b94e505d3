"""Long videos, segment by segment: each begins with the end of the one before, encoded anew as the start of a clip.

A causal autoencoder gives the first frame of a clip a latent frame of its own, so the last latents of a segment are no
start of another: its last frames are encoded again. Of all that was made, only these frames are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.inference.generate import Generator, Request
from ltd.inference.known import Tail, check_known, tail_length
from ltd.inference.media import video_to_pixels
from ltd.nn.patch import token_grid

#: Tasks whose known frames lie at the start, so that a first segment may have them.
_FIRST = (None, "image_to_video", "extension")


def check_segments(generator: Generator, request: Request, segments: int, overlap: int) -> None:
    """Refuse segments that cannot be made, before any work.

    Args:
        generator: What makes them.
        request: A sample.
        segments: Number of segments; 1 needs nothing.
        overlap: Latent frames (in patches) that a segment begins with.

    Raises:
        ConfigError: If the denoiser takes no known frames, or a segment is all overlap, or its end is known.
    """
    if segments == 1:
        return
    check_known([generator.denoiser, generator.guide])
    latent = generator.autoencoder.compression.latent(request.shape)
    frames = token_grid(latent, generator.denoiser.config.patch)[0]
    if overlap >= frames:
        raise ConfigError(
            f"--overlap: got {overlap}, needed fewer than the latent frames (in patches) of {request.shape}, {frames}; "
            "with --shapes, more frames"
        )
    task = None if request.given is None else request.given.task
    if task not in _FIRST:
        raise ConfigError(
            f"--segments: got {segments} with task {task}; needed image_to_video or extension, which tell the start"
        )


def make_segments(
    draw: Callable[[Tail | None], Tensor], segments: int, overlap: int, length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Make videos segment by segment; memory does not grow with their number.

    Args:
        draw: Makes a segment ``(b, 3, t, h, w)`` in pixels, about [-1, 1], that begins with a tail; None is the first.
        segments: Number of segments.
        overlap: Latent frames (in patches) that a segment begins with.
        length: Frames that these stand for (``tail_length``).

    Yields:
        The frames that a segment adds, uint8 ``(b, t, h, w, 3)``, CPU; and which samples are finite, bool ``(b,)``.
    """
    tail = None
    for segment in range(segments):
        video = draw(tail)
        finite = video.flatten(1).isfinite().all(1).cpu()
        pixels = video_to_pixels(video).cpu()
        del video
        if tail is not None:
            pixels = pixels[:, length:]
        yield pixels, finite
        before = pixels if tail is None else torch.cat((tail.pixels, pixels), 1)
        tail = Tail(pixels=before[:, -length:].clone(), known=overlap, segment=segment + 1)


def segment_length(generator: Generator, overlap: int) -> int:
    """Count the frames that segments share."""
    return tail_length(overlap, generator.autoencoder, generator.denoiser.config.patch)
