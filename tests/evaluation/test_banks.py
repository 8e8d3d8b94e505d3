import pytest
import torch

from ltd.evaluation.banks import FeatureBank


def _features(n: int = 7, dim: int = 3) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0))


def test_shards_in_any_order_equal_the_whole():
    x = _features()
    whole = FeatureBank(3).update(x, range(7))
    merged = FeatureBank(3)
    for keys in ([5, 1], [], [6, 0, 3], [2, 4]):
        merged.merge(FeatureBank(3).update(x[keys], keys).state())
    assert merged.num_samples == 7
    assert torch.equal(merged.features, whole.features) and torch.equal(whole.features, x.double())
    assert torch.equal(merged.moments().covariance, whole.moments().covariance)
    assert torch.allclose(whole.moments().covariance, torch.cov(x.double().T))
    unordered = FeatureBank(3).update(x[:4]).update(x[4:])
    assert torch.equal(unordered.features, x.double())


def test_precision_of_the_features_is_kept():
    x = _features().double() + 1e-12
    assert torch.equal(FeatureBank(3).update(x).features, x)
    assert FeatureBank(3).update(x.bfloat16()).state()["features"].dtype == torch.float32
    empty = FeatureBank(3)
    empty.merge(FeatureBank(3).state())
    assert empty.features.shape == (0, 3)


def test_a_sample_counts_once():
    bank = FeatureBank(3).update(_features(2), [4, 9])
    with pytest.raises(ValueError, match="1 samples are counted twice, of keys 9: every sample counts once"):
        bank.merge(FeatureBank(3).update(_features(2), [9, 1]).state())
    with pytest.raises(ValueError, match="counted twice, of keys 1"):
        FeatureBank(3).update(_features(2), [1, 1])
    with pytest.raises(ValueError, match="features with keys do not mix with features without"):
        FeatureBank(3).update(_features(2), [4, 9]).update(_features(2))
    with pytest.raises(ValueError, match="3 keys for 2 samples"):
        FeatureBank(3).update(_features(2), [1, 2, 3])


def test_bad_features_are_named():
    x = _features()
    x[2, 1], x[5, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="2 of 7 rows hold NaN or infinity, of samples 2, 5$"):
        FeatureBank(3).update(x)
    with pytest.raises(ValueError, match="of samples 12, 15$"):
        FeatureBank(3).update(x, range(10, 17))
    with pytest.raises(ValueError, match="of samples 6, 9$"):  # four came before
        FeatureBank(3).update(_features(4)).update(x)
    with pytest.raises(ValueError, match=r"got \(7, 3\), needed \(n, 4\)"):
        FeatureBank(4).update(_features())
    with pytest.raises(ValueError, match="width 3 do not merge into width 4"):
        FeatureBank(4).merge(FeatureBank(3).update(_features()).state())
