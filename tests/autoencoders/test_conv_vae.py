"""The convolutional VAE family: streaming, causality, exact shortcuts, inflation, errors. All weights are redrawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltd.autoencoders import ConvVae, ConvVaeConfig, build_autoencoder, inflate
from ltd.autoencoders.conv_parts import ConditionalNorm, NormConv, PartSettings, SpatialUp, build_norm
from ltd.config import ConfigError
from ltd.nn.causal_conv import START, CausalConv3d, State

TINY = ConvVaeConfig(
    latent_channels=4, encoder_width=8, decoder_width=8, multipliers=(1, 2, 2), blocks=1, halve_time=(True, True)
)
VARIANTS = {
    "wan 2.1": dataclasses.replace(TINY, odd_sizes="crop"),
    "wan 2.2": dataclasses.replace(TINY, patch=2, decoder_width=12, shortcuts=True, halve_time=(False, True)),
    "guided": dataclasses.replace(TINY, conditional_norm=True, narrow_before=False, front="repeat"),
    "group": dataclasses.replace(TINY, norm="group", num_groups=4, quant_conv=False, attention=False),
    "image": dataclasses.replace(
        TINY, temporal_kernel=1, halve_time=(False, False), norm="group", num_groups=4, narrow_before=False
    ),
}


def redraw(model: nn.Module) -> nn.Module:
    """Fill every parameter, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            fan_in = value[0].numel() if value.ndim > 1 else 16
            value.copy_(torch.randn(value.shape, generator=generator) * 1.2 * fan_in**-0.5)
            if value.ndim == 1:
                value.add_(0.5)
    return model


def make(name: str, dtype: torch.dtype = torch.float64) -> ConvVae:
    model = redraw(build_autoencoder(VARIANTS[name])).to(dtype)
    assert isinstance(model, ConvVae)
    return model


def clip(model: ConvVae, latent_frames: int = 4) -> Tensor:
    c = model.compression
    shape = (2, 3, 1 + (latent_frames - 1) * c.t, 2 * c.h, 3 * c.w)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1).to(next(model.parameters()).dtype)


def compositions(total: int) -> Iterator[list[int]]:
    if not total:
        yield []
    for head in range(1, total + 1):
        for tail in compositions(total - head):
            yield [head, *tail]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_streaming_equals_the_whole_for_every_chunking(name: str, grad: bool) -> None:
    model, frames = make(name), 4
    video = clip(model)
    with torch.set_grad_enabled(grad):
        posterior = model.encode(video)
        whole = model.decode(posterior.mean)
        assert whole.shape == video.shape and whole.std() > 0.1 and posterior.mean.std() > 0.1
        for parts in compositions(frames):
            pixels = [1 + (parts[0] - 1) * model.compression.t, *(part * model.compression.t for part in parts[1:])]
            means = [p.mean for p in model.encode_stream(video.split(pixels, 2))]
            torch.testing.assert_close(torch.cat(means, 2), posterior.mean, rtol=0, atol=1e-10)
            decoded = torch.cat(list(model.decode_stream(posterior.mean.split(parts, 2))), 2)
            torch.testing.assert_close(decoded, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_pieces_and_buffers_change_nothing(name: str) -> None:
    model = make(name)
    video = clip(model)
    with torch.enable_grad():
        expected = model.encode(video)
        decoded = model.decode(expected.mean).detach()
    calls = 0
    for pixels in (1, 2 * 8 * 12, 1 << 20):
        model.encoder.piece_pixels = model.decoder.piece_pixels = pixels
        posterior = model.encode(video)
        for got, wanted in ((posterior.mean, expected.mean), (posterior.logvar, expected.logvar)):
            torch.testing.assert_close(got, wanted.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(model.decode(expected.mean), decoded, rtol=0, atol=1e-10)
        # and of a stream, whose chunks are cut again
        frames = list(model.decode_stream(expected.mean.split([1, 3], 2)))
        torch.testing.assert_close(torch.cat(frames, 2), decoded, rtol=0, atol=1e-10)
        calls += 1
    assert calls == 3


def test_small_pieces_go_depth_first() -> None:
    model = make("wan 2.1", torch.float32)
    model.decoder.piece_pixels = 1
    sizes = []
    model.decoder.out.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape[2]))
    with torch.no_grad():
        model.decode(torch.randn(1, 4, 3, 2, 2))
    assert sizes == [1] * 9


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are alive; weights are not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {value.untyped_storage()._cdata for value in model.parameters()}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.peak = max(self.peak, self.now())
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.weights:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return result


