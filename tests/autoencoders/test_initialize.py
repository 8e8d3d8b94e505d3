"""The closed-form start against what theory says of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ltd.autoencoders import CausalVae, CausalVaeConfig, build_autoencoder, initialize_from_data
from ltd.nn.causal_conv import space_to_depth

CONFIG = CausalVaeConfig(
    latent_channels=5,
    front=(2, 2, 2),
    channels=(8,),
    factors=(),
    encoder_blocks=(1,),
    decoder_blocks=(1,),
    linear_path=True,
    linear_kernel=(1, 1, 1),
)


def _videos(count: int = 4) -> list[Tensor]:
    """Make smooth coloured noise: neighbouring pixels, frames and channels go together."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 5, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(9, 16, 16), mode="trilinear")
    smooth = (
        smooth
        + 0.1 * torch.randn(smooth.shape, generator=generator)
        + torch.tensor([0.3, 0.0, -0.2]).reshape(1, 3, 1, 1, 1)
    )
    return list((smooth / 3).split(2))


def _initialised(**changes: object) -> CausalVae:
    torch.manual_seed(0)
    model = build_autoencoder(dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]
    initialize_from_data(model, iter(_videos()))
    return model.requires_grad_(False)


def _error(model: CausalVae) -> float:
    videos = torch.cat(_videos())
    folded = [space_to_depth(x, (2, 2, 2)) for x in (model(videos, None)[0], videos)]
    return float((folded[0] - folded[1]).detach().square().sum(1).mean())


def test_error_is_the_energy_of_the_dropped_components() -> None:
    blocks = space_to_depth(torch.cat(_videos()), (2, 2, 2)).movedim(1, -1).reshape(-1, 24).double()
    eigenvalues = torch.linalg.eigvalsh(blocks.T.cov(correction=0)).flip(0)
    assert _error(_initialised()) == pytest.approx(float(eigenvalues[5:].sum()), rel=2e-3)


def test_latents_are_white() -> None:
    mean = _initialised().encode(torch.cat(_videos())).mean.movedim(1, 0).flatten(1).double()
    torch.testing.assert_close(mean.mean(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean.cov(correction=0), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-3)


def test_a_neighbourhood_decodes_better_than_a_cell() -> None:
    assert _error(_initialised(linear_kernel=(2, 3, 3))) < 0.9 * _error(_initialised())


def test_as_many_latents_as_values_lose_nothing() -> None:
    assert _error(_initialised(latent_channels=24)) < 1e-4


def test_same_videos_give_the_same_weights_whatever_the_model_seed() -> None:
    first = _initialised()
    torch.manual_seed(7)
    second = build_autoencoder(CONFIG)
    initialize_from_data(second, _videos())
    for name in (
        "linear_encoder.1.weight",
        "linear_encoder.1.bias",
        "linear_decoder.0.weight",
        "linear_decoder.0.bias",
    ):
        assert torch.equal(first.state_dict()[name], second.state_dict()[name])


def test_the_convolutional_path_starts_silent_and_then_learns() -> None:
    model = _initialised().requires_grad_(True)
    video = torch.cat(_videos())
    before = _error(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        (model(video, None)[0] - video).square().mean().backward()
        optimizer.step()
    assert _error(model) < 0.99 * before


def test_what_cannot_be_initialised_is_refused() -> None:
    with pytest.raises(ValueError, match="model.linear_path: true"):
        initialize_from_data(build_autoencoder(dataclasses.replace(CONFIG, linear_path=False)), _videos())
    with pytest.raises(ValueError, match="got 1 blocks of 24 values, needed at least 24"):
        initialize_from_data(build_autoencoder(CONFIG), [torch.zeros(1, 3, 1, 2, 2)])
