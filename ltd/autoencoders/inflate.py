"""From an image VAE to a video VAE that starts out as it: every weight goes into the last frame a kernel sees.

Reference: Lin et al., Open-Sora Plan (2024), arXiv 2412.00131, Sec. 2.1 (tail initialisation).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ltd.autoencoders.conv_vae import ConvVae
from ltd.config import ConfigError


@torch.no_grad()
def inflate(image_vae: ConvVae, *, halve_time: tuple[bool, ...], tail: bool = True) -> ConvVae:
    """Make a video VAE of an image VAE.

    Where no level halves time, each frame gives what the image VAE gives for it. Where levels do, a latent frame is the
    image VAE's of the last frame it stands for, and all frames that it decodes to are that frame; the first frame,
    and with it an image, is the image VAE's.

    Args:
        image_vae: Model with ``temporal_kernel`` 1.
        halve_time: Between which levels the number of frames is to be halved.
        tail: Whether the weights of the frames before the last are zero; otherwise they are drawn from torch's global
            generator as for a new model, for comparison.

    Returns:
        A model with ``temporal_kernel`` 3 on the CPU, in the image VAE's dtype, with its latent statistics.

    Raises:
        ConfigError: If the model is no image VAE.
    """
    if image_vae.config.temporal_kernel != 1:
        raise ConfigError(f"temporal_kernel: got {image_vae.config.temporal_kernel}, needed an image VAE's, which is 1")
    config = dataclasses.replace(image_vae.config, temporal_kernel=3, halve_time=halve_time, front="repeat")
    model = ConvVae(config)
    source = image_vae.state_dict()
    for name, value in model.state_dict().items():
        given = source.get(name)
        if given is None:
            if tail:
                _keep_last_frame(name, value)
        elif given.shape == value.shape:
            value.copy_(given)
        else:
            value[:, :, -1:].copy_(given)
            if tail:
                value[:, :, :-1].zero_()
    return model.to(next(image_vae.parameters()).dtype)


def _keep_last_frame(name: str, value: Tensor) -> None:
    """Make a convolution over frames pass the last one it sees; one that doubles them gives it twice."""
    value.zero_()
    if name.endswith(".weight"):
        channels = value.shape[1]
        eye = torch.eye(channels, dtype=value.dtype)
        value[:, :, -1, 0, 0] = eye.repeat(value.shape[0] // channels, 1)