@torch.no_grad()
def test_a_stream_holds_its_states_once_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltd.autoencoders.conv_parts.NORM_PIXELS", 64)
    monkeypatch.setattr(CausalConv3d, "band_pixels", 128)
    model = redraw(build_autoencoder(dataclasses.replace(TINY, decoder_width=16, halve_time=(False, True))))
    model.decoder.piece_pixels = 32 * 32
    latents = torch.randn(1, 4, 5, 8, 8)
    with LiveBytes(model) as live:
        for video in model.decode_stream(latents.split(1, dim=2)):
            del video
            held = live.now()
    # Two frames of what each convolution reads: of each level's width, or of the level's below; 4 bytes a value.
    cells = 8 * 8
    coarse = 4 + 4 * 32 + 4 * 32 + 32  # the first convolution, the middle, the level's two blocks, and time
    middle = cells * 4 * (16 + 3 * 32)
    fine = cells * 16 * 4 * 16
    last_video, last_conv = cells * 16 * 3 * 2, cells * 16 * 16
    states = 2 * (cells * coarse + middle + fine + last_conv)
    assert held == 4 * (states + last_video + latents.numel())
    # What is alive besides: three frames of the last level (a block's input, one convolution's, the output), two of the
    # level below, which weigh as much as one, and what one operation makes.
    frame = 4 * cells * 16 * 16
    assert live.peak - held < 5.5 * frame


