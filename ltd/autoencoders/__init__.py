"""Causal video autoencoders, their losses, latent statistics and files. Knows nothing of training or processes."""

from ltd.autoencoders.autoencoder import Autoencoder, Side
from ltd.autoencoders.bottleneck import BottleneckConfig, KlConfig, QuantizedPosterior
from ltd.autoencoders.build import AutoencoderConfig, build_autoencoder
from ltd.autoencoders.causal_vae import CausalVae, CausalVaeConfig
from ltd.autoencoders.conv_vae import ConvVae, ConvVaeConfig
from ltd.autoencoders.discriminators import DiscriminatorConfig, PatchDiscriminator, build_discriminator
from ltd.autoencoders.equivariance import EquivarianceConfig
from ltd.autoencoders.files import load, save, weights_hash
from ltd.autoencoders.inflate import inflate
from ltd.autoencoders.initialize import initialize_from_data
from ltd.autoencoders.latents import LatentNorm, LatentStatistics, Posterior
from ltd.autoencoders.losses import AutoencoderLoss, AutoencoderLossConfig
from ltd.autoencoders.quantizers import FsqConfig, VqConfig

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "AutoencoderLoss",
    "AutoencoderLossConfig",
    "BottleneckConfig",
    "CausalVae",
    "CausalVaeConfig",
    "ConvVae",
    "ConvVaeConfig",
    "DiscriminatorConfig",
    "EquivarianceConfig",
    "FsqConfig",
    "KlConfig",
    "LatentNorm",
    "LatentStatistics",
    "PatchDiscriminator",
    "Posterior",
    "QuantizedPosterior",
    "Side",
    "VqConfig",
    "build_autoencoder",
    "build_discriminator",
    "inflate",
    "initialize_from_data",
    "load",
    "save",
    "weights_hash",
]
