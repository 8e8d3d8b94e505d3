"""Sizes of videos, latents and tokens: the only place that knows the 1 + (t - 1) / f rule. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoShape:
    """Size of a clip in pixels (or of its latents, in latent cells); an image has ``num_frames == 1``."""

    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.num_frames, self.height, self.width) < 1:
            raise ValueError(f"a video shape needs positive sizes, got {self}")

    @property
    def num_cells(self) -> int:
        """Number of pixels (or latent cells) over all frames."""
        return self.num_frames * self.height * self.width

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Compression:
    """Pixels per latent cell along each axis of a causal autoencoder; the first frame is a latent frame of its own."""

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        if min(self.t, self.h, self.w) < 1:
            raise ValueError(f"compression factors are positive integers, got {self}")

    def latent_frames(self, num_frames: int) -> int:
        """Count the latent frames of a clip.

        Args:
            num_frames: Frames of the clip; must be ``1 + k * t``.

        Returns:
            ``1 + (num_frames - 1) / t``.

        Raises:
            ValueError: If ``num_frames`` is off the rule; names the two nearest lengths.
        """
        if num_frames < 1 or (num_frames - 1) % self.t:
            lower = max(1, 1 + (num_frames - 1) // self.t * self.t)
            raise ValueError(
                f"num_frames must be 1 + k * {self.t} (compression.t), got {num_frames}; "
                f"the nearest are {lower} and {lower + self.t}"
            )
        return 1 + (num_frames - 1) // self.t

    def video_frames(self, latent_frames: int) -> int:
        """Count the frames that ``latent_frames`` latent frames decode to."""
        return 1 + (latent_frames - 1) * self.t

    def latent(self, shape: VideoShape) -> VideoShape:
        """Compute the latent size of a clip.

        Args:
            shape: Size of the clip in pixels.

        Returns:
            Size of its latents.

        Raises:
            ValueError: If an axis does not divide; names the axis and the nearest sizes.
        """
        for name, size, factor in (("height", shape.height, self.h), ("width", shape.width, self.w)):
            if size % factor:
                lower = size // factor * factor
                nearest = f"{lower} and {lower + factor}" if lower else f"{factor}"
                raise ValueError(f"{name} must be a multiple of {factor} (compression), got {size}; nearest: {nearest}")
        return VideoShape(self.latent_frames(shape.num_frames), shape.height // self.h, shape.width // self.w)

    def video(self, shape: VideoShape) -> VideoShape:
        """Compute the size in pixels of the clip that latents of this size decode to."""
        return VideoShape(self.video_frames(shape.num_frames), shape.height * self.h, shape.width * self.w)


def num_tokens(latent: VideoShape, patch: tuple[int, int, int]) -> int:
    """Count the transformer tokens of latents of one size.

    Args:
        latent: Size of the latents in cells.
        patch: Latent cells per token along (t, h, w).

    Returns:
        Number of tokens.

    Raises:
        ValueError: If an axis does not divide by the patch.
    """
    sizes = (latent.num_frames, latent.height, latent.width)
    for axis, size, step in zip(("t", "h", "w"), sizes, patch, strict=True):
        if size % step:
            raise ValueError(f"latent axis {axis} of size {size} does not divide by model.patch[{axis}] = {step}")
    return (sizes[0] // patch[0]) * (sizes[1] // patch[1]) * (sizes[2] // patch[2])