@torch.no_grad()
def test_a_frame_behind_a_norm_is_let_go_of_band_by_band(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltd.autoencoders.conv_parts.NORM_PIXELS", 64)
    monkeypatch.setattr(CausalConv3d, "band_pixels", 64)
    settings = PartSettings("rms", 32, 3, "zeros")
    part = redraw(NormConv(settings.norm(8), settings.conv(8, 8)))
    frame = 4 * 8 * 32 * 32
    states: list[State] = [START]
    with LiveBytes(part) as live:
        for _ in range(4):
            x = torch.randn(1, 8, 1, 32, 32).contiguous(memory_format=torch.channels_last_3d)
            held = [x]
            del x
            live.peak = 0
            y, state = part.convolve_in_bands(held, states, None)
            states.append(state)
            del y, state
    # Two frames of before, the oldest of which goes as it is read, the new one, the output, and single bands.
    # A frame in one piece would stay to the end.
    assert live.peak < 4.2 * frame


@pytest.mark.parametrize("name", VARIANTS)
def test_single_frames_in_bands_are_the_clip(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    video = clip(model)
    mean = model.encode(video).mean  # with gradients: whole
    frames = model.decode(mean)
    monkeypatch.setattr(CausalConv3d, "band_pixels", 3 * 8)
    model.encoder.piece_pixels = model.decoder.piece_pixels = 1
    joined = []
    convolve = CausalConv3d.convolve_in_bands

    def counted(self: CausalConv3d, *args: Any) -> Any:
        y, state = convolve(self, *args)
        joined.append(isinstance(y, tuple))
        return y, state

    monkeypatch.setattr(CausalConv3d, "convolve_in_bands", counted)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(video).mean, mean, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(model.decode(mean), frames, rtol=1e-11, atol=1e-11)
    # Only norms of single pixels go on in bands, and images have no frames to carry.
    assert any(joined) == (model.config.norm == "rms" and model.config.temporal_kernel > 1)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_state_serves_more_than_one_continuation(name: str) -> None:
    model = make(name, torch.float32)
    latents = model.encode(clip(model)).mean
    _, state = model.decode_chunk(latents[:, :, :2], START)
    first, _ = model.decode_chunk(latents[:, :, 2:3], state)
    second, _ = model.decode_chunk(latents[:, :, 2:3], state)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_no_output_sees_a_later_frame(name: str) -> None:
    model = make(name, torch.float32)
    video = clip(model)
    latents = model.encode(video).mean
    frames = model.decode(latents)
    for k in range(video.shape[2]):
        changed = video.clone()
        changed[:, :, k:] += 1
        same = -(-k // model.compression.t)
        assert torch.equal(model.encode(changed).mean[:, :, :same], latents[:, :, :same])
    for k in range(latents.shape[2]):
        moved = latents.clone()
        moved[:, :, k:] += 1
        same = model.compression.video_frames(k) if k else 0
        assert torch.equal(model.decode(moved)[:, :, :same], frames[:, :, :same])


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = make(name)
    video, posterior = model(clip(model), None)
    (video.square().mean() + posterior.kl().mean()).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, parameter


@pytest.mark.parametrize("grad", [False, True])
def test_enlarging_equals_nearest_neighbours_and_a_convolution(grad: bool) -> None:
    up = redraw(SpatialUp(6, 5)).double()
    x = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    frames = x.transpose(1, 2).flatten(0, 1)
    expected = up.conv(F.interpolate(frames, scale_factor=2.0, mode="nearest-exact"))
    with torch.set_grad_enabled(grad):
        got = up(x).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if grad:
        inputs = [up.conv.weight, up.conv.bias]
        wanted = torch.autograd.grad(expected.square().sum(), inputs)
        for ours, theirs in zip(torch.autograd.grad(got.square().sum(), inputs), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("front", ["zeros", "repeat"])
@torch.no_grad()
def test_a_norm_that_writes_into_the_buffer_changes_nothing(front: str) -> None:
    part = redraw(NormConv(build_norm("rms", 6, 1), CausalConv3d(6, 4, front=front))).double()  # type: ignore[arg-type]
    x = torch.randn(2, 6, 5, 4, 3, dtype=torch.float64)
    with torch.enable_grad():
        whole, _ = part(x, None, None)
    state, outputs = START, []
    for chunk in (x[:, :, :1], x[:, :, 1:3], x[:, :, 3:]):
        y, state = part(chunk, state, None)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 2), whole.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part(x, None, None)[0], whole.detach(), rtol=1e-12, atol=1e-12)


def test_conditional_norm_starts_as_the_norm_and_reads_the_latent_of_its_pixel() -> None:
    norm = build_norm("group", 8, 4)
    conditional = ConditionalNorm(norm, 8, 3)
    x, guide = torch.randn(2, 8, 3, 4, 6), torch.randn(2, 3, 3, 2, 3)
    torch.testing.assert_close(conditional(x, guide), norm(x))
    redraw(conditional)
    scale, shift = conditional.modulation(guide).repeat_interleave(2, 3).repeat_interleave(2, 4).chunk(2, 1)
    torch.testing.assert_close(conditional(x, guide), norm(x) * scale + shift)
    constant = guide[..., :1, :1].expand_as(guide)
    affine = conditional(x, constant)
    scale, shift = conditional.modulation(constant[..., :1, :1]).chunk(2, 1)
    torch.testing.assert_close(affine, norm(x) * scale + shift)


def test_rms_norm_is_unit_length_times_the_root_of_the_channels() -> None:
    norm = redraw(build_norm("rms", 8, 1))
    x = torch.randn(2, 8, 3, 4, 4)
    x[0, :, 0, 0, 0] = 0
    expected = F.normalize(x, dim=1) * 8**0.5 * norm.weight[:, None, None, None]  # type: ignore[index]
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_group_norm_keeps_to_the_frame() -> None:
    norm = build_norm("group", 8, 4)
    x = torch.randn(2, 8, 3, 4, 4)
    for frame in range(3):
        torch.testing.assert_close(
            norm(x)[:, :, frame], F.group_norm(x[:, :, frame], 4, eps=1e-6), rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_inflation_starts_as_the_image_vae() -> None:
    image = make("image")
    image.set_latent_norm(torch.arange(4.0), torch.full((4,), 2.0))
    video = clip(make("wan 2.1"))  # 13 frames
    per_frame = image.encode(video)
    frames = image.decode(per_frame.mean)
    same = inflate(image, halve_time=(False, False))
    torch.testing.assert_close(same.encode(video).mean, per_frame.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(same.encode(video).logvar, per_frame.logvar, rtol=0, atol=1e-12)
    torch.testing.assert_close(same.decode(per_frame.mean), frames, rtol=0, atol=1e-12)
    short = inflate(image, halve_time=(True, True))
    assert short.compression.t == 4
    torch.testing.assert_close(short.encode(video).mean, per_frame.mean[:, :, ::4], rtol=0, atol=1e-12)
    decoded = short.decode(per_frame.mean[:, :, ::4])
    shown = torch.cat([frames[:, :, :1], frames[:, :, 4::4].repeat_interleave(4, 2)], 2)
    torch.testing.assert_close(decoded, shown, rtol=0, atol=1e-12)
    assert torch.equal(short.latent_norm.mean, image.latent_norm.mean)
    drawn = inflate(image, halve_time=(True, True), tail=False)
    assert not torch.allclose(drawn.encode(video).mean, short.encode(video).mean)
    with pytest.raises(ConfigError, match="temporal_kernel: got 3"):
        inflate(short, halve_time=(True, True))


def test_clamps_in_evaluation_only() -> None:
    model = redraw(build_autoencoder(dataclasses.replace(TINY, clamp=True)))
    latents = torch.randn(1, 4, 2, 2, 2) * 5
    assert model.train().decode(latents).abs().max() > 1
    assert model.eval().decode(latents).abs().max() == 1


@torch.no_grad()
def test_cropping_gives_the_last_rows_no_cell() -> None:
    model = make("wan 2.1")
    video = torch.randn(1, 3, 5, 11, 14, dtype=torch.float64)
    assert model.encode(video).mean.shape == (1, 4, 2, 2, 3)
    with pytest.raises(ValueError, match=r"needed 4 or more"):
        model.encode(video[..., :3])
    with pytest.raises(ValueError, match="nearest: 8 and 16"):
        make("wan 2.2").encode(video.new_zeros(1, 3, 3, 12, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 0}, "latent_channels: got 0"),
        ({"multipliers": ()}, "multipliers: got"),
        ({"halve_time": (True,)}, "halve_time: got 1 entries, needed 2"),
        ({"blocks": 0}, "blocks: got 0"),
        ({"temporal_kernel": 1}, "halve_time: an image VAE"),
        ({"norm": "group", "num_groups": 3}, "num_groups: got 3"),
        ({"odd_sizes": "crop", "patch": 2}, "odd_sizes: crop needs patch 1"),
        ({"odd_sizes": "crop", "shortcuts": True}, "odd_sizes: crop does not go with shortcuts"),
        (
            {"norm": "group", "num_groups": 8, "multipliers": (1, 1, 1)},
            "num_groups: got 8, needed a divisor of the decoder's halved widths",
        ),
        ({"decoder_width": 7, "multipliers": (1, 1, 1)}, "narrow_before: halves the decoder's widths"),
        ({"shortcuts": True, "multipliers": (1, 9, 9)}, r"multipliers\[1\]: 72 channels do not divide"),
        ({"shortcuts": True, "encoder_width": 72, "decoder_width": 1, "multipliers": (1, 1, 9)}, r"multipliers\["),
    ],
)
def test_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


def test_wrong_sizes_name_the_nearest() -> None:
    model = make("wan 2.2", torch.float32)
    with pytest.raises(ValueError, match=r"1 \+ k \* 2 .*got 4; the nearest are 3 and 5"):
        model.encode(torch.zeros(1, 3, 4, 16, 16))
    with pytest.raises(ValueError, match=r"model.in_channels"):
        model.encode(torch.zeros(1, 4, 3, 16, 16))
    with pytest.raises(ValueError, match=r"model.latent_channels"):
        model.decode(torch.zeros(1, 5, 3, 2, 2))
    with pytest.raises(ValueError, match="a later chunk needs a multiple of 2"):
        list(model.encode_stream([torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 3, 3, 16, 16)]))
    for empty in ((0, 3, 3, 16, 16), (1, 3, 3, 0, 16)):
        with pytest.raises(ValueError, match=r"video: got shape .*needed 1 or more of each"):
            model.encode(torch.zeros(empty))
    for empty in ((0, 4, 3, 2, 2), (1, 4, 0, 2, 2), (1, 4, 3, 0, 2)):
        with pytest.raises(ValueError, match=r"latents: got shape .*needed 1 or more of each"):
            model.decode(torch.zeros(empty))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("size", [(1, 3, 4), (2, 2, 4)])
def test_a_later_chunk_of_another_size_is_refused(grad: bool, size: tuple[int, int, int]) -> None:
    model = make("wan 2.1", torch.float32)
    b, h, w = size
    with torch.set_grad_enabled(grad):
        _, state = model.decode_chunk(torch.zeros(1, 4, 1, 2, 4), START)
        with pytest.raises(ValueError, match=r"state: got frames \(b, h, w\) of \(1, 2, 4\), needed"):
            model.decode_chunk(torch.zeros(b, 4, 1, h, w), state)
        _, state = model.encode_chunk(torch.zeros(1, 3, 1, 8, 16), START)
        with pytest.raises(ValueError, match=r"state: got frames \(b, h, w\) of \(1, 8, 16\), needed"):
            model.encode_chunk(torch.zeros(b, 3, 4, 4 * h, 4 * w), state)


@torch.no_grad()
def test_an_accelerator_is_given_whole_frames_and_larger_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU's caches ask for would leave a GPU waiting for launches; meta stands for any other device."""
    rows: list[tuple[int, int]] = []
    normalize = NormConv._normalize

    def counted(self: NormConv, x: Tensor, guide: Tensor | None) -> Tensor:
        rows.append((x.shape[2], x.shape[3]))
        return normalize(self, x, guide)

    monkeypatch.setattr(NormConv, "_normalize", counted)
    config = dataclasses.replace(TINY, decoder_width=8)
    for device, height, frames in (("cpu", 16, 1), ("meta", 256, 2)):
        with torch.device(device):
            model = build_autoencoder(config).eval()
        sizes: list[int] = []
        model.decoder.out.register_forward_hook(lambda _, inputs, __, sizes=sizes: sizes.append(inputs[0].shape[2]))
        rows.clear()
        model.decode(torch.zeros(1, 4, 3, 64, 64, device=device))
        assert max(sizes) == frames and sum(sizes) == 9
        assert {height for count, height in rows if count == 1} >= {height}
        assert max(height for _, height in rows) == max(height, 64)
