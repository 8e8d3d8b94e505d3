"""Denoisers: models that predict the velocity of noisy latents under conditions."""

from ltd.denoisers.conditioning import NULL_LABEL, Conditioning, Frames, stack
from ltd.denoisers.config import DitConfig, ExpertsConfig, HeadConfig
from ltd.denoisers.dit import Dit
from ltd.denoisers.dropping import draw_kept
from ltd.denoisers.files import TIME_CONVENTION, build_denoiser, count_parameters, describe, load, save
from ltd.denoisers.flops import DitFlops, DitInputs, count_flops
from ltd.denoisers.frame_tasks import TASKS, FrameTasksConfig, Task, draw_masks, draw_tasks, task_mask, told
from ltd.denoisers.parametrized import Parametrized
from ltd.denoisers.scalars import stack_scalars
from ltd.denoisers.surgery import SurgeryConfig, SurgeryReport, transplant
from ltd.denoisers.weights import Weights, open_weights

__all__ = [
    "NULL_LABEL",
    "TASKS",
    "TIME_CONVENTION",
    "Conditioning",
    "Dit",
    "DitConfig",
    "DitFlops",
    "DitInputs",
    "ExpertsConfig",
    "FrameTasksConfig",
    "Frames",
    "HeadConfig",
    "Parametrized",
    "SurgeryConfig",
    "SurgeryReport",
    "Task",
    "Weights",
    "build_denoiser",
    "count_flops",
    "count_parameters",
    "describe",
    "draw_kept",
    "draw_masks",
    "draw_tasks",
    "load",
    "open_weights",
    "save",
    "stack",
    "stack_scalars",
    "task_mask",
    "told",
    "transplant",
]
