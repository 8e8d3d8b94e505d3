import itertools

import pytest
import torch

from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.kernel import kernel_distance, squared_mmd


def _features(n: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_is_the_u_statistic_of_its_definition():
    x, y = _features(4, 3, 0), _features(5, 3, 1, 0.5)

    def k(a, b):
        return float((a @ b / 3 + 1) ** 3)

    within_x = [k(a, b) for a, b in itertools.permutations(x, 2)]
    within_y = [k(a, b) for a, b in itertools.permutations(y, 2)]
    between = [k(a, b) for a in x for b in y]
    want = sum(within_x) / 12 + sum(within_y) / 20 - 2 * sum(between) / 20
    assert squared_mmd(x, y) == pytest.approx(want, rel=1e-12)
    biased = (sum(within_x) + sum(k(a, a) for a in x)) / 16 + (sum(within_y) + sum(k(a, a) for a in y)) / 25
    assert abs(biased - 2 * sum(between) / 20 - want) > 0.1


@pytest.mark.parametrize(("n", "dim"), [(50, 8), (200, 64)])
def test_equals_torchmetrics_on_the_same_subset(n, dim):
    poly_mmd = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    x, y = _features(n, dim, 0), _features(n, dim, 1, 0.2)
    found = kernel_distance(FeatureBank(dim).update(x), FeatureBank(dim).update(y), subset_size=n, num_subsets=2)
    assert found.value == pytest.approx(float(poly_mmd(y, x)), abs=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9)  # both subsets are everything


def test_has_no_bias_however_few_the_samples():
    values = [squared_mmd(_features(5, 4, 2 * i), _features(5, 4, 2 * i + 1)) for i in range(4000)]
    found = torch.tensor(values)
    assert abs(float(found.mean())) < 4 * float(found.std()) / 4000**0.5
    assert (found < 0).float().mean() > 0.3


def test_mean_and_deviation_over_subsets():
    x, y = FeatureBank(6).update(_features(60, 6, 0)), FeatureBank(6).update(_features(50, 6, 1, 0.3))
    whole = squared_mmd(x.features, y.features)
    found = kernel_distance(x, y, subset_size=20, num_subsets=400)
    assert found.value == pytest.approx(whole, abs=4 * found.std / 20)
    assert (found.num_samples, found.num_reference, found.subset_size, found.num_subsets) == (60, 50, 20, 400)
    single = [kernel_distance(x, y, subset_size=20, num_subsets=k).value * k for k in (1, 2)]
    a, b = single[0], single[1] - single[0]
    pair = kernel_distance(x, y, subset_size=20, num_subsets=2)
    assert a != b and pair.std == pytest.approx(abs(a - b) / 2, rel=1e-9)  # of the population, not the sample
    assert kernel_distance(x, y, subset_size=20, num_subsets=2, seed=1).value != pair.value


def test_keys_make_subsets_independent_of_the_order_of_arrival():
    x, y = _features(30, 4, 0), FeatureBank(4).update(_features(30, 4, 1))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    there, here = FeatureBank(4).update(x, range(30)), FeatureBank(4)
    for part in order.split(7):
        here.merge(FeatureBank(4).update(x[part], part.tolist()).state())
    assert kernel_distance(here, y, subset_size=10) == kernel_distance(there, y, subset_size=10)


def test_progress_is_told_after_each_subset():
    banks, moved = [FeatureBank(4).update(_features(30, 4, seed)) for seed in (0, 1)], []
    found = kernel_distance(*banks, subset_size=10, num_subsets=7, moved=lambda: moved.append(1))
    assert len(moved) == 7 and found == kernel_distance(*banks, subset_size=10, num_subsets=7)


def test_refusals():
    x, y = FeatureBank(4).update(_features(9, 4, 0)), FeatureBank(4).update(_features(30, 4, 1))
    with pytest.raises(ValueError, match="KID: got 9 samples and 30 of the reference, needed 10 of each; .*unbiased"):
        kernel_distance(x, y, subset_size=10)
    with pytest.raises(ValueError, match="got 30 samples and 9 of the reference"):
        kernel_distance(y, x, subset_size=10)
    with pytest.raises(ValueError, match="subsets of 2 or more and 1 subset or more, got 1 and 5"):
        kernel_distance(x, y, subset_size=1, num_subsets=5)
    with pytest.raises(ValueError, match="width 4 against a reference of width 3"):
        squared_mmd(x.features, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="2 samples of each set or more, got 1 and 9"):
        squared_mmd(x.features[:1], x.features)
