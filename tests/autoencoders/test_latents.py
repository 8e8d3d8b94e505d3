"""Posterior, LatentNorm and LatentStatistics against closed forms."""

from __future__ import annotations

import pytest
import torch

from ltd.autoencoders import LatentNorm, LatentStatistics, Posterior


def _posterior(batch: int = 3, seed: int = 0) -> Posterior:
    generator = torch.Generator().manual_seed(seed)
    offset = torch.tensor([100.0, -3.0, 0.0], dtype=torch.float64).reshape(1, 3, 1, 1, 1)
    mean = torch.randn(batch, 3, 2, 4, 4, generator=generator, dtype=torch.float64) * 2 + offset
    return Posterior(mean, torch.randn(mean.shape, generator=generator, dtype=torch.float64) - 1)


def test_kl_equals_torch_distributions() -> None:
    posterior = _posterior()
    normal = torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp())
    standard = torch.distributions.Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean))
    expected = torch.distributions.kl_divergence(normal, standard).sum((1, 2, 3, 4))
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-12, atol=0)
    assert Posterior(torch.zeros(2, 1, 1, 1, 1), torch.zeros(2, 1, 1, 1, 1)).kl().abs().max() == 0


def test_sample_has_the_posterior_moments() -> None:
    mean, logvar = torch.full((1, 1, 1, 100, 100), 3.0), torch.full((1, 1, 1, 100, 100), 2.0 * torch.tensor(0.5).log())
    drawn = Posterior(mean, logvar).sample(torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))
    assert drawn.mean() == pytest.approx(3.0, abs=0.02)
    assert drawn.std() == pytest.approx(0.5, rel=0.03)


def test_norm_is_the_identity_until_set_and_then_inverts() -> None:
    norm = LatentNorm(3).double()
    latents = _posterior().mean
    assert torch.equal(norm.normalize(latents), latents)
    assert torch.equal(norm.denormalize(latents), latents)
    norm.set(torch.tensor([100.0, -3.0, 0.0]), torch.tensor([2.0, 0.5, 4.0]))
    unit = norm.normalize(latents)
    torch.testing.assert_close(unit[:, 1], (latents[:, 1] + 3.0) / 0.5)
    torch.testing.assert_close(norm.denormalize(unit), latents, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(2), torch.ones(3), r"latent mean: got shape \(2,\), needed \(3,\)"),
        (torch.zeros(3), torch.zeros(3), "std > 0"),
        (torch.full((3,), float("nan")), torch.ones(3), "finite"),
    ],
)
def test_norm_refuses_impossible_statistics(mean: torch.Tensor, std: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentNorm(3).set(mean, std)


def test_statistics_equal_two_passes_in_any_split() -> None:
    parts = [_posterior(batch, seed) for seed, batch in enumerate((1, 3, 2))]
    mean = torch.cat([part.mean for part in parts]).movedim(1, 0).flatten(1)
    variance = torch.cat([part.logvar for part in parts]).exp().movedim(1, 0).flatten(1)
    expected = (mean.var(1, correction=0) + variance.mean(1)).sqrt()
    one = LatentStatistics()
    for part in parts:
        one.update(part)
    merged = LatentStatistics()
    for part in parts:
        other = LatentStatistics()
        other.update(part)
        merged.merge(other.state())
    merged.merge(LatentStatistics().state())
    for statistics in (one, merged):
        torch.testing.assert_close(statistics.mean, mean.mean(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(statistics.std, expected, rtol=1e-12, atol=0)


def test_statistics_survive_a_large_offset() -> None:
    latents = torch.randn(1, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics = LatentStatistics()
    for frame in (latents + 1e7).split(1, 2):
        statistics.update(Posterior(frame, torch.full_like(frame, -100.0)))
    torch.testing.assert_close(statistics.std, latents.flatten().std(correction=0).reshape(1), rtol=1e-7, atol=0)


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no latents were added"):
        _ = LatentStatistics().std


def test_normalised_samples_have_unit_scale() -> None:
    posterior = _posterior(batch=64)
    statistics = LatentStatistics()
    statistics.update(posterior)
    norm = LatentNorm(3).double()
    norm.set(statistics.mean, statistics.std)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    unit = norm.normalize(posterior.sample(noise)).movedim(1, 0).flatten(1)
    assert unit.mean(1).abs().max() < 0.05
    assert (unit.std(1) - 1).abs().max() < 0.05
