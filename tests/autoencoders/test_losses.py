"""The loss against closed forms, per sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ltd.autoencoders import AutoencoderLoss, AutoencoderLossConfig, Posterior, QuantizedPosterior
from ltd.autoencoders.wavelet import high_frequency_loss
from ltd.config import ConfigError

VIDEO = torch.rand(3, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
# One constant error per sample: the terms are known.
ERRORS = torch.tensor([0.0, 0.25, -0.5])
POSTERIOR = Posterior(torch.full((3, 4, 2, 2, 2), 2.0), torch.zeros(3, 4, 2, 2, 2))
KL_PER_VALUE = 0.5 * 4.0 * 32 / (3 * 5 * 8 * 8)


def _reconstruction() -> Tensor:
    return VIDEO + ERRORS.reshape(3, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("l1", ERRORS.abs()), ("l2", ERRORS**2), ("charbonnier", torch.sqrt(ERRORS**2 + 0.1**2))],
)
def test_terms_per_sample(kind: str, expected: Tensor) -> None:
    config = AutoencoderLossConfig(reconstruction=kind, epsilon=0.1, kl_weight=0.5)  # type: ignore[arg-type]
    values = AutoencoderLoss(config, None)(_reconstruction(), VIDEO, POSTERIOR)
    torch.testing.assert_close(values[kind], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(values["kl"], torch.full((3,), KL_PER_VALUE))
    torch.testing.assert_close(values["total"], expected + 0.5 * KL_PER_VALUE, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(values["pixels"], values[kind])
    assert set(values) == {kind, "kl", "pixels", "total"}


def test_perceptual_term_is_called_with_both_videos_and_weighted() -> None:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return (x - 2 * y).flatten(1).mean(1)

    config = AutoencoderLossConfig(kl_weight=0.0, perceptual_weight=0.1)
    values = AutoencoderLoss(config, distance)(_reconstruction(), VIDEO, POSTERIOR)
    torch.testing.assert_close(values["perceptual"], distance(_reconstruction(), VIDEO))
    torch.testing.assert_close(values["total"], ERRORS.abs() + 0.1 * values["perceptual"], atol=1e-6, rtol=1e-5)


def test_high_frequency_and_commitment_terms_are_weighted() -> None:
    video = torch.rand(2, 3, 1, 8, 8)
    moved = video.clone()
    moved[:, :, :, ::2, ::2] += 0.4
    moved[:, :, :, 1::2, 1::2] -= 0.4
    codes = QuantizedPosterior(
        torch.zeros(2, 2, 1, 2, 2), torch.zeros(2, 2, 1, 2, 2), torch.zeros(2, 1, 2, 2).long(), torch.tensor([1.0, 3.0])
    )
    config = AutoencoderLossConfig(high_frequency_weight=0.5, commitment_weight=2.0)
    values = AutoencoderLoss(config, None)(moved, video, codes)
    torch.testing.assert_close(values["high_frequency"], high_frequency_loss(moved, video, levels=1, kind="l1"))
    assert values["high_frequency"].min() > 0.1
    torch.testing.assert_close(values["pixels"], values["l1"] + 0.5 * values["high_frequency"])
    torch.testing.assert_close(values["total"], values["pixels"] + torch.tensor([2.0, 6.0]))
    assert "kl" not in values and torch.equal(codes.sample(torch.ones_like(codes.mean)), codes.mean)


def test_zero_perceptual_weight_never_calls_the_network() -> None:
    def fail(x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("called")

    assert "perceptual" not in AutoencoderLoss(AutoencoderLossConfig(), fail)(_reconstruction(), VIDEO, POSTERIOR)


def test_values_are_fp32_for_half_precision_input() -> None:
    values = AutoencoderLoss(AutoencoderLossConfig(), None)(_reconstruction().bfloat16(), VIDEO, POSTERIOR)
    assert all(value.dtype == torch.float32 for value in values.values())


def test_wrong_settings_name_their_field() -> None:
    with pytest.raises(ConfigError, match="perceptual_weight: .* no perceptual network"):
        AutoencoderLoss(AutoencoderLossConfig(perceptual_weight=1.0), None)
    with pytest.raises(ConfigError, match="kl_weight: .* 0 or more"):
        AutoencoderLossConfig(kl_weight=-1.0)
    with pytest.raises(ConfigError, match="epsilon: .* more than 0"):
        AutoencoderLossConfig(epsilon=0.0)
