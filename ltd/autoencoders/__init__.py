"""Causal video autoencoders, their losses, latent statistics and files. Knows nothing of training or processes."""

from ltd.autoencoders.build import AutoencoderConfig, build_autoencoder
from ltd.autoencoders.causal_vae import CausalVae, CausalVaeConfig
from ltd.autoencoders.files import load, save, weights_hash
from ltd.autoencoders.initialize import initialize_from_data
from ltd.autoencoders.latents import LatentNorm, LatentStatistics, Posterior
from ltd.autoencoders.losses import AutoencoderLoss, AutoencoderLossConfig

__all__ = [
    "AutoencoderConfig",
    "AutoencoderLoss",
    "AutoencoderLossConfig",
    "CausalVae",
    "CausalVaeConfig",
    "LatentNorm",
    "LatentStatistics",
    "Posterior",
    "build_autoencoder",
    "initialize_from_data",
    "load",
    "save",
    "weights_hash",
]
