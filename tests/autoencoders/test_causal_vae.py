"""The causal VAE: causality, streaming, images, compression, linear limits and errors. Every weight is redrawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ltd.autoencoders import CausalVae, CausalVaeConfig, build_autoencoder
from ltd.autoencoders.blocks import Downsample, Fold, Unfold, Upsample, haar_rotation
from ltd.config import ConfigError

TINY = CausalVaeConfig(
    latent_channels=4,
    channels=(8, 12, 16),
    encoder_blocks=(1, 0, 1),
    decoder_blocks=(0, 1, 1),
    factors=((2, 2, 2), (2, 2, 2)),
    front=(1, 2, 2),
    shortcuts=False,
)
VARIANTS = {
    "plain": TINY,
    "haar_linear": dataclasses.replace(TINY, front_transform="haar", front=(1, 4, 2), linear_path=True),
    "folded": dataclasses.replace(
        TINY, front=(4, 4, 4), channels=(8,), factors=(), encoder_blocks=(2,), decoder_blocks=(1,), linear_path=True
    ),
    "shortcuts": dataclasses.replace(
        TINY, channels=(8, 16, 16), shortcuts=True, factors=((4, 1, 2), (1, 2, 1)), padding="zeros"
    ),
    "thin": dataclasses.replace(TINY, block_kernels=((3, 1, 1), (1, 3, 3)), expansion=1.5, front=(2, 1, 1)),
}


def _redraw(model: CausalVae) -> CausalVae:
    """Fill every parameter and buffer of the paths, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(1)
    fixed = [*model.linear_encoder.buffers(), *model.linear_decoder.buffers()]
    with torch.no_grad():
        for value in [*model.parameters(), *fixed]:
            fan_in = max(1, value[0].numel()) if value.ndim > 1 else 4
            value.copy_(torch.randn(value.shape, generator=generator) * fan_in**-0.5)
    return model


def _model(name: str = "plain", dtype: torch.dtype = torch.float64) -> CausalVae:
    return _redraw(build_autoencoder(VARIANTS[name])).to(dtype)


def _video(model: CausalVae, latent_frames: int = 4, batch: int = 2) -> Tensor:
    block = model.compression
    shape = (batch, 3, 1 + (latent_frames - 1) * block.t, 2 * block.h, 3 * block.w)
    dtype = next(model.parameters()).dtype
    return (torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1).to(dtype)


def _compositions(total: int) -> Iterator[list[int]]:
    """List every way to cut ``total`` into positive parts, in order."""
    if not total:
        yield []
    for head in range(1, total + 1):
        for tail in _compositions(total - head):
            yield [head, *tail]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_streaming_equals_the_whole_for_every_chunking(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = _model(name, dtype).requires_grad_(False)
    video, frames = _video(model), 4
    posterior = model.encode(video)
    whole = model.decode(posterior.mean)
    assert whole.shape == video.shape
    assert whole.std() > 0.1 and posterior.mean.std() > 0.1
    for parts in _compositions(frames):
        pixels = [1 + (parts[0] - 1) * model.compression.t, *(part * model.compression.t for part in parts[1:])]
        pieces = list(model.encode_stream(video.split(pixels, 2)))
        for got, expected in (
            (torch.cat([piece.mean for piece in pieces], 2), posterior.mean),
            (torch.cat([piece.logvar for piece in pieces], 2), posterior.logvar),
            (torch.cat(list(model.decode_stream(posterior.mean.split(parts, 2))), 2), whole),
        ):
            assert got.shape == expected.shape
            assert (got - expected).abs().max() <= tolerance * expected.std()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_later_frame_never_changes_an_earlier_latent(name: str) -> None:
    model = _model(name, torch.float32).requires_grad_(False)
    video, factor = _video(model), model.compression.t
    before = model.encode(video)
    for frame in range(1, video.shape[2]):
        changed = video.clone()
        changed[:, :, frame] += 0.5
        after = model.encode(changed)
        untouched = math.ceil(frame / factor)
        assert torch.equal(after.mean[:, :, :untouched], before.mean[:, :, :untouched])
        assert torch.equal(after.logvar[:, :, :untouched], before.logvar[:, :, :untouched])
        assert not torch.equal(after.mean[:, :, untouched], before.mean[:, :, untouched])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_later_latent_never_changes_an_earlier_frame(name: str) -> None:
    model = _model(name, torch.float32).requires_grad_(False)
    latents = model.encode(_video(model)).mean
    before = model.decode(latents)
    for frame in range(1, latents.shape[2]):
        changed = latents.clone()
        changed[:, :, frame] += 0.5
        after = model.decode(changed)
        untouched = model.compression.video_frames(frame)
        assert torch.equal(after[:, :, :untouched], before[:, :, :untouched])
        assert not torch.equal(after[:, :, untouched:], before[:, :, untouched:])


@pytest.mark.parametrize("name", VARIANTS)
def test_an_image_is_the_first_frame_of_its_clip(name: str) -> None:
    model = _model(name).requires_grad_(False)
    video = _video(model)
    image = model.encode(video[:, :, :1])
    torch.testing.assert_close(image.mean, model.encode(video).mean[:, :, :1], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        model.decode(image.mean), model.decode(model.encode(video).mean)[:, :, :1], rtol=0, atol=1e-12
    )


def test_samples_of_a_batch_do_not_mix() -> None:
    model = _model("shortcuts").requires_grad_(False)
    video = _video(model, batch=3)
    noise = torch.randn(model.encode(video).mean.shape, dtype=torch.float64)
    whole, _ = model(video, noise)
    alone, _ = model(video[1:2], noise[1:2])
    torch.testing.assert_close(alone, whole[1:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 2), (4, 1, 2)])
