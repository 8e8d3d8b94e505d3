"""What is asked of a denoiser: one image or video each, and how requests become batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ltd.inference.known import Given
from ltd.shapes import VideoShape


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image or video to make."""

    prompt: str
    #: Number of the sample among those of the same prompt and seed, from 0.
    repetition: int
    shape: VideoShape
    fps: float
    #: What is known of it; None = nothing.
    given: Given | None = None
    #: Class number; None = no class.
    label: int | None = None
    #: Name of the class, for rows and pictures.
    class_name: str = ""
    #: Height and width that the denoiser is told as the source's, in pixels; None = its own.
    original: tuple[int, int] | None = None
    #: Rows above and columns left of it that the denoiser is told were cut off, in pixels.
    crop: tuple[int, int] = (0, 0)

    @property
    def seeds(self) -> tuple[str, ...]:
        """What its noise is a function of besides prompt, repetition and shape."""
        return () if self.label is None else (f"class {self.label}",)

    @property
    def title(self) -> str:
        """What it shows, in words: its prompt, else its class."""
        return self.prompt or self.class_name or ("" if self.label is None else f"class {self.label}")


def batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Group requests into batches of one shape, in order.

    Args:
        requests: What to make.
        size: Largest batch.

    Yields:
        Up to ``size`` requests of equal shape.
    """
    batch: list[Request] = []
    for request in requests:
        if batch and (len(batch) == size or request.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch
