"""Operations counted from shapes against torch's counter: denoisers, autoencoders and text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltd import config
from ltd.autoencoders import AutoencoderConfig, CausalVaeConfig, ConvVaeConfig, FsqConfig, build_autoencoder
from ltd.autoencoders.flops import decode_flops, encode_flops
from ltd.denoisers import Conditioning, Dit, DitConfig, DitInputs, build_denoiser, count_flops
from ltd.encoders.text import TransformersTextConfig, build_text_encoder, flops_so_far
from ltd.nn.flops import Flops
from ltd.shapes import VideoShape
from ltd.training.denoiser import DenoiserRun
from tests.parallel.family_check import FAMILY, inputs, member, packs
from tools.proofs._flop_counter import counted
from tools.proofs.table import Proof

NAME = "flops"
#: Largest relative difference from torch's counter, and from published figures.
LIMIT = 0.01
_ROOT = Path(__file__).resolve().parents[2]
#: Multiply-adds of one forward pass at 256 x 256 pixels: Peebles and Xie (2022), arXiv 2212.09748, Table 4.
PUBLISHED = {"dit_s_2": 6.06e9, "dit_b_2": 23.01e9, "dit_l_2": 80.71e9, "dit_xl_2": 118.64e9}
#: Latent cells (t, h, w), of images and of videos.
_SIZES = ((1, 32, 32), (5, 16, 24))
_CAUSAL: dict[str, Any] = {"latent_channels": 4, "channels": (8, 16), "factors": ((2, 2, 2),)}
_CAUSAL |= {"encoder_blocks": (1, 2), "decoder_blocks": (2, 1)}
_CONV: dict[str, Any] = {"latent_channels": 4, "encoder_width": 8, "decoder_width": 8, "multipliers": (1, 2, 2)}
_CONV |= {"halve_time": (False, True), "num_groups": 4}
#: Autoencoders by name.
AUTOENCODERS: dict[str, AutoencoderConfig] = {
    "causal_vae": CausalVaeConfig(**_CAUSAL),
    "causal_vae, linear path": CausalVaeConfig(**_CAUSAL, linear_path=True, block_kernels=((1, 3, 3), (3, 1, 1))),
    "causal_vae, FSQ": CausalVaeConfig(**_CAUSAL, bottleneck=FsqConfig(levels=(4, 4, 4, 4))),
    "wavelet": CausalVaeConfig(**_CAUSAL | {"front": (2, 4, 4)}, front_transform="haar"),
    "conv_vae": ConvVaeConfig(**_CONV),
    "conv_vae, shortcuts": ConvVaeConfig(**_CONV, shortcuts=True, attention=False, narrow_before=False, patch=2),
    "conv_vae, conditional norms": ConvVaeConfig(**_CONV, conditional_norm=True, post_quant_conv=False),
    "conv_vae, images": ConvVaeConfig(**_CONV | {"halve_time": (False, False)}, temporal_kernel=1, norm="group"),
}
CLIPS = (VideoShape(9, 16, 24), VideoShape(1, 32, 32))

Row = tuple[str, str, float, float, float | None, float | None]


def compare(run: Callable[[], Tensor], ours: Flops, model: nn.Module) -> tuple[int, float, int, float]:
    """Count a forward pass, and a training step, both ways.

    Args:
        run: Makes a scalar of a pass.
        ours: What is expected.
        model: What is run.

    Returns:
        Forward operations by torch's counter and by ours, and those of a step with attention's scores made twice.
    """

    def forward() -> None:
        with torch.no_grad():
            run()

    step = counted(lambda: run().backward())
    model.zero_grad()
    return counted(forward), float(ours.forward), step, float(ours.training + ours.scores_again)


def members() -> Iterator[Row]:
    """Compare every member of the family, rows and packs."""
    for name in FAMILY:
        for packed in (False, True) if packs(name) else (False,):
            model = member(name, torch.float32)
            x, t, cond = inputs(name, packed, torch.float32)

            def run(model: Dit = model, given: Any = (x, t, cond)) -> Tensor:
                out = model(*given)
                return torch.stack([row.square().mean() for row in out]).sum()

            ours = count_flops(model.config, DitInputs.of(x, cond)).all
            yield (name, "pack" if packed else "rows", *compare(run, ours, model))


def per_frame() -> Iterator[Row]:
    """Compare members whose every latent frame has a time of its own."""
    for name in ("joint", "wide head", "frames in place", "an embedding per block"):
        model = member(name, torch.float32)
        x, t, cond = inputs(name, False, torch.float32)
        times = t[:, None].expand(-1, x.shape[2])

        def run(model: Dit = model, given: Any = (x, times, cond)) -> Tensor:
            out: Tensor = model(*given)
            return out.square().mean()

        ours = count_flops(model.config, DitInputs.of(x, cond, times=times.shape[1])).all
        yield (name, "a time per frame", *compare(run, ours, model))


def shipped() -> Iterator[Row]:
    """Compare every configuration of ``configs/denoiser`` at its real size, without memory for its tensors."""
    for path in sorted((_ROOT / "configs" / "denoiser").glob("*.yaml")):
        chosen = config.load(DenoiserRun, path).model
        with torch.device("meta"):
            model = build_denoiser(chosen)
            for cells in _SIZES[:1] if chosen.num_classes else _SIZES[1:]:
                x, t, cond = _real(chosen, cells)

                def run(model: Dit = model, given: Any = (x, t, cond)) -> Tensor:
                    out: Tensor = model(*given)
                    return out.square().mean()

                ours = count_flops(chosen, DitInputs.of(x, cond)).all
                # On this device attention is two plain products, and its scores are kept.
                first, second, step, _ = compare(run, ours, model)
                yield path.stem, _size(cells), first, second, step, float(ours.training)


def _real(chosen: DitConfig, cells: tuple[int, int, int]) -> tuple[Tensor, Tensor, Conditioning]:
    cells = tuple(-(-size // unit) * unit for size, unit in zip(cells, chosen.patch, strict=True))  # type: ignore[assignment]
    given: dict[str, Any] = {}
    if chosen.text_dim:
        length = chosen.text_length or 77
        given |= {"text": torch.randn(1, length, chosen.text_dim), "text_mask": torch.ones(1, length, dtype=torch.bool)}
    if chosen.image_dim:
        given["image"] = torch.randn(1, chosen.image_positions or 257, chosen.image_dim)
    if chosen.scalars:
        given["scalars"] = torch.ones(1, len(chosen.scalars))
    return torch.randn(1, chosen.latent_channels, *cells), torch.rand(1), Conditioning(**given)


def autoencoders() -> Iterator[Row]:
    """Compare both halves of every autoencoder, and a training step through both."""
    for name, chosen in AUTOENCODERS.items():
        model = build_autoencoder(chosen)
        for clip in CLIPS:
            video = torch.randn(2, 3, clip.num_frames, clip.height, clip.width)
            latent = model.compression.latent(clip)
            noise = torch.randn(2, model.latent_channels, latent.num_frames, latent.height, latent.width)
            encoder, decoder = encode_flops(chosen, clip, 2), decode_flops(chosen, latent, 2)
            with torch.no_grad():
                made = counted(partial(model.encode, video)), counted(partial(model.decode, noise))
            yield f"{name}: encode", str(clip), made[0], float(encoder.forward), None, None
            yield f"{name}: decode", str(clip), made[1], float(decoder.forward), None, None

            def run(model: nn.Module = model, given: Any = (video, noise)) -> Tensor:
                reconstruction, posterior = model(*given)
                return reconstruction.square().mean() + posterior.mean.square().mean()

            yield (name, str(clip), *compare(run, encoder + decoder, model))


def text() -> Iterator[Row]:
    """Compare the text encoder that an installed package ships; torch's counter sees its unused pooling too."""
    encoder = build_text_encoder(TransformersTextConfig())
    captions = ["a red ball", "two dogs run over a wide field of snow in the winter sun", "a red ball"]
    made = counted(lambda: encoder.encode(captions))
    yield f"text encoder {encoder.name}", f"{len(captions)} captions", made, flops_so_far(encoder), None, None


