"""What is refused before a denoiser computes anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltd.denoisers.conditioning import Conditioning
from ltd.denoisers.config import DitConfig

#: Difference of times, from rounding, up to which they are one.
_SAME_TIME = 1e-4
#: Largest size of a time that a network is given: beyond EDM's ln(sigma / alpha) / 4, below diffusion steps up to 1000.
_MAX_TIME = 20.0


def check_inputs(config: DitConfig, x_t: Tensor | Sequence[Tensor], t: Tensor, cond: Conditioning) -> None:
    """Refuse what does not fit a model.

    Args:
        config: Of the model.
        x_t: Latents ``(b, c, t, h, w)``, or samples ``(c, t, h, w)``.
        t: Times.
        cond: Conditions.

    Raises:
        ValueError: If a shape does not fit, or a condition is given that the model was built without; names the field.
    """
    _check_latents(config, x_t, t)
    packed = not isinstance(x_t, Tensor)
    if cond.text is not None:
        if cond.text.shape[2] != config.text_dim:
            raise ValueError(
                f"text: got embeddings of size {cond.text.shape[2]}, the model has model.text_dim = {config.text_dim}"
            )
        if config.text_length is not None and cond.text.shape[1] > config.text_length:
            raise ValueError(
                f"text: got {cond.text.shape[1]} tokens, the model reads at most model.text_length = "
                f"{config.text_length}; shorten the prompt or the text encoder's max_length"
            )
        wanted = sum(tokens for tokens, _ in config.text_parts)
        if config.text_parts and cond.text.shape[1] != wanted:
            raise ValueError(
                f"text: got {cond.text.shape[1]} tokens, needed {wanted}: those of all model.text_parts = "
                f"{config.text_parts}"
            )
    _check_label(config, cond.label)
    if cond.batch_size not in (None, len(x_t)):
        raise ValueError(f"conditions: got {cond.batch_size} rows for {len(x_t)} latents")
    if cond.scalars is not None and cond.scalars.shape[1] != len(config.scalars):
        raise ValueError(f"scalars: got {cond.scalars.shape[1]} columns, needed model.scalars = {config.scalars}")
    if cond.image is not None and cond.image.shape[2] != config.image_dim:
        raise ValueError(
            f"image: got tokens of size {cond.image.shape[2]}, needed model.image_dim = {config.image_dim}"
        )
    for name in ("image", "kept", "prepared"):
        if packed and getattr(cond, name) is not None:
            raise ValueError(f"{name}: cannot be given with samples of several sizes in one sequence")
    if cond.kept is not None and config.mixer_depth == 0:
        raise ValueError("kept: the model drops no tokens (model.mixer_depth is 0)")
    _check_size(t)
    _check_step(t, cond)
    _check_frames(config, x_t, cond)


def check_times(t: Tensor) -> None:
    """Refuse times of a denoiser outside [0, 1]; on another device than the CPU, looking would wait for it.

    Args:
        t: Times, of any shape.

    Raises:
        ValueError: If one lies outside, or is NaN.
    """
    if _readable(t) and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t: got {t.flatten().tolist()}, needed times in [0, 1], 0 of data and 1 of noise")


def _check_size(t: Tensor) -> None:
    """Refuse steps out of 1000 and the like; a network under EDM's prediction is rightly told times beyond [0, 1]."""
    if _readable(t) and not bool((t.abs() <= _MAX_TIME).all()):
        raise ValueError(f"t: got {t.flatten().tolist()}, needed times in [0, 1], 0 of data and 1 of noise")


def _readable(x: Tensor) -> bool:
    """Say whether looking at values costs nothing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_label(config: DitConfig, label: Tensor | None) -> None:
    if label is None:
        return
    if config.num_classes is None:
        raise ValueError("label: the model was built without classes (model.num_classes)")
    if _readable(label) and bool((label >= config.num_classes).any()):
        raise ValueError(
            f"label: got {int(label.max())}, needed less than model.num_classes = {config.num_classes}; the null class "
            "is a negative label"
        )


def _check_step(t: Tensor, cond: Conditioning) -> None:
    """Refuse conditions that were made for another time; on another device than the CPU, looking would wait for it."""
    step = None if cond.prepared is None else cond.prepared.step
    if step is None:
        return
    if t.ndim != 1:
        raise ValueError(
            "t: got a time for every latent frame with conditions prepared for a step, needed one a sample"
        )
    if _readable(t) and abs(float(t[0]) - step.time) > _SAME_TIME:
        raise ValueError(f"t: got {float(t[0]):g} with conditions prepared for the step at {step.time:g}")


def _check_latents(config: DitConfig, x_t: Tensor | Sequence[Tensor], t: Tensor) -> None:
    whole = isinstance(x_t, Tensor)
    shapes = [tuple(x.shape) for x in ((x_t,) if isinstance(x_t, Tensor) else x_t)]
    for shape in shapes or [()]:  # a pack needs a sample
        if len(shape) != 4 + whole or shape[int(whole)] != config.latent_channels:
            needed = f"({'b, ' if whole else ''}model.latent_channels = {config.latent_channels}, t, h, w)"
            raise ValueError(f"latents: got {shape}, needed {needed}")
    per_frame = isinstance(x_t, Tensor) and tuple(t.shape) == (len(x_t), x_t.shape[2])
    if tuple(t.shape) != (len(x_t),) and not per_frame:
        needed = f"({len(x_t)},)" + (f" or ({len(x_t)}, {x_t.shape[2]})" if isinstance(x_t, Tensor) else "")
        raise ValueError(f"t: got {tuple(t.shape)}, needed {needed}")


def _check_frames(config: DitConfig, x_t: Tensor | Sequence[Tensor], cond: Conditioning) -> None:
    if cond.frames is None:
        return
    if config.frames == "none":
        raise ValueError("frames: the model was built without known latents (model.frames is none)")
    if isinstance(cond.frames, tuple) == isinstance(x_t, Tensor):
        raise ValueError("frames: needed one for a batch of latents, and a tuple of one per sample of several sizes")
    channels = config.frame_mask_channels if config.frames == "channels" else 1
    parts = cond.frames if isinstance(cond.frames, tuple) else (cond.frames,)
    needed = [(1, *x.shape) for x in x_t] if isinstance(cond.frames, tuple) else [tuple(x_t.shape)]  # type: ignore[union-attr]
    for frames, shape in zip(parts, needed, strict=True):
        if frames.latents.shape != shape:
            raise ValueError(f"frames: got latents {tuple(frames.latents.shape)}, needed {tuple(shape)}")
        if frames.mask.shape[1] != channels:
            raise ValueError(f"frames: got a mask of {frames.mask.shape[1]} channels, needed {channels}")