def test_shortcut_pair_averages_groups_when_convolutions_are_zero(factors: tuple[int, int, int]) -> None:
    cells = math.prod(factors)
    x = torch.randn(2, 4, 1 + 2 * factors[0], 4, 8, dtype=torch.float64)
    for out_channels in (4 * cells, 4):  # groups of 1: the inverse; groups of a whole block: its mean
        down = Downsample(4, out_channels, factors, shortcut=True).double()
        up = Upsample(out_channels, 4, factors, shortcut=True).double()
        for parameter in [*down.parameters(), *up.parameters()]:
            torch.nn.init.zeros_(parameter)
        y, _ = down(x)
        z, _ = up(y)
        if out_channels > 4:
            assert torch.equal(z, x)
        else:
            block = x[:, :, 1 : 1 + factors[0], : factors[1], : factors[2]]
            expected = block.mean((2, 3, 4), keepdim=True).expand_as(block)
            torch.testing.assert_close(z[:, :, 1 : 1 + factors[0], : factors[1], : factors[2]], expected)


def test_haar_is_orthonormal_and_starts_with_the_mean() -> None:
    matrix = haar_rotation((2, 4, 4)).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix[0], torch.full((32,), 32**-0.5, dtype=torch.float64), rtol=0, atol=1e-6)
    pair = haar_rotation((1, 1, 2))
    torch.testing.assert_close(pair, torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2))


def test_haar_front_and_back_are_inverse() -> None:
    factors = (2, 4, 2)
    x = torch.randn(2, 3, 5, 8, 8, dtype=torch.float64)
    folded, _ = Fold(factors, haar_rotation(factors)).double()(x)
    torch.testing.assert_close(folded[:, :, 1:].square().sum(), x[:, :, 1:].square().sum(), rtol=1e-6, atol=0)
    back, _ = Unfold(factors, haar_rotation(factors)).double()(folded)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)
    flat, _ = Fold(factors, haar_rotation(factors))(torch.full((1, 3, 5, 8, 8), 0.5))
    assert flat.unflatten(1, (3, 16))[:, :, 1:].abs().max() < 1e-6  # a constant block has its mean only


def test_posterior_starts_at_the_configured_width() -> None:
    torch.manual_seed(0)
    model = build_autoencoder(dataclasses.replace(TINY, initial_logvar=-4.0))
    assert torch.equal(model.encode(_video(model)).logvar, torch.full((2, 4, 4, 2, 3), -4.0))


