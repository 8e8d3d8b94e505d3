import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ltd.evaluation.fidelity import PairedDistance, Psnr, Ssim, ssim


def _pair(noise: float = 12.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 200, 40)[None, None, None, :, None] + torch.linspace(0, 50, 24)[None, None, :, None, None]
    clips = (ramp + 20 * torch.rand(3, 4, 24, 40, 3, generator=random)).round().clamp(0, 255)
    noisy = (clips + noise * torch.randn(clips.shape, generator=random)).round().clamp(0, 255)
    return clips.to(torch.uint8), noisy.to(torch.uint8)


def test_psnr_equals_scikit_image_per_clip_and_overall():
    clips, noisy = _pair()
    noisy[0] = clips[0] ^ 1  # another error level, so that the two means differ
    psnr = Psnr()
    psnr.update(noisy, clips)
    each = [peak_signal_noise_ratio(c.numpy(), n.numpy(), data_range=255) for c, n in zip(clips, noisy, strict=True)]
    assert psnr.clip_mean == pytest.approx(sum(each) / 3, abs=1e-9)
    whole = peak_signal_noise_ratio(clips.numpy(), noisy.numpy(), data_range=255)
    assert psnr.overall == pytest.approx(whole, abs=1e-9)
    assert psnr.overall < psnr.clip_mean - 1


def test_psnr_of_known_noise_is_its_closed_form():
    random = torch.Generator().manual_seed(1)
    clips = torch.full((1, 8, 64, 64, 3), 128.0)
    psnr = Psnr()
    psnr.update(clips + 10 * torch.randn(clips.shape, generator=random), clips)
    assert psnr.overall == pytest.approx(-20 * math.log10(10 / 255), abs=0.05)
    same = Psnr()
    same.update(clips, clips)
    assert same.clip_mean == math.inf


def test_ssim_equals_scikit_image():
    clips, noisy = _pair()
    want = [
        structural_similarity(
            a.numpy(), b.numpy(), data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(clips.flatten(0, 1), noisy.flatten(0, 1), strict=True)
    ]  # fmt: skip
    got = ssim(clips.flatten(0, 1).permute(0, 3, 1, 2), noisy.flatten(0, 1).permute(0, 3, 1, 2))
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), atol=1e-9, rtol=0)
    accumulator = Ssim()
    accumulator.update(noisy, clips)
    assert accumulator.clip_mean == pytest.approx(sum(want) / len(want), abs=1e-9)
    assert 0.2 < accumulator.clip_mean < 0.95


@pytest.mark.parametrize("kind", [Psnr, Ssim])
def test_merged_shards_equal_the_whole(kind):
    clips, noisy = _pair()
    whole, first, second = kind(), kind(), kind()
    whole.update(noisy, clips)
    first.update(noisy[:1], clips[:1])
    second.update(noisy[1:], clips[1:])
    first.merge(second.state())
    assert first.state() == pytest.approx(whole.state())
    assert first.clip_mean == pytest.approx(whole.clip_mean, rel=1e-12)


def test_refusals_name_what_was_got():
    with pytest.raises(ValueError, match=r"differ in shape: \(1, 2, 3\) and \(1, 2, 4\)"):
        Psnr().update(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="nothing was counted"):
        _ = Psnr().clip_mean
    with pytest.raises(ValueError, match="11 x 11 or more, got 8 x 30"):
        Ssim().update(torch.zeros(1, 2, 8, 30, 3), torch.zeros(1, 2, 8, 30, 3))


def _mean_error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).abs().mean(dim=(1, 2, 3, 4))


def test_paired_distance_sees_clips_in_signed_range_and_averages_over_them():
    seen = []

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((x.shape, float(x.min()), float(x.max())))
        return _mean_error(x, y)

    references = torch.zeros(3, 2, 4, 5, 3, dtype=torch.uint8)
    clips = references.clone()
    clips[0], clips[1] = 255, 51
    whole, merged = PairedDistance(distance), PairedDistance(distance)
    whole.update(clips, references)
    assert seen == [((3, 3, 2, 4, 5), -1.0, 1.0)]
    assert whole.clip_mean == pytest.approx((2 + 0.4 + 0) / 3, rel=1e-6)
    for part in (slice(0, 1), slice(1, 3)):
        shard = PairedDistance(distance)
        shard.update(clips[part], references[part])
        merged.merge(shard.state())
    assert merged.clip_mean == pytest.approx(whole.clip_mean, rel=1e-12) and merged.num_clips == 3


def test_paired_distance_names_the_clips_that_have_none():
    clips = torch.zeros(3, 1, 4, 4, 3, dtype=torch.uint8)
    metric = PairedDistance(lambda x, y: torch.tensor([0.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="distances of 1 of 3 clips are NaN or infinite, of clips 1$"):
        metric.update(clips, clips)
    with pytest.raises(ValueError, match="differ in shape"):
        metric.update(clips, clips[:2])
    with pytest.raises(ValueError, match="nothing was counted yet"):
        _ = PairedDistance(_mean_error).clip_mean
