"""Training on a part of the tokens: which stay, and that nothing of the others is learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ltd import config
from ltd.config import ConfigError
from ltd.denoisers import draw_kept
from ltd.diffusion import FlowMatching, FlowMatchingConfig
from ltd.nn.patch import patchify
from ltd.rng import DrawRandom
from ltd.training.denoiser import DenoiserRun
from tests.parallel.family_check import conditions, member

DEBUG = Path(__file__).resolve().parents[2] / "configs" / "debug" / "denoiser.yaml"


def test_kept_tokens_are_a_share_of_each_sample_and_their_cells_count() -> None:
    kept, weight = draw_kept((3, 4, 6), (1, 2, 2), 0.75, DrawRandom(0, [5, 9, 7]))
    assert kept.shape == (3, 4) and (kept.diff(dim=1) > 0).all()  # 18 tokens
    assert not torch.equal(kept[0], kept[1])
    tokens = patchify(weight[:, None], (1, 2, 2))
    for row in range(3):
        assert (tokens[row, kept[row]] == 1).all() and tokens[row].sum() == 4 * 4
    alone, _ = draw_kept((3, 4, 6), (1, 2, 2), 0.75, DrawRandom(0, [9]))
    assert torch.equal(alone[0], kept[1])  # the sample's own, whatever is beside it
    everything, weight = draw_kept((1, 2, 2), (1, 2, 2), 0.99, DrawRandom(0, [1]))
    assert everything.tolist() == [[0]] and weight.min() == 1  # one token always stays


def test_targets_of_dropped_tokens_change_no_loss() -> None:
    model, objective = member("dropped tokens"), FlowMatching(FlowMatchingConfig())
    random = DrawRandom(3, [1, 2])
    x0 = torch.randn(2, 3, 3, 2, 6, dtype=torch.float64)
    kept, weight = draw_kept((3, 2, 6), (1, 2, 2), 0.5, random)
    cond = dataclasses.replace(conditions("dropped tokens", 2, (3, 2, 6), torch.float64), kept=kept)

    def loss(truth: torch.Tensor) -> torch.Tensor:
        def denoiser(x_t, t, c):  # type: ignore[no-untyped-def]
            return model(x_t, t, c) + (truth - x0)  # a change of the target is one of the prediction, negated

        return objective.loss(denoiser, x0, cond, random, cell_weight=weight)[0]

    expected = loss(x0)
    dropped = (weight == 0)[:, None].expand_as(x0)
    assert torch.equal(loss(torch.where(dropped, x0 + 7, x0)), expected)
    assert (loss(torch.where(dropped, x0, x0 + 7)) - expected).abs().min() > 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["token_dropping=0.5"], "token_dropping: needs model.mixer_depth"),
        (["token_dropping=1.0"], r"token_dropping: must lie in \[0, 1\)"),
    ],
)
def test_bad_settings_name_the_field(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(DenoiserRun, DEBUG, overrides)


def test_packs_drop_no_tokens() -> None:
    with pytest.raises(ConfigError, match="token_dropping: packs cannot"):
        packed = DEBUG.with_stem("denoiser_packed")
        config.load(DenoiserRun, packed, ["token_dropping=0.5", "model.mixer_depth=1"])
