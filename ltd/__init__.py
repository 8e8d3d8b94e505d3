"""ltd (latent transformer diffusion): train image and video latent diffusion transformers."""

__version__ = "0.1.0"
