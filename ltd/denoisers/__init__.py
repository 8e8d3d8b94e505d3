"""Denoisers: models that predict the velocity of noisy latents under conditions."""

from ltd.denoisers.conditioning import NULL_LABEL, Conditioning, stack
from ltd.denoisers.dit import Dit, DitConfig
from ltd.denoisers.files import TIME_CONVENTION, build_denoiser, describe, load, save
from ltd.denoisers.parametrized import Parametrized
from ltd.denoisers.surgery import SurgeryConfig, SurgeryReport, transplant
from ltd.denoisers.weights import Weights, open_weights

__all__ = [
    "NULL_LABEL",
    "TIME_CONVENTION",
    "Conditioning",
    "Dit",
    "DitConfig",
    "Parametrized",
    "SurgeryConfig",
    "SurgeryReport",
    "Weights",
    "build_denoiser",
    "describe",
    "load",
    "open_weights",
    "save",
    "stack",
    "transplant",
]