def test_unused_linear_path_changes_nothing() -> None:
    plain = _model("plain")
    model = CausalVae(dataclasses.replace(TINY, linear_path=True, residual_scale=0.5)).double()
    model.load_state_dict(plain.state_dict(), strict=False)
    posterior = model.encode(_video(model))
    torch.testing.assert_close(posterior.mean, 0.5 * plain.encode(_video(model)).mean, rtol=0, atol=0)
    torch.testing.assert_close(model.decode(posterior.mean), 0.5 * plain.decode(posterior.mean), rtol=0, atol=0)


def test_bf16_module_takes_fp32_video_and_gives_a_wide_posterior() -> None:
    model = _model("haar_linear", torch.float32).requires_grad_(False)
    video = _video(model)
    expected = model(video, None)[0]
    half = model.bfloat16()
    posterior = half.encode(video)
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    reconstruction = half.decode(posterior.mean)
    assert reconstruction.dtype == torch.bfloat16
    assert (reconstruction.float() - expected).std() < 0.05 * expected.std()


def test_every_parameter_gets_a_gradient_and_one_decay_group() -> None:
    model = _model("shortcuts")
    reconstruction, posterior = model(_video(model), torch.randn(2, 4, 4, 2, 3, dtype=torch.float64))
    (reconstruction.square().sum() + posterior.kl().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    groups = model.decay_groups()
    assert sorted(groups["decay"] + groups["no_decay"]) == sorted(name for name, _ in model.named_parameters())
    assert all(name.endswith(("bias", "norm.weight")) for name in groups["no_decay"])
    assert not any(name.endswith(("bias", "norm.weight")) for name in groups["decay"])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 6, 16, 16), r"num_frames must be 1 \+ k \* 4 .* got 6; the nearest are 5 and 9"),
        ((1, 3, 5, 12, 16), "height must be a multiple of 8 .* got 12; nearest: 8 and 16"),
        ((1, 3, 5, 16, 4), "width must be a multiple of 8 .* got 4; nearest: 8"),
        ((1, 4, 5, 16, 16), r"needed \(b, 3, t, h, w\) \(model.in_channels\)"),
        ((3, 5, 16, 16), "needed \\(b, 3, t, h, w\\)"),
    ],
)
def test_a_wrong_video_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_autoencoder(TINY).encode(torch.zeros(shape))


def test_a_wrong_chunk_or_latent_is_refused() -> None:
    model = build_autoencoder(TINY)
    with pytest.raises(ValueError, match="multiple of 4 frames, got 5"):
        list(model.encode_stream([torch.zeros(1, 3, 5, 8, 8), torch.zeros(1, 3, 5, 8, 8)]))
    with pytest.raises(ValueError, match=r"needed \(b, 4, t, h, w\) \(model.latent_channels\)"):
        model.decode(torch.zeros(1, 3, 2, 2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": ((2, 2, 2),)}, "factors: one entry per level, got 1, needed 2"),
        ({"encoder_blocks": (1,)}, "encoder_blocks: one entry per level, got 1, needed 3"),
        ({"channels": ()}, "channels: .* at least one"),
        ({"channels": (8, 0, 8)}, "channels: .* needed positive"),
        ({"decoder_blocks": (-1, 0, 0)}, "decoder_blocks: .* needed 0 or more"),
        ({"stem_kernel": (3, 2, 3)}, "stem_kernel: .* odd in h and w"),
        ({"linear_kernel": (1, 2, 1)}, "linear_kernel: .* odd in h and w"),
        ({"front": (1, 3, 3), "front_transform": "haar"}, "front: .* powers of two"),
        ({"expansion": 0.0}, "expansion: .* more than 0"),
        ({"residual_scale": 0.0}, "residual_scale: .* more than 0"),
        ({"initial_logvar": 50.0}, "initial_logvar: .* needed within"),
        ({"channels": (8, 24, 40), "shortcuts": True}, r"channels\[1\]: got 24, needed a divisor of .* = 64"),
    ],
)
def test_a_wrong_config_names_its_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **change)  # type: ignore[arg-type]
