"""Chunked encoding and decoding against the whole clip for every chunk size, and causality frame by frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ltd import config
from ltd.autoencoders import Autoencoder, AutoencoderConfig, CausalVaeConfig, ConvVaeConfig, build_autoencoder
from ltd.rng import generator
from ltd.training.autoencoder import AutoencoderRun
from tools.proofs.table import Proof

NAME = "streaming"
ROOT = Path(__file__).resolve().parents[2]
#: Largest difference over the output's standard deviation.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
FRAMES = 17
_NOTES = f"""{FRAMES} frames of noise, every weight redrawn. Encode and decode: largest difference between the clip in
chunks of 1, 2, ... latent frames and the whole clip, over the output's standard deviation. Gradient: of all weights and
the clip, recomputed in chunks of 4 frames against the whole clip's, over the largest value of each gradient; limit ten
times that of the outputs. Causality: each frame is perturbed in turn, and each latent frame; earlier latents (frames)
are compared bit for bit, and the perturbed one must change."""


def architectures() -> dict[str, AutoencoderConfig]:
    """List what is measured: the defaults and the released designs at a small width, and the quickstart's own model."""
    run = config.load(AutoencoderRun, ROOT / "configs" / "autoencoder" / "quickstart.yaml")
    blocks = (1, 1, 1)
    default = CausalVaeConfig(channels=(16, 32, 64), encoder_blocks=blocks, decoder_blocks=blocks, linear_path=True)
    return {
        "default 4x8x8, narrow, with linear path": default,
        "default without linear path, zero padding": dataclasses.replace(default, linear_path=False, padding="zeros"),
        "quickstart": run.model,
        "Wan 2.1 design, narrow": ConvVaeConfig(encoder_width=8, decoder_width=8, blocks=1),
        "Wan 2.2 design, narrow": ConvVaeConfig(encoder_width=8, decoder_width=8, blocks=1, patch=2, shortcuts=True),
        "conditional norms in the decoder": ConvVaeConfig(
            encoder_width=8, decoder_width=8, blocks=1, conditional_norm=True, front="repeat"
        ),
    }


