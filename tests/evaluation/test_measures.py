import dataclasses

import pytest
import torch

from ltd.evaluation.measures import caption_rows, distribution_rows, motion_rows, outputs_of
from ltd.evaluation.protocol import ClipFeatures, Clips, Reference

ALL = ["fid", "sfid", "kid", "inception_score", "precision_recall", "density_coverage"]


class Colours:
    """A map with three outputs: mean colours as features and spatial map, and logits that name the brightest."""

    name, preprocessing, dim = "colours", "none", 3
    dims = {"features": 3, "logits": 3, "spatial": 3}  # noqa: RUF012

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, clips):
        return self.outputs(clips, ("features",))["features"]

    def outputs(self, clips, names):
        self.passes += 1
        colours = clips.double().mean(dim=(1, 2, 3))
        return {"features": colours, "logits": colours * 10, "spatial": colours * 2}


class Captions:
    """Captions as the colours they name, so that a clip of its caption's colour has a cosine of 1."""

    VECTORS = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}  # noqa: RUF012

    def __call__(self, captions):
        return torch.tensor([self.VECTORS[caption] for caption in captions])


def _clips(n: int, seed: int, shift: int = 0) -> Clips:
    """Clips in turn mostly red, green and blue, that drift."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 40, (n, 4, 16, 16, 3), generator=random).to(torch.uint8) + shift
    level = torch.randint(120, 190, (n,), generator=random).to(torch.uint8)
    for i in range(n):
        pixels[i, ..., i % 3] += level[i]
    names = tuple(("red", "green", "blue")[i % 3] for i in range(n))
    return Clips(pixels, names, names)


def test_rows_stand_beside_real_clips_at_equal_n():
    reference = Reference(_clips(48, 1), None)
    probe = Colours()
    features = ClipFeatures(probe, frames=2, outputs=("features", *outputs_of(ALL)))
    rows = {r.name: r for r in distribution_rows(_clips(24, 0), reference, features, ALL, suffix="_frames", note="N")}
    assert list(rows) == [
        "fid_frames", "sfid_frames", "kid_frames", "kid_std_frames", "inception_score_frames",
        "inception_score_std_frames", "precision_frames", "recall_frames", "density_frames", "coverage_frames",
    ]  # fmt: skip
    assert probe.passes == 2  # the pool once, the samples once
    for row in rows.values():
        assert row.n == 48 and row.network == "colours" and row.note.startswith("N") and row.floor is not None
        assert row.preprocessing.startswith("2 frames per clip; none")
    assert rows["kid_frames"].preprocessing.endswith("100 subsets of 24")
    assert rows["sfid_frames"].value == pytest.approx(4 * rows["fid_frames"].value)  # its features are doubled
    assert rows["fid_frames"].value < 10 * rows["fid_frames"].floor
    assert rows["inception_score_frames"].value == pytest.approx(3, rel=1e-2)
    assert rows["precision_frames"].floor > 0.5
    bad = {r.name: r for r in distribution_rows(_clips(24, 0, shift=25), reference, ClipFeatures(Colours(), frames=2,
           outputs=("features", *outputs_of(ALL))), ALL)}  # fmt: skip
    assert bad["fid"].value - rows["fid_frames"].value == pytest.approx(3 * 25**2, rel=0.2)
    assert bad["fid"].floor == rows["fid_frames"].floor and bad["kid"].value > 5 * abs(bad["kid"].floor)
    assert bad["precision"].value == bad["recall"].value == 0 and bad["density"].value < 0.1


def test_fid_of_clips_is_of_their_vectors():
    from ltd.evaluation.controls import disjoint_draws
    from ltd.evaluation.frechet import frechet_distance

    samples, pool = _clips(12, 0), _clips(24, 1)
    row = distribution_rows(samples, Reference(pool, None), ClipFeatures(Colours()), ["fvd"], seed=3)[0]
    mine, real = Colours()(samples.pixels), Colours()(pool.pixels)
    draws = [disjoint_draws(24, 12, seed=3, repeat=repeat) for repeat in range(3)]
    assert row.value == pytest.approx(sum(frechet_distance(mine, real[held]).value for held, _ in draws) / 3)
    assert row.floor == pytest.approx(sum(frechet_distance(real[d], real[held]).value for held, d in draws) / 3)
    assert (row.name, row.n) == ("fvd", 12)


def test_clip_score_rows_tell_right_captions_from_wrong_ones():
    reference, features = Reference(_clips(24, 1), _clips(12, 2)), ClipFeatures(Colours(), frames=2)
    good = caption_rows(_clips(12, 0), reference, features, Captions(), suffix="_frames")[0]
    assert (good.name, good.n) == ("clip_score_frames", 24)
    assert good.value == pytest.approx(good.floor, rel=0.02) and good.value > 95
    wrong = dataclasses.replace(_clips(12, 0), captions=_clips(12, 0).captions[1:] + ("red",))
    assert caption_rows(wrong, reference, features, Captions())[0].value < 20
    unmatched = caption_rows(_clips(12, 0), Reference(_clips(24, 1), None), features, Captions())[0]
    assert unmatched.floor == pytest.approx(good.floor, rel=0.02)


class Still:
    """Flow of clips that do not move."""

    name, preprocessing = "still", "none"

    def __call__(self, clips):
        b, t, h, w, _ = clips.shape
        return torch.zeros(b, t - 1, h, w, 2), torch.zeros(b, t - 1, h, w, 2)


def test_motion_rows():
    frames = torch.full((6, 4, 16, 16, 3), 100, dtype=torch.uint8)
    steady = Clips(frames, ("a",) * 6, ("a",) * 6)
    flickering = frames.clone()
    flickering[:, 1::2] += 51
    samples = Clips(flickering, ("a",) * 6, ("a",) * 6)
    pool = Clips(torch.cat((frames, frames)), ("a",) * 12, ("a",) * 12)
    rows = {row.name: row for row in motion_rows(samples, Reference(pool, None), Still())}
    assert rows["warping_error"].value == pytest.approx(0.04) and rows["warping_error"].floor == 0
    assert "6 of 6 clips and 100% of pixels can be followed" in rows["warping_error"].note
    assert rows["motion_flicker"].value == pytest.approx(0.2) and rows["motion_flicker"].floor == 0
    assert rows["motion_magnitude"].value == rows["motion_dynamic_degree"].value == 0
    assert all(row.n == 6 and row.network == "still" for row in rows.values())
    assert [row.name for row in motion_rows(steady, Reference(pool, None), Still(), ["warping_error"])] == [
        "warping_error"
    ]


def test_refusals():
    reference, small = Reference(_clips(24, 1), None), _clips(12, 0)
    small = dataclasses.replace(small, pixels=small.pixels[:, :, :8])
    for measure in (
        lambda: distribution_rows(small, reference, ClipFeatures(Colours()), ["fid"]),
        lambda: motion_rows(small, reference, Still()),
    ):
        with pytest.raises(ValueError, match=r"samples are \(4, 8, 16, 3\) and real clips \(4, 16, 16, 3\)"):
            measure()
    with pytest.raises(ValueError, match="precision_recall: got 3 samples, needed 4 or more"):
        distribution_rows(_clips(3, 0), reference, ClipFeatures(Colours()), ["precision_recall"])
    with pytest.raises(ValueError, match="need 50 items, got 24"):
        distribution_rows(_clips(25, 0), reference, ClipFeatures(Colours()), ["fid"])

    plain = Colours()
    plain.dims = {"features": 3}
    with pytest.raises(ValueError, match="colours has no output 'spatial', which the metrics asked for need"):
        ClipFeatures(plain, outputs=("features", "spatial"))
