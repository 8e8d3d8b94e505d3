"""Mathematics of diffusion: paths, times, objectives, samplers, guidance. A denoiser is any callable (x_t, t, cond)."""

from ltd.diffusion.guidance import Denoiser, GuidanceConfig, Guided, PrepareSteps, guided
from ltd.diffusion.known import with_known
from ltd.diffusion.objectives import FlowMatching, FlowMatchingConfig
from ltd.diffusion.paths import (
    GvpPathConfig,
    LinearPath,
    LinearPathConfig,
    Path,
    PathConfig,
    VpPathConfig,
    build_path,
    expand_time,
)
from ltd.diffusion.prediction import (
    DataPredictionConfig,
    EdmPredictionConfig,
    NoisePredictionConfig,
    ParametrizationConfig,
    PredictionConfig,
    VelocityPredictionConfig,
    as_denoiser,
    build_prediction,
    network_times,
    read_parametrization,
)
from ltd.diffusion.samplers import SamplerConfig, sample, time_grid
from ltd.diffusion.times import (
    LogitNormalConfig,
    LognormalConfig,
    ModeConfig,
    ShiftConfig,
    UniformConfig,
    draw_times,
    quantile_times,
    shift_times,
)

__all__ = [
    "DataPredictionConfig",
    "Denoiser",
    "EdmPredictionConfig",
    "FlowMatching",
    "FlowMatchingConfig",
    "GuidanceConfig",
    "Guided",
    "GvpPathConfig",
    "LinearPath",
    "LinearPathConfig",
    "LogitNormalConfig",
    "LognormalConfig",
    "ModeConfig",
    "NoisePredictionConfig",
    "ParametrizationConfig",
    "Path",
    "PathConfig",
    "PredictionConfig",
    "PrepareSteps",
    "SamplerConfig",
    "ShiftConfig",
    "UniformConfig",
    "VelocityPredictionConfig",
    "VpPathConfig",
    "as_denoiser",
    "build_path",
    "build_prediction",
    "draw_times",
    "expand_time",
    "guided",
    "network_times",
    "quantile_times",
    "read_parametrization",
    "sample",
    "shift_times",
    "time_grid",
    "with_known",
]
