"""Adversarial losses against closed forms; the balance against its definition, on one process and on two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ltd.autoencoders.adversarial import (
    EPSILON,
    adaptive_weight,
    balance,
    generator_loss,
    gradient_at,
    gradient_penalty,
    hinge_discriminator_loss,
)
from ltd.autoencoders.discriminators import DiscriminatorConfig, build_discriminator


def _video(batch: int = 4, size: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class _Pair(nn.Module):
    """A decoder of one weight and a small discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        config = DiscriminatorConfig(channels=4, num_layers=2, num_groups=2)
        self.discriminator = build_discriminator(config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.discriminator.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reconstruction = self.scale * video
        pixel = (reconstruction - video).abs().flatten(1).mean(1)
        return reconstruction, pixel, generator_loss(self.discriminator(reconstruction))


def test_hinge_by_hand() -> None:
    real = torch.tensor([[2.0, 0.0], [-1.0, 1.0]]).reshape(2, 1, 1, 1, 2)
    fake = torch.tensor([[-3.0, 0.5], [1.0, -1.0]]).reshape(2, 1, 1, 1, 2)
    # Sample 0: real (0 + 1) / 2, fake (0 + 1.5) / 2. Sample 1: real (2 + 0) / 2, fake (2 + 0) / 2.
    torch.testing.assert_close(hinge_discriminator_loss(real, fake), torch.tensor([0.625, 1.0]))
    torch.testing.assert_close(generator_loss(fake), torch.tensor([1.25, 0.0]))
    torch.testing.assert_close(hinge_discriminator_loss(real * 0, fake * 0), torch.ones(2))
    separated = hinge_discriminator_loss(torch.full((2, 3), 1.0), torch.full((2, 3), -1.0))
    assert separated.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="fake_logits: got 1 samples, needed 2"):
        hinge_discriminator_loss(real, fake[:1])


def test_hinge_pushes_logits_apart_and_the_generator_pulls_its_own_up() -> None:
    real, fake = torch.zeros(2, 5, requires_grad=True), torch.zeros(2, 5, requires_grad=True)
    hinge_discriminator_loss(real, fake).sum().backward()
    assert real.grad is not None and fake.grad is not None
    torch.testing.assert_close(real.grad, torch.full((2, 5), -0.1))
    torch.testing.assert_close(fake.grad, torch.full((2, 5), 0.1))
    fake.grad = None
    generator_loss(fake).sum().backward()
    torch.testing.assert_close(fake.grad, torch.full((2, 5), -0.2))


