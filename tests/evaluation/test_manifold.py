import pytest
import torch

from ltd.evaluation import manifold
from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.manifold import ManifoldResult, manifold_metrics


def _features(n: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def _measure(samples: torch.Tensor, reference: torch.Tensor, neighbours: int) -> ManifoldResult:
    banks = (FeatureBank(x.shape[1]).update(x) for x in (samples, reference))
    return manifold_metrics(*banks, neighbours=neighbours)


def test_points_on_a_line():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # distances to the nearest other: 1, 1, 2, 7
    samples = torch.tensor([[0.5], [4.5], [20.0]])  # 4, 4, 15.5
    found = _measure(samples, real, 1)
    # 0.5 lies in the balls of 0 and 1; 4.5 in those of 3 and 10; 20 in none
    assert found.precision == pytest.approx(2 / 3)
    assert found.density == pytest.approx(4 / 3)
    assert found.coverage == 1
    # samples' balls reach from -3.5 to 4.5, 0.5 to 8.5 and 4.5 to 35.5: all of the real points
    assert found.recall == 1
    wider = _measure(samples, real, 2)  # distances to the second: real 3, 2, 3, 9; samples 19.5, 15.5, 19.5
    assert wider.density == pytest.approx((3 + 2 + 0) / (2 * 3))
    assert wider.precision == pytest.approx(2 / 3)
    assert (wider.num_samples, wider.num_reference, wider.neighbours) == (3, 4, 2)


def test_progress_is_told_at_each_block(monkeypatch):
    monkeypatch.setattr(manifold, "_VALUES_PER_BLOCK", 100)
    banks, moved = [FeatureBank(4).update(_features(n, 4, n)) for n in (20, 50)], []
    manifold_metrics(*banks, neighbours=3, moved=lambda: moved.append(1))
    # blocks of 100 distances: 20 x 20 and 50 x 50 for the radii, 50 x 20 and 20 x 50 between the sets
    assert len(moved) == 4 + 25 + 10 + 10


@pytest.mark.parametrize(("n", "m", "k"), [(60, 60, 3), (80, 50, 5), (30, 90, 1)])
def test_equals_prdc(n, m, k, capsys):
    prdc = pytest.importorskip("prdc")
    x, y = _features(n, 6, 0, 0.8, 0.6), _features(m, 6, 1)
    want = prdc.compute_prdc(y.numpy(), x.numpy(), k)
    found = _measure(x, y, k)
    for name, value in want.items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-9)
    assert len({round(v, 6) for v in want.values()}) == 4  # four different numbers
    swapped = _measure(y, x, k)
    assert (swapped.precision, swapped.recall) == pytest.approx((found.recall, found.precision))
    assert swapped.precision != found.precision


def test_blocks_change_nothing(monkeypatch):
    x, y = _features(70, 5, 0, 1.0, 0.5), _features(64, 5, 1)
    whole = _measure(x, y, 3)
    monkeypatch.setattr(manifold, "_VALUES_PER_BLOCK", 200)
    assert _measure(x, y, 3) == whole


def test_known_limits():
    y = _features(80, 4, 1)
    far = _measure(_features(80, 4, 0, shift=100.0), y, 3)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    copies = _measure(y.clone() + 1e6, y + 1e6, 3)  # far from zero: rounding must not part copies
    assert (copies.precision, copies.recall, copies.coverage) == (1, 1, 1)
    pairs = torch.tensor([[1.0], [1.0001], [-1.0], [-1.0001]], dtype=torch.float64)
    apart = _measure(torch.tensor([[1.0003], [-1.0003]], dtype=torch.float64), pairs, 1)
    assert (apart.precision, apart.coverage) == (0, 0)  # small distances are no rounding
    narrow = _measure(_features(80, 4, 0, scale=0.05), y, 3)  # one mode: precise, without recall
    assert narrow.precision == 1 and narrow.recall < 0.2 and narrow.coverage < 0.3 and narrow.density > 2
    twice = _features(83, 64, 1).repeat(2, 1)
    order = torch.randperm(166, generator=torch.Generator().manual_seed(0))
    doubled = _measure(twice[order], twice, 1)  # balls of radius zero hold their own two points, rounding or not
    assert (doubled.precision, doubled.recall, doubled.coverage, doubled.density) == (1, 1, 1, 2)


def test_refusals():
    x, y = _features(3, 4, 0), _features(9, 4, 1)
    with pytest.raises(ValueError, match="k = 3 neighbours: got 3 samples and 9 of the reference, needed 4 of each"):
        _measure(x, y, 3)
    with pytest.raises(ValueError, match="got 9 samples and 3 of the reference.*compare at equal n only"):
        _measure(y, x, 3)
    with pytest.raises(ValueError, match="width 4 against a reference of width 5"):
        _measure(y, _features(9, 5, 0), 3)