def published() -> Iterator[Row]:
    """Compare with the figures that the authors of DiT give."""
    for name, multiply_adds in PUBLISHED.items():
        chosen = config.load(DenoiserRun, _ROOT / "configs" / "denoiser" / f"{name}.yaml").model
        ours = count_flops(chosen, DitInputs(cells=((1, 32, 32),))).all
        yield f"{name}, published", "1x32x32", 2 * multiply_adds, float(ours.forward), None, None


def measure() -> Proof:
    """Compare all, and state the limits."""
    rows: list[list[Any]] = []
    misses = []
    for part in (members, per_frame, shipped, autoencoders, text, published):
        for name, size, first, second, step, our_step in part():
            pairs = [("forward", first, second)] + ([("step", step, our_step)] if step and our_step else [])
            errors = {what: ours / theirs - 1 for what, theirs, ours in pairs}
            shown = [f"{errors[what]:+.3%}" if what in errors else "" for what in ("forward", "step")]
            rows.append([name, size, f"{first:.4g}", shown[0], f"{step:.4g}" if step else "", shown[1]])
            misses += [
                f"{name}, {size}: {what} differs by {error:+.2%}, needed {LIMIT:.0%}"
                for what, error in errors.items()
                if not abs(error) <= LIMIT
            ]
    columns = ["what", "size", "forward, counted", "ours", "forward and backward, counted", "ours"]
    return Proof("Operations counted from shapes", columns, rows, misses, _NOTES)


def _size(cells: tuple[int, int, int]) -> str:
    return "x".join(str(size) for size in cells)


_NOTES = (
    "`ltd.denoisers.count_flops`, `ltd.autoencoders.flops` and the text encoder's own count against "
    "`torch.utils.flop_counter.FlopCounterMode`; a multiplication and its addition are two operations, columns named "
    f"ours are relative differences, limit {LIMIT:.0%}. torch's counter has no formula for the CPU's fused attention: "
    "it is given that of the GPU kernels, whose backward pass makes the scores again (5 products instead of 4; the "
    "model FLOPs of training leave that out). Shipped configurations run on the meta device at their real size, "
    "with one sample. The last rows compare with published multiply-adds."
)
