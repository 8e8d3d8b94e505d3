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
from ltd.data.batch import BadSampleError
from ltd.data.decode import decode_clip, decode_image, probe
from ltd.denoisers import TASKS, Dit, Frames, Parametrized, Task, task_mask
from ltd.denoisers import told as told
from ltd.inference.media import pixels_to_video
from ltd.shapes import Compression, VideoShape

#: Tasks that ``Given.known`` is for.
COUNTED = frozenset({"extension", "retrodiction", "interpolation"})
_IMAGES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is known of a sample."""

    task: Task
    #: One file, an image or a video; of first_last two, or one video whose ends are meant.
    media: tuple[str, ...]
    #: Latent frames (in patches) that extension and retrodiction keep; of interpolation, every how many one is kept.
    known: int = 1
    #: Hole of inpainting in pixels (top, left, height, width); null is the middle half.
    box: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS[1:]:
            raise ConfigError(f"task: got {self.task!r}, needed one of {', '.join(TASKS[1:])}")
        least = 2 if self.task == "interpolation" else 1
        if not isinstance(self.known, int) or self.known < least:
            raise ConfigError(f"known: got {self.known!r} for task {self.task}, needed {least} or more")
        if self.box is not None and self.task != "inpainting":
            raise ConfigError(f"box: got one for task {self.task}, only inpainting has a hole")
        if self.box is not None and (len(self.box) != 4 or not all(isinstance(number, int) for number in self.box)):
            raise ConfigError(f"box: got {self.box}, needed (top, left, height, width) in pixels")
        most = 2 if self.task == "first_last" else 1
        if not 1 <= len(self.media) <= most or not all(isinstance(path, str) for path in self.media):
            needed = "1 or 2" if most == 2 else "1"
            raise ConfigError(
                f"condition: got {list(self.media)} for task {self.task}, needed the names of {needed} files"
            )
        for path in self.media:
            if not Path(path).is_file():
                raise ConfigError(f"condition: {path} does not exist")


@dataclass(frozen=True, kw_only=True)
class Tail:
    """What a segment of a longer video begins with: the end of the one before."""

    #: uint8 ``(b, t, h, w, 3)``: the frames of ``known`` latent frames at the start of a clip (``tail_length``).
    pixels: Tensor
    #: Latent frames (in patches) that are known.
    known: int
    #: Number of the segment to make, from 1.
    segment: int


def check_known(models: Sequence[Dit | Parametrized | None]) -> None:
    """Refuse denoisers that take no known frames, or not all alike.

    Args:
        models: The denoiser, and what guidance leads away from.

    Raises:
        ConfigError: Names the option that asks for them.
    """
    takes = [(model.config.frames, model.config.frame_mask_channels) for model in models if model is not None]
    if any(mode == "none" for mode, _ in takes):
        raise ConfigError(
            "condition: a denoiser was trained without known frames (model.frames is none), so it can be given none; "
            "leave out --condition and --segments"
        )
    if len(set(takes)) > 1:
        raise ConfigError(f"guide: takes known frames as {takes[1]}, the denoiser as {takes[0]}; needed one alike")


def check_given(given: Given, shape: VideoShape, compression: Compression, patch: tuple[int, int, int]) -> None:
    """Refuse what cannot be known of a sample, before any work; media are looked into, not decoded.

    Args:
        given: What is known.
        shape: Of the sample in pixels.
        compression: Of the autoencoder.
        patch: Latent cells per token.

    Raises:
        ConfigError: If a file cannot be read or is too short, or the task does not fit the sample's size.
    """
    try:
        _mask(given, compression.latent(shape), compression, patch)
    except ValueError as error:
        raise ConfigError(f"condition: {shape}: {error}") from None
    frames = compression.latent(shape).num_frames // patch[0]
    if given.task == "interpolation" and given.known >= frames:
        raise ConfigError(
            f"condition: {shape}: task interpolation with known = {given.known} keeps the first of {frames} latent "
            f"frames (in patches) alone; needed known of at most {frames - 1}"
        )
    lengths = [_length(path, Path(path).read_bytes()) for path in given.media]
    _spans(given, lengths, shape, compression.t, patch[0])


def read_clips(given: Given, shape: VideoShape, stride: int, patch_frames: int = 1) -> list[np.ndarray]:
    """Read what is known of a sample, scaled and cut to its size; no frame beyond that is kept.

    Args:
        given: What is known.
        shape: Of the sample in pixels.
        stride: Frames per latent frame after the first.
        patch_frames: Latent frames per patch.

    Returns:
        uint8 ``(t, h, w, 3)`` each; an image is one frame.

    Raises:
        ConfigError: If a file cannot be read, or is too short.
    """
    data = [Path(path).read_bytes() for path in given.media]
    lengths = [_length(*pair) for pair in zip(given.media, data, strict=True)]
    clips, height, width = [], shape.height, shape.width
    for number, start, count in _spans(given, lengths, shape, stride, patch_frames):
        path = given.media[number]
        try:
            if Path(path).suffix.lower() in _IMAGES:
                clips.append(decode_image(data[number], height=height, width=width))
            else:
                clips.append(decode_clip(data[number], start=start, num_frames=count, height=height, width=width))
        except BadSampleError as error:
            raise ConfigError(f"condition: {path} cannot be read: {error}") from None
    return clips


def _length(path: str, data: bytes) -> int:
    """Count the frames of a file."""
    try:
        return probe(data, Path(path).suffix.lower().lstrip(".")).frames
    except BadSampleError as error:
        raise ConfigError(f"condition: {path} cannot be read: {error}") from None


def _spans(
    given: Given, lengths: Sequence[int], shape: VideoShape, stride: int, patch_frames: int
) -> list[tuple[int, int, int]]:
    """Say which frames of files of so many frames are needed: (number of the file, first frame, frames)."""
    last = len(lengths) - 1
    count = _count(given, shape, stride, patch_frames)
    if lengths[0] < count:
        raise ConfigError(
            f"condition: {given.media[0]} has {lengths[0]} frames, task {given.task} with known = {given.known} needs "
            f"{count}"
        )
    if given.task == "first_last":
        if last == 0 and lengths[0] < 2:
            raise ConfigError(f"condition: task first_last got one image, {given.media[0]}; needed two, or a video")
        return [(0, 0, 1), (last, lengths[last] - 1, 1)]
    return [(0, lengths[0] - count if given.task == "extension" else 0, count)]


def _count(given: Given, shape: VideoShape, stride: int, patch_frames: int) -> int:
    """Count the frames that a task needs of its first file."""
    match given.task:
        case "image_to_video" | "first_last":
            return 1
        case "extension":
            return 1 + (given.known * patch_frames - 1) * stride
        case "retrodiction":
            return min(given.known * patch_frames * stride, shape.num_frames - 1)
        case _:
            return shape.num_frames


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
    """
    total, count = shape.num_frames, _count(given, shape, stride, patch_frames)
    first, last = clips[0], clips[-1]
    match given.task:
        case "image_to_video":
            return np.repeat(first[:1], total, axis=0)
        case "first_last":
            end = min(patch_frames * stride, total - 1)
            return np.concatenate((np.repeat(first[:1], total - end, axis=0), np.repeat(last[-1:], end, axis=0)))
        case "extension":
            return np.concatenate((first[-count:], np.repeat(first[-1:], total - count, axis=0)))
        case "retrodiction":
            return np.concatenate((np.repeat(first[:1], total - count, axis=0), first[:count]))
        case _:
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
    mask = _mask(given, VideoShape(*latents.shape[2:]), autoencoder.compression, patch)
    return latents, mask[None, None].to(device)