def test_losses_are_fp32_for_half_precision() -> None:
    logits = torch.randn(2, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert hinge_discriminator_loss(logits, logits).dtype == torch.float32
    assert generator_loss(logits).dtype == torch.float32
    assert gradient_penalty(logits, logits, std=0.1).dtype == torch.float32


def test_penalty_of_a_linear_discriminator_is_its_squared_slope() -> None:
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(24, generator=generator)
    video = torch.randn(1, 24, generator=generator).expand(20000, -1)
    noise = torch.randn(20000, 24, generator=generator)
    logits, moved = (video @ slope)[:, None], ((video + 0.05 * noise) @ slope)[:, None]
    penalty = gradient_penalty(logits, moved, std=0.05)
    assert penalty.mean().item() == pytest.approx(slope.square().sum().item(), rel=0.04)
    # The mean over patches is differentiated, not their sum.
    torch.testing.assert_close(gradient_penalty(logits.expand(-1, 3), moved.expand(-1, 3), std=0.05), penalty)
    with pytest.raises(ValueError, match="std: got 0.0, needed more than 0"):
        gradient_penalty(logits, moved, std=0.0)


def test_gradient_at_leaves_parameters_alone_and_keeps_the_graph() -> None:
    pair, fired = _Pair(), []
    for parameter in pair.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
        parameter.register_hook(fired.append)
    reconstruction, pixel, adversarial = pair(_video())
    gradient = gradient_at(pixel.sum(), reconstruction)
    weight = balance(pixel, adversarial, reconstruction)
    assert all(parameter.grad is None for parameter in pair.parameters()) and not fired
    torch.testing.assert_close(gradient, torch.sign(reconstruction - _video()).detach() / (3 * 12 * 12))
    assert not gradient.requires_grad and not weight.requires_grad
    (pixel + weight * adversarial).mean().backward()  # the graph is still there
    assert pair.scale.grad is not None and fired


def test_gradient_at_refuses_a_tensor_off_the_graph() -> None:
    pair = _Pair()
    reconstruction, pixel, _ = pair(_video())
    for loss, tensor in (
        (pixel.sum(), _video().requires_grad_()),
        (pixel.detach().sum(), reconstruction),
        (pixel.sum(), reconstruction.detach()),
    ):
        with pytest.raises(ValueError, match="does not depend on the tensor of shape"):
            gradient_at(loss, tensor)


def test_adaptive_weight() -> None:
    one = torch.tensor(1.0)
    assert adaptive_weight(one * 3, one * 2).item() == pytest.approx(3 / (2 + 1e-4))
    assert adaptive_weight(one, one * 0).item() == pytest.approx(1e4)
    assert adaptive_weight(one, one * 0, limit=7.0).item() == 7.0
    assert not adaptive_weight(one.clone().requires_grad_(), one).requires_grad


def test_balance_is_the_ratio_of_the_gradients_norms() -> None:
    reconstruction, pixel, adversarial = _Pair()(_video())
    ours = balance(pixel, adversarial, reconstruction)
    reference, other = (gradient_at(loss.sum(), reconstruction).norm() for loss in (pixel, adversarial))
    assert ours.dtype == torch.float32 and ours.shape == ()
    torch.testing.assert_close(ours, reference / other, rtol=1e-3, atol=0)
    other_rms = other * (3 * 12 * 12) ** 0.5 / 4**0.5
    torch.testing.assert_close(ours, 1 / (other_rms + EPSILON), rtol=1e-5, atol=0)  # the l1 term counts as 1


def test_balanced_loss_ignores_the_scale_of_the_other() -> None:
    reconstruction, pixel, adversarial = _Pair()(_video())
    weighted = [balance(pixel, factor * adversarial, reconstruction) * factor for factor in (0.1, 1.0, 10.0)]
    for value in weighted:
        torch.testing.assert_close(value, weighted[1], rtol=1e-2, atol=0)
    torch.testing.assert_close(weighted[2], weighted[1], rtol=2e-3, atol=0)
    torch.testing.assert_close(
        balance(10 * pixel, adversarial, reconstruction), 10 * weighted[1], rtol=1e-5, atol=0
    )  # while the reference's own scale counts


@pytest.mark.parametrize("at_boundary", [1, 2, 3])
def test_two_processes_have_the_weight_of_the_joint_batch(at_boundary: int) -> None:
    pair, video = _Pair(), _video()
    video[1] *= 0.1  # processes differ
    reconstruction, pixel, adversarial = pair(video)
    joint = balance(pixel, adversarial, reconstruction)
    parts, alone, sent = (video[:at_boundary], video[at_boundary:]), [], []

    def keep(x: Tensor) -> Tensor:
        sent.append(x)
        return x

    for part in parts:
        reconstruction, pixel, adversarial = pair(part)
        alone.append(balance(pixel, adversarial, reconstruction, reduce_mean=keep))
    assert len(sent) == 2  # one collective each
    for part in parts:
        reconstruction, pixel, adversarial = pair(part)
        both = balance(pixel, adversarial, reconstruction, reduce_mean=lambda x: torch.stack(sent).mean(0))
        torch.testing.assert_close(both, joint, rtol=1e-5, atol=0)
    assert all(abs(value / joint - 1) > 1e-3 for value in alone)  # one process's own weight would differ


def test_balance_does_not_depend_on_the_resolution() -> None:
    weights = []
    for size in (8, 32):
        x = _video(2, size).requires_grad_()
        weights.append(balance((x - 3).abs().flatten(1).mean(1), (0.01 * x).flatten(1).mean(1), x))
    torch.testing.assert_close(weights[0], torch.tensor(1 / (0.01 + EPSILON)), rtol=1e-5, atol=0)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=0)


def test_balance_limit_and_wrong_losses() -> None:
    reconstruction, pixel, adversarial = _Pair()(_video())
    assert balance(pixel, 1e-9 * adversarial, reconstruction, limit=5.0).item() == 5.0
    with pytest.raises(ValueError, match=r"other_loss: got shape \(\), needed one number per sample, \(4,\)"):
        balance(pixel, adversarial.mean(), reconstruction)
    with pytest.raises(ValueError, match=r"reference_loss: got shape \(1,\)"):
        balance(pixel[:1], adversarial, reconstruction)


def test_a_gradient_passes_over_what_lies_in_a_joint() -> None:
    at = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    inner = at.square()
    between = inner.view_as(inner)
    between.register_hook(lambda gradient: pytest.fail("an engine's hook fired"))
    outer = between.view_as(between)
    loss = outer.sin().sum()
    torch.testing.assert_close(gradient_at(loss, at, (inner, outer)), (2 * at * at.square().cos()).detach())
    with pytest.raises(ValueError, match="does not depend"):
        gradient_at(loss, torch.randn(2, 3, requires_grad=True), (inner, outer))