def redrawn(architecture: AutoencoderConfig, dtype: torch.dtype) -> Autoencoder:
    """Build a model whose every weight is redrawn, so that no zero-initialised branch hides an error."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_autoencoder(architecture).to(dtype)
        fixed = [buffer for name, buffer in model.named_buffers() if name.startswith("linear_")]
        for parameter in [*model.parameters(), *fixed]:
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            torch.nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=spread)
    return model.eval()


def clip(dtype: torch.dtype) -> Tensor:
    """Draw a clip of noise, ``(1, 3, 17, 32, 48)``."""
    return torch.rand(1, 3, FRAMES, 32, 48, generator=generator(0, "clip"), dtype=torch.float64).to(dtype) * 2 - 1


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


def _pieces(x: Tensor, first: int, following: int) -> list[Tensor]:
    """Cut axis 2 into one piece of ``first`` and others of ``following``."""
    rest = list(x[:, :, first:].split(following, dim=2)) if x.shape[2] > first else []
    return [x[:, :, :first], *rest]


@torch.no_grad()
def chunk_differences(model: Autoencoder, video: Tensor) -> dict[str, float]:
    """Encode and decode in chunks of every size and compare with the whole clip.

    Args:
        model: Autoencoder.
        video: ``(b, 3, 17, h, w)``.

    Returns:
        Largest relative difference by what was cut: ``encode k`` for chunks of k latent frames, ``decode k``.
    """
    step = model.compression.t
    posterior = model.encode(video)
    decoded = model.decode(posterior.mean)
    frames = posterior.mean.shape[2]
    found = {}
    for size in range(1, frames + 1):
        chunks = _pieces(video, 1 + (size - 1) * step, size * step)
        parts = list(model.encode_stream(chunks))
        mean, logvar = (torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("mean", "logvar"))
        found[f"encode {size}"] = max(_relative(mean, posterior.mean), _relative(logvar, posterior.logvar))
        pieces = model.decode_stream(_pieces(posterior.mean, size, size))
        found[f"decode {size}"] = _relative(torch.cat(list(pieces), dim=2), decoded)
    return found


@torch.no_grad()
def causality_violations(model: Autoencoder, video: Tensor) -> tuple[int, int]:
    """Perturb each frame and each latent frame in turn.

    Args:
        model: Autoencoder.
        video: ``(b, 3, 17, h, w)``.

    Returns:
        Number of earlier latents (or frames) that changed in any bit, and of perturbations that changed nothing.
    """
    step = model.compression.t
    before = model.encode(video)
    changed = unmoved = 0
    for frame in range(video.shape[2]):
        other = video.clone()
        other[:, :, frame] = -other[:, :, frame]
        after = model.encode(other)
        first = -(-frame // step)  # ceil: the first latent that may see the frame
        for name in ("mean", "logvar"):
            a, b = getattr(before, name), getattr(after, name)
            changed += int(not torch.equal(a[:, :, :first], b[:, :, :first]))
            unmoved += int(torch.equal(a[:, :, first], b[:, :, first]))
    decoded = model.decode(before.mean)
    for latent in range(before.mean.shape[2]):
        moved = before.mean.clone()
        moved[:, :, latent] += 1
        after_frames = model.decode(moved)
        first = 0 if latent == 0 else 1 + (latent - 1) * step
        changed += int(not torch.equal(decoded[:, :, :first], after_frames[:, :, :first]))
        unmoved += int(torch.equal(decoded[:, :, first:], after_frames[:, :, first:]))
    return changed, unmoved


def gradient_difference(model: Autoencoder, video: Tensor) -> float:
    """Compare the gradients of all weights and of the video, recomputed in chunks of 4 frames, with the whole clip's.

    Args:
        model: Autoencoder with a Gaussian bottleneck.
        video: ``(b, 3, 17, h, w)``.

    Returns:
        Largest difference over the largest value of the same gradient.
    """
    model.train()
    found = []
    for frames_per_chunk in (None, 4):
        clip = video.clone().requires_grad_()
        model.zero_grad()
        reconstruction, posterior = model(clip, None, frames_per_chunk=frames_per_chunk)
        (reconstruction.square().mean() + posterior.kl().mean() / video.numel()).backward()
        assert clip.grad is not None
        found.append([clip.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    model.eval().zero_grad()
    pairs = zip(*found, strict=True)
    return max(float((b - a).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)


def measure(architectures_of: Callable[[], dict[str, AutoencoderConfig]] = architectures) -> Proof:
    """Measure every architecture in fp32 and fp64."""
    rows, misses = [], []
    for name, architecture in architectures_of().items():
        for dtype, limit in LIMITS.items():
            model, video = redrawn(architecture, dtype), clip(dtype)
            differences = chunk_differences(model, video)
            encode = max(value for key, value in differences.items() if key.startswith("encode"))
            decode = max(value for key, value in differences.items() if key.startswith("decode"))
            changed, unmoved = causality_violations(model, video)
            label = str(dtype).removeprefix("torch.")
            gradient = gradient_difference(model, video)
            rows.append([name, label, len(differences) // 2, encode, decode, limit, gradient, changed, unmoved])
            if gradient > 10 * limit:
                misses.append(f"{name}, {label}: gradients differ by {gradient:.2e}, limit {10 * limit:.0e}")
            if max(encode, decode) > limit:
                misses.append(f"{name}, {label}: chunks differ by {max(encode, decode):.2e}, limit {limit:.0e}")
            if changed or unmoved:
                misses.append(f"{name}, {label}: {changed} earlier outputs changed, {unmoved} without effect")
    columns = ["model", "dtype", "chunk sizes", "encode", "decode", "limit"]
    columns += ["gradient", "earlier outputs changed", "no effect"]
    return Proof("Streaming equals the whole clip, and nothing sees the future", columns, rows, misses, _NOTES)
