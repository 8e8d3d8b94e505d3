"""Sampling around what is known: known cells follow their exact course from noise to data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltd.diffusion.guidance import Denoiser
from ltd.diffusion.paths import LinearPathConfig, PathConfig, build_path


def with_known(denoiser: Denoiser, data: Tensor, known: Tensor, path: PathConfig | None = None) -> Denoiser:
    """Make a denoiser whose velocity is the true one where the data are known.

    A solver then ends there at the data, to rounding: put them in its result for the very bits. What the denoiser says
    of these cells is never used; guidance that looks at all cells (its rescaling) wants it wrapped inside too.

    Args:
        denoiser: Any ``(x_t, t, cond) -> v``, guided or not.
        data: Known data ``(b, c, t, h, w)``; what they are where ``known`` is False does not matter.
        known: Bool ``(b, 1, t, h, w)``.
        path: Path of the velocities; the linear one by default.

    Returns:
        A denoiser of ``b`` rows, or of several copies of them one behind another, as guidance makes; nothing divides by
        0 at t = 0.
    """
    course = build_path(path or LinearPathConfig())

    def wrapped(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        v = denoiser(x_t, t, cond)
        wide = torch.promote_types(v.dtype, torch.float32)
        time = t.to(wide).clamp_min(1e-6).reshape(-1, *[1] * (v.ndim - 1))
        copies = len(v) // len(data)
        x0, given = (part.to(v.device).repeat(copies, 1, 1, 1, 1) for part in (data.to(wide), known))
        noise = (x_t.to(wide) - course.alpha(time) * x0) / course.sigma(time)
        exact = course.alpha_dot(time) * x0 + course.sigma_dot(time) * noise
        return torch.where(given, exact.to(v.dtype), v)

    return wrapped
