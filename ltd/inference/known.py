"""Known frames of a sample: media -> latents and mask, arranged on a clip as the autoencoder needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ltd.autoencoders import Autoencoder
from ltd.config import ConfigError
from ltd.data.decode import decode_clip, decode_image, probe
from ltd.data.transforms import cover
from ltd.denoisers import TASKS, Frames, Task, task_mask
from ltd.inference.media import pixels_to_video
from ltd.shapes import VideoShape

_IMAGES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is known of a sample."""

    task: Task
    #: Files of images or videos: the first frame, or first and last, or the clip.
    media: tuple[str, ...]
    #: Latent frames (in patches) that extension and retrodiction keep; of interpolation, every how many one is kept.
    known: int = 1
    #: Hole of inpainting in pixels (top, left, height, width); null is the middle half.
    box: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS[1:]:
            raise ConfigError(f"task: got {self.task!r}, needed one of {', '.join(TASKS[1:])}")
        if self.known < 1:
            raise ConfigError(f"known: got {self.known}, needed 1 or more")
        if self.box is not None and self.task != "inpainting":
            raise ConfigError(f"box: got one for task {self.task}, only inpainting has a hole")
        for path in self.media:
            if not Path(path).is_file():
                raise ConfigError(f"condition: {path} does not exist")
        if not self.media:
            raise ConfigError(f"condition: task {self.task} needs a file")


def read_clips(given: Given, shape: VideoShape) -> list[np.ndarray]:
    """Read the media of a sample, scaled and cut to its size.

    Args:
        given: What is known.
        shape: Of the sample in pixels.

    Returns:
        uint8 ``(t, h, w, 3)`` each; an image is one frame.

    Raises:
        ConfigError: If a file cannot be read.
    """
    clips = []
    for path in given.media:
        data = Path(path).read_bytes()
        try:
            if Path(path).suffix.lower() in _IMAGES:
                frames = decode_image(data)
            else:
                frames = decode_clip(data, start=0, num_frames=probe(data).frames)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"condition: {path} cannot be read: {error}") from None
        clips.append(cover(frames, shape.height, shape.width))
    return clips


def arrange(given: Given, clips: list[np.ndarray], shape: VideoShape, stride: int, patch_frames: int = 1) -> np.ndarray:
    """Lay known frames out on the sample's clip; unknown frames repeat the nearest known one.

    A causal autoencoder sees earlier frames only, so that what lies behind what is known changes no latent of it.

    Args:
        given: What is known.
        clips: What ``read_clips`` gave.
        shape: Of the sample in pixels.
        stride: Frames per latent frame after the first.
        patch_frames: Latent frames per patch.

    Returns:
        uint8 ``(num_frames, h, w, 3)``.

    Raises:
        ConfigError: If a clip has too few frames; says how many are needed.
    """
    total = shape.num_frames
    first, last = clips[0], clips[-1]
    match given.task:
        case "image_to_video":
            return np.repeat(first[:1], total, axis=0)
        case "first_last":
            end = min(patch_frames * stride, total - 1)
            return np.concatenate((np.repeat(first[:1], total - end, axis=0), np.repeat(last[-1:], end, axis=0)))
        case "extension":
            count = 1 + (given.known * patch_frames - 1) * stride
            _enough(given, first, count)
            return np.concatenate((first[-count:], np.repeat(first[-1:], total - count, axis=0)))
        case "retrodiction":
            count = min(given.known * patch_frames * stride, total - 1)
            _enough(given, first, count)
            return np.concatenate((np.repeat(first[:1], total - count, axis=0), first[:count]))
        case _:
            _enough(given, first, total)
            return first[:total]


