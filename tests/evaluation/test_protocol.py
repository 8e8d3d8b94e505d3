import dataclasses

import pytest
import torch

from ltd.evaluation.protocol import (
    ClipFeatures,
    Clips,
    Reference,
    autoencoder_rows,
    frechet_rows,
    nearest_rows,
    retrieval_rows,
    spread_frames,
)


class Probe:
    """A feature map that sees brightness, its spread over time and the first step: 3-d, and counts its calls."""

    name, preprocessing, dim = "probe", "none", 3

    def __init__(self) -> None:
        self.num_clips = 0

    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        self.num_clips += len(clips)
        x = clips.float().mean(dim=(2, 3, 4))  # (b, t)
        step = (x[:, 1:] - x[:, :-1]).abs().mean(dim=1) if x.shape[1] > 1 else torch.zeros(len(x))
        return torch.stack((x.mean(dim=1), x.std(dim=1, correction=0), step), dim=1)


def _clips(n: int, seed: int, captions: int = 4) -> Clips:
    """Clips that brighten steadily from a level that their caption sets."""
    random = torch.Generator().manual_seed(seed)
    level = torch.arange(n) % captions * 40 + 10 * torch.rand(n, generator=random)
    speed = 2 + 3 * torch.rand(n, generator=random)
    frames = (level[:, None] + speed[:, None] * torch.arange(9)).round().to(torch.uint8)  # (n, t)
    names = tuple(f"c{i % captions}" for i in range(n))
    return Clips(frames[:, :, None, None, None].expand(n, 9, 8, 8, 3).contiguous(), names, names)


def _brighter(clips: Clips, by: int) -> Clips:
    return dataclasses.replace(clips, pixels=clips.pixels + by)


def test_frechet_rows_stand_beside_floor_and_controls():
    samples, reference = _clips(32, 0, 1), Reference(_clips(64, 1, 1), _clips(32, 2, 1))
    rows = {row.name: row for row in frechet_rows(samples, reference, ClipFeatures(Probe()), name="d", note="N")}
    assert set(rows) == {"d", "d_real_same_captions", "d_shuffled_frames"}
    good = rows["d"]
    assert (good.network, good.n, good.note) == ("probe", 32, "N")
    assert good.floor is not None and good.value < 3 * good.floor
    assert rows["d_shuffled_frames"].value > 10 * good.floor
    worse = [frechet_rows(_brighter(samples, by), reference, ClipFeatures(Probe()), name="d")[0] for by in (20, 40)]
    assert worse[0].floor == good.floor
    # a shift of the mean by 20 and 40 adds its square
    assert worse[0].value - good.value == pytest.approx(400, rel=0.5)
    assert worse[1].value - worse[0].value == pytest.approx(1200, rel=0.5)


def test_frames_count_one_by_one_and_have_no_order():
    features = ClipFeatures(Probe(), frames=3)
    reference = Reference(_clips(64, 1), None)
    rows = frechet_rows(_clips(32, 0), reference, features, name="d")
    assert [row.name for row in rows] == ["d"]
    assert rows[0].n == 96
    assert "3 frames per clip" in rows[0].preprocessing


def test_few_vectors_are_said_to_be_few():
    row = frechet_rows(_clips(3, 0), Reference(_clips(6, 1), None), ClipFeatures(Probe()), name="d")[0]
    assert row.note == "3 vectors of 3 dimensions: compare at equal n only"


def test_unequal_n_is_refused():
    with pytest.raises(ValueError, match="8 matched windows for 16 samples"):
        frechet_rows(_clips(16, 0), Reference(_clips(32, 1), _clips(8, 2)), ClipFeatures(Probe()), name="d")
    with pytest.raises(ValueError, match="need 32 items, got 31"):
        frechet_rows(_clips(16, 0), Reference(_clips(31, 1), None), ClipFeatures(Probe()), name="d")


def test_retrieval_tells_right_captions_from_wrong_ones():
    samples, reference = _clips(16, 0), Reference(_clips(32, 1), _clips(16, 2))
    right = retrieval_rows(samples, reference, ClipFeatures(Probe()), name="r")[0]
    assert (right.value, right.floor, right.n) == (1.0, 0.25, 16)
    assert "16 windows of 4 training clips" in right.note and "reach 1.000 (n = 32)" in right.note
    turned = dataclasses.replace(samples, captions=samples.captions[1:] + samples.captions[:1])
    assert retrieval_rows(turned, reference, ClipFeatures(Probe()), name="r")[0].value == 0.0


def test_copies_lie_far_below_the_floor_of_the_nearest_clip():
    pool = _clips(16, 1)
    row = nearest_rows(pool, Reference(pool, None), ClipFeatures(Probe()), name="near", unit="u")[0]
    assert row.value == 0.0
    assert row.floor is not None and 25 < row.floor < 60  # captions lie 40 grey levels apart
    away = nearest_rows(_brighter(pool, 100), Reference(pool, None), ClipFeatures(Probe()), name="near", unit="u")[0]
    assert away.value > 10 and away.floor == row.floor


def test_features_of_the_same_clips_are_computed_once():
    probe = Probe()
    features, clips = ClipFeatures(probe, frames=2), _clips(5, 0)
    first = features.vectors(clips.pixels)
    assert features.vectors(clips.pixels) is first
    assert probe.num_clips == 10
    assert torch.equal(features.pooled(clips.pixels), first.mean(dim=1))
    assert not torch.equal(features.vectors(_clips(5, 1).pixels), first)


def test_frames_are_spread_evenly():
    clips = torch.arange(17)[None]
    assert spread_frames(clips, 2).tolist() == [[4, 12]]
    assert spread_frames(clips, 1).tolist() == [[8]]
    assert spread_frames(clips[:, :1], 4).tolist() == [[0]]


def test_autoencoder_rows_of_a_known_error():
    clips = torch.full((2, 3, 16, 16, 3), 100, dtype=torch.uint8)
    rows = {row.name: row for row in autoencoder_rows([clips, clips], lambda x: x + 5, weights="ema", note="held out")}
    assert rows["psnr"].value == pytest.approx(34.1514, abs=1e-3)  # 20 log10(255 / 5)
    assert rows["psnr"].n == 4 and rows["psnr"].weights == "ema"
    assert rows["ssim"].value == pytest.approx((2 * 100 * 105 + 6.5025) / (100**2 + 105**2 + 6.5025), abs=1e-9)
