"""From an autoencoder's configuration to the module."""

from __future__ import annotations

from typing import TypeAlias

from ltd.autoencoders.autoencoder import Autoencoder
from ltd.autoencoders.causal_vae import CausalVae, CausalVaeConfig
from ltd.autoencoders.conv_vae import ConvVae, ConvVaeConfig

AutoencoderConfig: TypeAlias = CausalVaeConfig | ConvVaeConfig


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """Build the autoencoder that ``config.kind`` names, freshly initialised from torch's global generator."""
    match config:
        case CausalVaeConfig():
            return CausalVae(config)
        case ConvVaeConfig():
            return ConvVae(config)
