"""From an autoencoder's configuration to the module."""

from __future__ import annotations

from typing import TypeAlias

from ltd.autoencoders.causal_vae import CausalVae, CausalVaeConfig

AutoencoderConfig: TypeAlias = CausalVaeConfig


def build_autoencoder(config: AutoencoderConfig) -> CausalVae:
    """Build the autoencoder that ``config.kind`` names, freshly initialised from torch's global generator."""
    match config.kind:
        case "causal_vae":
            return CausalVae(config)
