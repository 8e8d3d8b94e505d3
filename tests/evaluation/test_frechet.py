import logging

import numpy as np
import pytest
import scipy.linalg
import torch

from ltd.evaluation.frechet import FeatureMoments, FrechetDistance, frechet_distance


def _features(n: int, dim: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=random, dtype=torch.float64)
    return torch.randn(n, dim, generator=random, dtype=torch.float64) @ mixing + torch.randn(dim, generator=random)


def _exact(mean: torch.Tensor, covariance: torch.Tensor) -> FeatureMoments:
    """Moments of an exactly known Gaussian."""
    moments = FeatureMoments(len(mean))
    moments.merge({"num_samples": 101, "mean": mean, "scatter": covariance * 100})
    return moments


def test_closed_forms():
    rng = torch.Generator().manual_seed(0)
    dim = 6
    mean, shift = torch.randn(2, dim, generator=rng, dtype=torch.float64)
    a = torch.randn(dim, dim, generator=rng, dtype=torch.float64)
    covariance = a @ a.T + torch.eye(dim, dtype=torch.float64)
    here = FrechetDistance(_exact(mean, covariance))
    # equal, shifted, scaled: 0; |shift|^2; (1 - s)^2 tr S for S against s^2 S
    assert here.to(_exact(mean, covariance)).value == pytest.approx(0, abs=1e-10)
    assert here.to(_exact(mean + shift, covariance)).value == pytest.approx(float(shift.square().sum()), rel=1e-10)
    scaled = here.to(_exact(mean, 9 * covariance)).value
    assert scaled == pytest.approx(4 * float(covariance.trace()), rel=1e-10)
    # commuting covariances: the sum of squared differences of standard deviations
    s1, s2 = torch.rand(2, dim, generator=rng, dtype=torch.float64) + 0.1
    q = torch.linalg.qr(a).Q
    got = FrechetDistance(_exact(mean, (q * s1**2) @ q.T)).to(_exact(mean, (q * s2**2) @ q.T)).value
    assert got == pytest.approx(float((s1 - s2).square().sum()), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(200, 150), (9, 150), (150, 9), (7, 9)])
def test_equals_the_matrix_root_of_scipy_also_without_full_rank(n, m):
    x, y = _features(n, 12, 1), _features(m, 12, 2)
    root = scipy.linalg.sqrtm(np.cov(y.numpy().T) @ np.cov(x.numpy().T))
    traces = np.cov(x.numpy().T).trace() + np.cov(y.numpy().T).trace()
    want = float(((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * root.real.trace())
    result = frechet_distance(x, y)
    assert result.value == pytest.approx(want, rel=1e-6)
    assert result.value == pytest.approx(frechet_distance(y, x).value, rel=1e-9)
    assert (result.num_samples, result.num_reference, result.dim) == (n, m, 12)


def test_merged_shards_equal_the_whole():
    x = _features(50, 5, 3) + 1e4  # far from zero: sums of squares would lose digits
    whole, merged = FeatureMoments(5).update(x), FeatureMoments(5)
    for part in (x[:7], x[7:8], x[8:8], x[8:]):
        merged.merge(FeatureMoments(5).update(part).state())
    assert merged.num_samples == 50
    assert torch.allclose(merged.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(merged.covariance, torch.cov(x.T), rtol=1e-9)
    assert torch.allclose(whole.covariance, merged.covariance, rtol=1e-9)
    assert FrechetDistance(whole).to(merged).value == pytest.approx(0, abs=1e-8)


def test_says_n_and_warns_below_full_rank(caplog):
    with caplog.at_level(logging.WARNING):
        assert not frechet_distance(_features(40, 5, 1), _features(40, 5, 1)).rank_deficient
        assert not caplog.records
        assert frechet_distance(_features(5, 5, 1), _features(40, 5, 2)).rank_deficient
    assert "40 and 5 samples of 5-d features" in caplog.text


def test_refusals():
    bad = torch.ones(3, 4)
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="1 of 3 rows hold NaN or infinity, of samples 1$"):
        FeatureMoments(4).update(bad)
    with pytest.raises(ValueError, match=r"got \(3, 4\), needed \(n, 5\)"):
        FeatureMoments(5).update(torch.ones(3, 4))
    with pytest.raises(ValueError, match="2 samples or more, got 1"):
        FrechetDistance(FeatureMoments(4).update(torch.ones(1, 4)))
    with pytest.raises(ValueError, match="width 3 against a reference of width 4"):
        FrechetDistance(FeatureMoments(4).update(torch.rand(9, 4))).to(FeatureMoments(3).update(torch.rand(9, 3)))