def known_latents(
    given: Given, frames: np.ndarray, autoencoder: Autoencoder, patch: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Encode an arranged clip and say which of its latents are known.

    Args:
        given: What is known.
        frames: What ``arrange`` gave.
        autoencoder: Of the denoiser's latents.
        patch: Latent cells per token.

    Returns:
        Unit-scale latents ``(1, c, t, h, w)`` (the posterior's mean); bool ``(1, 1, t, h, w)``.

    Raises:
        ValueError: If the clip is too short for the task, or the hole is not made of whole patches.
    """
    device = next(autoencoder.parameters()).device
    video = pixels_to_video(torch.from_numpy(frames)[None]).to(device)
    with torch.no_grad():
        latents = autoencoder.normalize(autoencoder.encode(video).mean)
    cells = (latents.shape[2], latents.shape[3], latents.shape[4])
    box = None
    if given.box is not None:
        compression = autoencoder.compression
        sides = (compression.h * patch[1], compression.w * patch[2]) * 2
        if any(number % side for number, side in zip(given.box, sides, strict=True)):
            raise ValueError(f"box: got {given.box} pixels, needed multiples of {sides[:2]} (rows, columns)")
        box = tuple(number // side for number, side in zip(given.box, sides, strict=True))
    mask = task_mask(given.task, cells, patch, known=given.known, box=box)  # type: ignore[arg-type]
    return latents, mask[None, None].to(device)


def batch_frames(
    given: Sequence[Given | None], shape: VideoShape, autoencoder: Autoencoder, patch: tuple[int, int, int]
) -> Frames | None:
    """Encode what is known of a batch.

    Args:
        given: Of each sample; None = nothing.
        shape: Of all samples in pixels.
        autoencoder: Of the denoiser's latents.
        patch: Latent cells per token.

    Returns:
        Unit-scale latents ``(b, c, t, h, w)`` and bool ``(b, 1, t, h, w)``; None when nothing is known of any.
    """
    stride = autoencoder.compression.t
    rows: list[tuple[Tensor, Tensor] | None] = []
    for one in given:
        clip = None if one is None else arrange(one, read_clips(one, shape), shape, stride, patch[0])
        rows.append(None if one is None or clip is None else known_latents(one, clip, autoencoder, patch))
    some = next((row for row in rows if row is not None), None)
    if some is None:
        return None
    empty = torch.zeros_like(some[0]), torch.zeros_like(some[1])
    pairs = [row or empty for row in rows]
    return Frames(torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs]))


def tail_frames(
    pixels: Tensor, known: int, shape: VideoShape, autoencoder: Autoencoder, patch: tuple[int, int, int]
) -> Frames:
    """Encode the end of videos as the known beginning of the next segment.

    Args:
        pixels: uint8 ``(b, t, h, w, 3)``; at least the frames of ``known`` latent frames (in patches).
        known: Latent frames (in patches) that are known.
        shape: Of a segment in pixels.
        autoencoder: Of the denoiser's latents.
        patch: Latent cells per token.

    Returns:
        Unit-scale latents ``(b, c, t, h, w)`` and bool ``(b, 1, t, h, w)``.

    Raises:
        ValueError: If a segment has no more frames than are known.
    """
    count = tail_length(known, autoencoder, patch)
    rest = pixels[:, -1:].expand(-1, max(0, shape.num_frames - count), -1, -1, -1)
    video = pixels_to_video(torch.cat((pixels[:, -count:], rest), 1)).to(next(autoencoder.parameters()).device)
    with torch.no_grad():
        latents = autoencoder.normalize(autoencoder.encode(video).mean)
    cells = (latents.shape[2], latents.shape[3], latents.shape[4])
    mask = task_mask("extension", cells, patch, known=known).to(latents.device)
    return Frames(latents, mask[None, None].expand(len(latents), -1, -1, -1, -1))


def tail_length(known: int, autoencoder: Autoencoder, patch: tuple[int, int, int]) -> int:
    """Count the frames in pixels that so many latent frames (in patches) stand for at the start of a clip."""
    return 1 + (known * patch[0] - 1) * autoencoder.compression.t


def told(frames: Frames, mode: str, mask_channels: int) -> Frames:
    """Give known latents the form that a denoiser takes: beside the input, unknown ones are zeros."""
    if mode != "channels":
        return frames
    return Frames(torch.where(frames.mask, frames.latents, 0), frames.mask.expand(-1, mask_channels, -1, -1, -1))


def _enough(given: Given, clip: np.ndarray, needed: int) -> None:
    if len(clip) < needed:
        raise ConfigError(
            f"condition: {given.media[0]} has {len(clip)} frames, task {given.task} with known = {given.known} needs "
            f"{needed}"
        )
