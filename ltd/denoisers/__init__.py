"""Denoisers: models that predict the velocity of noisy latents under conditions."""

from ltd.denoisers.conditioning import NULL_LABEL, Conditioning, stack
from ltd.denoisers.dit import Dit, DitConfig
from ltd.denoisers.files import TIME_CONVENTION, build_denoiser, describe, load, save
from ltd.denoisers.parametrized import Parametrized

__all__ = [
    "NULL_LABEL",
    "TIME_CONVENTION",
    "Conditioning",
    "Dit",
    "DitConfig",
    "Parametrized",
    "build_denoiser",
    "describe",
    "load",
    "save",
    "stack",
]
