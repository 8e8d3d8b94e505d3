import pytest
import torch

from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.distribution import DISTRIBUTION_METRICS, distribution_values
from ltd.evaluation.frechet import frechet_distance
from ltd.evaluation.kernel import kernel_distance
from ltd.evaluation.manifold import manifold_metrics
from ltd.evaluation.scores import inception_score


def _bank(n: int, dim: int = 5, seed: int = 0, shift: float = 0.0) -> FeatureBank:
    return FeatureBank(dim).update(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift)


def test_each_name_gives_the_published_settings():
    x, y = _bank(60, shift=0.3), _bank(60, seed=1)
    frechet = frechet_distance(x.features, y.features).value
    for name in ("fid", "sfid", "fvd"):
        assert distribution_values(name, x, y) == {name: pytest.approx(frechet, rel=1e-9)}
    kernel = kernel_distance(x, y, subset_size=30, num_subsets=100)
    assert distribution_values("kid", x, y) == {"kid": kernel.value, "kid_std": kernel.std}
    three, five = (manifold_metrics(x, y, neighbours=k) for k in (3, 5))
    assert distribution_values("precision_recall", x, y) == {"precision": three.precision, "recall": three.recall}
    assert distribution_values("density_coverage", x, y) == {"density": five.density, "coverage": five.coverage}
    score = inception_score(x, num_splits=1)
    assert distribution_values("inception_score", x, y)["inception_score"] == score.value
    assert {name: metric.output for name, metric in DISTRIBUTION_METRICS.items() if metric.output != "features"} == {
        "sfid": "spatial",
        "inception_score": "logits",
    }


def test_settings_of_full_size_and_what_is_said_below_it():
    say = {name: (m.how(50_000), m.caution(50_000, 2048)) for name, m in DISTRIBUTION_METRICS.items()}
    assert say["kid"] == ("100 subsets of 1000", "") and say["inception_score"] == ("10 splits", "")
    assert say["fid"] == ("", "") and say["precision_recall"][0] == "k = 3" and say["density_coverage"][0] == "k = 5"
    few = {name: (m.how(64), m.caution(64, 2048)) for name, m in DISTRIBUTION_METRICS.items()}
    assert few["kid"] == ("100 subsets of 32", "64 samples: unbiased, but of wide spread (kid_std)")
    assert few["inception_score"] == ("1 splits", "64 samples in one split: biased downwards")
    assert few["fid"][1] == "64 samples of 2048 dimensions: biased upwards, compare at equal n only"


@pytest.mark.parametrize(
    ("name", "n", "least", "bias"),
    [
        ("fid", 1, 2, "biased upwards"),
        ("kid", 3, 4, "wide spread"),
        ("inception_score", 1, 2, "biased downwards"),
        ("precision_recall", 3, 4, "depends on n"),
        ("density_coverage", 5, 6, "depends on n"),
    ],
)
def test_too_few_samples_are_told_with_the_bias_to_expect(name, n, least, bias):
    with pytest.raises(ValueError, match=f"{name}: got {n} samples, needed {least} or more; .*{bias}"):
        distribution_values(name, _bank(n), _bank(n, seed=1))
    assert tuple(distribution_values(name, _bank(least), _bank(least, seed=1))) == DISTRIBUTION_METRICS[name].figures


def test_other_refusals():
    with pytest.raises(ValueError, match="fid: 9 samples against 8 of the reference: it compares at equal n only"):
        distribution_values("fid", _bank(9), _bank(8))
    with pytest.raises(ValueError, match="kid: features of width 5 against a reference of width 6"):
        distribution_values("kid", _bank(9), _bank(9, dim=6))
    with pytest.raises(ValueError, match="metric 'fdd' is unknown, needed one of fid, sfid, fvd"):
        distribution_values("fdd", _bank(9), _bank(9))


def test_bias_of_few_samples_has_the_stated_sign():
    def mean(name: str, key: str, n: int) -> float:
        values = [distribution_values(name, _bank(n, 5, 2 * i), _bank(n, 5, 2 * i + 1))[key] for i in range(20)]
        return sum(values) / len(values)

    assert mean("fid", "fid", 10) > 5 * mean("fid", "fid", 200)
    assert mean("inception_score", "inception_score", 5) < mean("inception_score", "inception_score", 200) - 0.05
