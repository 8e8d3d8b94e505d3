"""Tiles against the whole frame, what their seams measure, memory per call and refusals. Every weight is redrawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from ltd.autoencoders import CausalVae, CausalVaeConfig, ConvVae, ConvVaeConfig, Posterior
from ltd.config import ConfigError, from_dict
from ltd.inference.tiling import (
    TilingConfig,
    make_pieces,
    seam_metric,
    tiled_decode,
    tiled_encode,
)
from ltd.nn.causal_conv import State
from ltd.shapes import Compression

#: Compression (2, 2, 4); both halves reach 3 cells down and 2 across, or less.
SMALL = CausalVaeConfig(
    latent_channels=3,
    front=(1, 1, 2),
    channels=(4, 6),
    factors=((2, 2, 2),),
    encoder_blocks=(1, 0),
    decoder_blocks=(1, 0),
    block_kernels=((3, 3, 3), (1, 3, 1)),
    shortcuts=False,
    linear_path=True,
)


class Counted(CausalVae):
    """Remembers the sizes it was called with; adds ``offset`` times the number of the tile to what it decodes."""

    offset = 0.0

    def __init__(self, config: CausalVaeConfig = SMALL) -> None:
        super().__init__(config)
        self.sizes: list[tuple[int, ...]] = []
        self.tiles = 0

    def encode_chunk(self, video: Tensor, state: State) -> tuple[Posterior, State]:
        self.sizes.append(tuple(video.shape[2:]))
        return super().encode_chunk(video, state)

    def decode_chunk(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        self.sizes.append(tuple(latents.shape[2:]))
        self.tiles += state == ()
        video, state = super().decode_chunk(latents, state)
        return video + self.offset * self.tiles, state


def _model(dtype: torch.dtype = torch.float64, **changes: Any) -> Counted:
    model = Counted(dataclasses.replace(SMALL, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*model.parameters(), *model.linear_encoder.buffers(), *model.linear_decoder.buffers()]:
            fan_in = max(1, value[0].numel()) if value.ndim > 1 else 4
            value.copy_(torch.randn(value.shape, generator=generator) * fan_in**-0.5)
    return model.to(dtype)


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def _overlap(model: CausalVae, side: Any, halos: int = 2) -> int:
    """Pixels of ``halos`` halos along both axes, in whole cells of both."""
    block = model.compression
    return max(halos * cells * size for cells, size in zip(model.spatial_halo(side), (block.h, block.w), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("padding", ["replicate", "zeros"])
def test_decode_is_the_whole_frames_if_the_overlap_is_twice_the_halo(padding: str, dtype: torch.dtype) -> None:
    model = _model(dtype, padding=padding)
    latents = _random(1, 3, 3, 27, 19, dtype=dtype)
    with torch.no_grad():
        whole = model.decode(latents)
    for extra in (0, 4):  # a cut, and a blend
        overlap = _overlap(model, "decode") + extra
        config = TilingConfig(tile=(overlap + 8, overlap + 12), overlap=overlap, frames_per_chunk=2)
        found = tiled_decode(model, latents, config, whole=whole)
        assert found.exact
        assert found.num_tiles > 8
        torch.testing.assert_close(found.output, whole, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)
        assert found.seams.max_difference == (found.output.double() - whole.double()).abs().max()
        assert found.seams.ratio == pytest.approx(1, abs=0.2)


def test_encode_is_the_whole_frames_if_the_overlap_is_twice_the_halo() -> None:
    model = _model()
    video = _random(1, 3, 5, 60, 68)
    with torch.no_grad():
        whole = model.encode(video)
    for extra in (0, 8):
        overlap = _overlap(model, "encode") + extra
        config = TilingConfig(tile=(overlap + 4, overlap + 8), overlap=overlap, frames_per_chunk=2)
        found = tiled_encode(model, video, config, whole=whole)
        assert found.exact
        assert found.num_tiles > 8
        torch.testing.assert_close(found.output.mean, whole.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.output.logvar, whole.logvar, rtol=0, atol=1e-12)
        assert found.seams.max_difference == (found.output.mean - whole.mean).abs().max()


@pytest.mark.parametrize("side", ["encode", "decode"])
def test_one_cell_less_than_twice_the_halo_is_not_exact(side: Any) -> None:
    # The exactness above is the overlap's doing.
    model = _model(front=(1, 2, 2), block_kernels=((3, 3, 3), (1, 3, 3)))
    overlap = _overlap(model, side) - 4
    config = TilingConfig(tile=(overlap + 8, overlap + 8), overlap=overlap)
    with torch.no_grad():
        if side == "decode":
            latents = _random(1, 3, 2, 27, 19)
            found: Any = tiled_decode(model, latents, config, whole=model.decode(latents))
        else:
            video = _random(1, 3, 3, 60, 64)
            found = tiled_encode(model, video, config, whole=model.encode(video))
    assert not found.exact
    assert found.seams.max_difference > 1e-6


def test_one_tile_is_the_whole_frame() -> None:
    model = _model()
    latents = _random(1, 3, 3, 5, 4)
    found = tiled_decode(model, latents, TilingConfig(tile=(64, 64), overlap=0), whole=model.decode(latents).detach())
    assert (found.num_tiles, found.exact, found.seams.ratio, found.seams.worst) == (1, True, 1.0, 1.0)
    assert found.seams.max_difference == 0
    assert found.output.grad_fn is None


@pytest.mark.parametrize(("size", "tile", "overlap"), [(40, 12, 4), (41, 12, 4), (13, 12, 11), (31, 12, 9)])
def test_shares_sum_to_one_and_lie_within_their_tiles(size: int, tile: int, overlap: int) -> None:
    # Also where three tiles overlap, and where the last one is moved back.
    latents = torch.ones(1, 3, 1, size, size, dtype=torch.float64)
    config = TilingConfig(tile=(tile, tile), overlap=overlap)
    found = tiled_decode(_Pointwise(), latents, config)  # type: ignore[arg-type]
    assert not found.exact
    torch.testing.assert_close(found.output, latents, rtol=0, atol=1e-15)
    assert tiled_decode(_Pointwise(halo=0), latents, config).exact  # type: ignore[arg-type]


class _Pointwise:
    """Gives back what it gets."""

    def __init__(self, halo: int | None = None) -> None:
        self.compression, self.latent_channels, self.halo = Compression(1, 1, 1), 3, halo

    def spatial_halo(self, side: str) -> tuple[int, int] | None:
        return None if self.halo is None else (self.halo, self.halo)

    def decode_chunk(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        return latents.clone(), state


def test_pieces_by_hand() -> None:
    first, second, third = make_pieces([(0, 4), (2, 6), (5, 9)], [(4, 8), (11, 11)], 2)
    assert (first.seen, second.seen, third.seen) == (slice(0, 8), slice(4, 11), slice(11, 18))
    assert (first.inside, second.inside, third.inside) == (slice(0, 8), slice(0, 7), slice(1, 8))
    assert (first.cells, second.cells, third.cells) == (slice(0, 4), slice(2, 6), slice(5, 9))
    assert first.weight.tolist() == [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]
    assert second.weight.tolist() == [0.125, 0.375, 0.625, 0.875, 1, 1, 1]
    assert third.weight.tolist() == [1] * 7


def test_time_is_streamed_inside_a_tile() -> None:
    model = _model()
    config = TilingConfig(tile=(24, 32), overlap=16, frames_per_chunk=4)
    tiled_decode(model, _random(1, 3, 9, 27, 19), config)
    assert max(model.sizes) == (2, 12, 8), "4 frames of 24 x 32 pixels are 2 x 12 x 8 cells"
    assert {size[1:] for size in model.sizes} == {(12, 8)}, "all tiles are of one size"
    model.sizes.clear()
    tiled_encode(model, _random(1, 3, 17, 60, 68), config)
    assert {size[1:] for size in model.sizes} == {(24, 32)}
    assert {size[0] for size in model.sizes} == {3, 4, 2}


def test_planted_seam_is_found_and_blending_softens_it() -> None:
    model = _model()
    latents = _random(1, 3, 2, 40, 24)
    with torch.no_grad():
        whole = model.decode(latents)
    least = _overlap(model, "decode")
    clean = tiled_decode(model, latents, TilingConfig(tile=(least + 8,) * 2, overlap=least))
    model.offset = 3 * float(whole.diff(dim=-1).abs().mean())
    model.tiles = 0
    cut = tiled_decode(model, latents, TilingConfig(tile=(least + 8,) * 2, overlap=least))
    model.tiles = 0
    blended = tiled_decode(model, latents, TilingConfig(tile=(least + 24,) * 2, overlap=least + 16))
    assert 0.8 < clean.seams.ratio < 1.2
    assert cut.seams.ratio > 2
    assert cut.seams.worst >= cut.seams.ratio
    assert blended.seams.ratio < 1 + 0.5 * (cut.seams.ratio - 1)


def test_seam_metric_by_hand() -> None:
    # Steps of 1 along w, but 4 at line 3; along h nothing changes.
    line = torch.tensor([0.0, 1, 2, 6, 7, 8])
    video = line.expand(1, 2, 3, 5, 6)
    found = seam_metric(video, video + 0.5 * torch.eye(5, 6), ([], [3]))
    assert (found.ratio, found.worst) == (4, 4)
    assert found.max_difference == 0.5
    assert found.mean_difference == pytest.approx(0.5 * 5 / 30)
    found = seam_metric(video, None, ([2], [3, 1]))
    assert found.ratio == pytest.approx(5 / 2), "rows without a step add nothing"
    assert (found.worst, found.max_difference) == (4, None)
    assert seam_metric(video.movedim(4, 3), None, ([3], [])).ratio == 4
    # A grid of the decoder with a period of 3 (steps 4 at 3 and 6) is no seam.
    grid = torch.tensor([0.0, 1, 2, 6, 7, 8, 12, 13, 14]).expand(1, 1, 1, 2, 9)
    assert seam_metric(grid, None, ([], [3]), period=(1, 3)).ratio == 1
    assert seam_metric(grid, None, ([], [3])).ratio > 2
    assert seam_metric(torch.zeros(1, 1, 1, 4, 4), None, ([2], [2])).ratio == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile": (23, 32), "overlap": 8}, r"tile: got \(23, 32\), needed multiples of 2 \(model\.compression\.h\)"),
        ({"tile": (32, 30), "overlap": 8}, r"tile: got \(32, 30\), needed multiples of 4 \(model\.compression\.w\)"),
        ({"tile": (32, 32), "overlap": 6}, r"overlap: got 6, needed multiples of 4 \(model\.compression\.w\)"),
        (
            {"tile": (8, 64), "overlap": "exact"},
            r"tile: got \(8, 64\), needed more than \d+ pixels along h for overlap ",
        ),
        ({"tile": (32, 32), "overlap": 12, "frames_per_chunk": 1}, r"frames_per_chunk: got 1, needed at least 2 "),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_it_is_called(fields: Any, message: str) -> None:
    model = _model()
    config = TilingConfig(**fields)
    with pytest.raises(ConfigError, match=message):
        tiled_decode(model, _random(1, 3, 3, 27, 19), config)
    with pytest.raises(ConfigError, match=message):
        tiled_encode(model, _random(1, 3, 5, 60, 68), config)
    assert not model.sizes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile": [64, 32], "overlap": 32}, r"^tile: got \(64, 32\), needed more than overlap \(32\) along both axes"),
        ({"overlap": -8}, r"^overlap: got -8, needed 0 or more"),
        ({"frames_per_chunk": 0}, r"^frames_per_chunk: got 0, needed 1 or more"),
    ],
)
def test_impossible_settings_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(TilingConfig, fields)


def test_odd_video_is_refused_before_the_model_is_called() -> None:
    model = _model()
    with pytest.raises(ValueError, match="width must be a multiple of 4"):
        tiled_encode(model, _random(1, 3, 5, 60, 66), TilingConfig(tile=(32, 32), overlap=8))
    assert not model.sizes


CONV = ConvVaeConfig(
    latent_channels=3,
    encoder_width=4,
    decoder_width=4,
    multipliers=(1, 2, 2),
    halve_time=(False, True),
    blocks=1,
    attention=False,
)


@pytest.mark.parametrize(
    "changes", [{}, {"patch": 2, "shortcuts": True}, {"conditional_norm": True, "front": "repeat"}]
)
def test_exact_tiles_of_a_convolutional_vae_are_the_whole_frames(changes: dict[str, Any]) -> None:
    model = ConvVae(dataclasses.replace(CONV, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            fan_in = value[0].numel() if value.ndim > 1 else 4
            value.copy_(torch.randn(value.shape, generator=generator) * fan_in**-0.5)
    model = model.double()
    unit = model.compression.h
    for side in ("decode", "encode"):
        halo = model.spatial_halo(side)  # type: ignore[arg-type]
        assert halo is not None
        tile = (2 * halo[0] + 2) * unit
        cells = 2 * halo[0] + 5
        config = TilingConfig(tile=(tile, cells * unit), overlap="exact")
        with torch.no_grad():
            if side == "decode":
                latents = _random(1, 3, 2, cells, 2)
                tiled: Any = tiled_decode(model, latents, config)
                found, whole = tiled.output, model.decode(latents)
            else:
                video = _random(1, 3, 3, cells * unit, 2 * unit)
                tiled = tiled_encode(model, video, config)
                found, whole = tiled.output.mean, model.encode(video).mean
        assert tiled.exact
        assert tiled.num_tiles > 1
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-11 * float(whole.std()))


def test_models_that_see_the_whole_frame_have_no_exact_tiles() -> None:
    for changes in ({"attention": True}, {"norm": "group", "num_groups": 2}):
        model = ConvVae(dataclasses.replace(CONV, **changes))
        with pytest.raises(ConfigError, match=r"overlap: got exact, but pixels of this ConvVae depend on the whole"):
            tiled_decode(model, torch.zeros(1, 3, 1, 4, 4), TilingConfig(overlap="exact"))
