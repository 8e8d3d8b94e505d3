"""Mathematics of diffusion: paths, times, objectives, samplers, guidance. A denoiser is any callable (x_t, t, cond)."""

from ltd.diffusion.guidance import Denoiser, GuidanceConfig, guided
from ltd.diffusion.objectives import FlowMatching, FlowMatchingConfig
from ltd.diffusion.paths import LinearPath
from ltd.diffusion.samplers import SamplerConfig, sample, time_grid
from ltd.diffusion.times import (
    LogitNormalConfig,
    ShiftConfig,
    UniformConfig,
    draw_times,
    quantile_times,
    shift_times,
)

__all__ = [
    "Denoiser",
    "FlowMatching",
    "FlowMatchingConfig",
    "GuidanceConfig",
    "LinearPath",
    "LogitNormalConfig",
    "SamplerConfig",
    "ShiftConfig",
    "UniformConfig",
    "draw_times",
    "guided",
    "quantile_times",
    "sample",
    "shift_times",
    "time_grid",
]