def _mask(given: Given, latent: VideoShape, compression: Compression, patch: tuple[int, int, int]) -> Tensor:
    """Say which latent cells of a sample are known, ``(t, h, w)``."""
    box = None
    if given.box is not None:
        sides = (compression.h * patch[1], compression.w * patch[2]) * 2
        if any(number % side for number, side in zip(given.box, sides, strict=True)):
            raise ValueError(f"box: got {given.box} pixels, needed multiples of {sides[:2]} (rows, columns)")
        top, left, height, width = (number // side for number, side in zip(given.box, sides, strict=True))
        box = (top, left, height, width)
    cells = (latent.num_frames, latent.height, latent.width)
    return task_mask(given.task, cells, patch, known=given.known, box=box)


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
    encoded: dict[Given, tuple[Tensor, Tensor]] = {}  # samples of one prompt share what is known
    for one in given:
        if one is not None and one not in encoded:
            clip = arrange(one, read_clips(one, shape, stride, patch[0]), shape, stride, patch[0])
            encoded[one] = known_latents(one, clip, autoencoder, patch)
    if not encoded:
        return None
    empty = tuple(torch.zeros_like(part) for part in next(iter(encoded.values())))
    pairs = [empty if one is None else encoded[one] for one in given]
    return Frames(torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs]))


def tail_frames(tail: Tail, shape: VideoShape, autoencoder: Autoencoder, patch: tuple[int, int, int]) -> Frames:
    """Encode the end of videos as the known beginning of the next segment.

    Args:
        tail: That end.
        shape: Of a segment in pixels.
        autoencoder: Of the denoiser's latents.
        patch: Latent cells per token.

    Returns:
        Unit-scale latents ``(b, c, t, h, w)`` and bool ``(b, 1, t, h, w)``.

    Raises:
        ValueError: If a segment has no more frames than are known.
    """
    pixels, known = tail.pixels, tail.known
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
