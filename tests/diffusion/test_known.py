"""Known cells end at the data on every path and with every solver; the others go their way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ltd.diffusion import (
    GuidanceConfig,
    GvpPathConfig,
    LinearPathConfig,
    SamplerConfig,
    VpPathConfig,
    guided,
    sample,
    with_known,
)

DATA = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
KNOWN = torch.zeros(2, 1, 4, 2, 2, dtype=torch.bool)
KNOWN[0, :, 0] = True
KNOWN[1, :, :, 1] = True


def denoiser(x_t: Tensor, t: Tensor, cond: None) -> Tensor:
    return torch.sin(x_t) + t.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("path", [LinearPathConfig(), GvpPathConfig()])
@pytest.mark.parametrize("kind", ["euler", "heun"])
def test_known_cells_end_at_the_data(path, kind) -> None:  # type: ignore[no-untyped-def]
    config = SamplerConfig(kind=kind, steps=400 if path.kind != "linear" else 5)
    out = sample(with_known(denoiser, DATA, KNOWN, path), NOISE, None, config)
    known = KNOWN.expand_as(out)
    assert torch.allclose(out[known], DATA[known], atol=1e-9 if path.kind == "linear" else 2e-2)
    alone = sample(denoiser, NOISE, None, config)
    assert torch.allclose(out[~known], alone[~known], atol=1e-12)  # this denoiser looks at no other cell


@pytest.mark.parametrize("kind", ["dpmpp_2m", "unipc"])
def test_multistep_solvers_end_there_too(kind: str) -> None:
    out = sample(with_known(denoiser, DATA, KNOWN), NOISE, None, SamplerConfig(kind=kind, steps=6))  # type: ignore
    known = KNOWN.expand_as(out)
    assert torch.allclose(out[known], DATA[known], atol=1e-6)


def test_the_velocity_is_the_true_one_and_finite_at_the_end() -> None:
    wrapped = with_known(denoiser, DATA, KNOWN, VpPathConfig())
    for time in (0.0, 0.3, 1.0):
        t = torch.full((2,), time, dtype=torch.float64)
        assert wrapped(NOISE, t, None).isfinite().all()
    t = torch.full((2,), 0.25, dtype=torch.float64)
    x_t = 0.75 * DATA + 0.25 * NOISE
    v = with_known(denoiser, DATA, KNOWN)(x_t, t, None)
    known = KNOWN.expand_as(v)
    assert torch.allclose(v[known], (NOISE - DATA)[known], atol=1e-12)
    assert torch.equal(v[~known], denoiser(x_t, t, None)[~known])


@pytest.mark.parametrize("batched", [True, False])
def test_what_the_model_says_of_known_cells_changes_nothing_not_even_through_guidance(batched: bool) -> None:
    """Rescaled guidance looks at all cells: with the denoiser wrapped inside, only at true ones."""

    def found(error: float) -> Tensor:
        def model(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            known = KNOWN.repeat(len(x_t) // 2, 1, 1, 1, 1)
            v = denoiser(x_t, t, None) + cond.view(-1, 1, 1, 1, 1)
            return torch.where(known, v + error * cond.view(-1, 1, 1, 1, 1), v)

        inner = with_known(model, DATA, KNOWN)
        config = GuidanceConfig(scale=3.0, rescale=0.7)
        stack = torch.cat if batched else None
        both = guided(inner, torch.zeros(2, dtype=torch.float64), config, stack=stack)
        cond = torch.ones(2, dtype=torch.float64)
        return sample(with_known(both, DATA, KNOWN), NOISE, cond, SamplerConfig(steps=4))

    assert torch.equal(found(0.0), found(50.0))
