"""Shipped sizes have the published numbers of parameters; diffusers' classes say the same where they exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, WanTransformer3DModel

from ltd import config
from ltd.config import ConfigError
from ltd.denoisers import DitConfig, count_parameters
from ltd.training.denoiser import DenoiserRun

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "denoiser"
WAN_1_3B: dict[str, Any] = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}


def model(name: str) -> DitConfig:
    return config.load(DenoiserRun, FOLDER / f"{name}.yaml").model


@pytest.mark.parametrize(
    ("name", "settings"), [("wan_1.3b", WAN_1_3B), ("wan_14b", {}), ("wan_14b_i2v", I2V)], ids=lambda x: str(x)[:12]
)
def test_wan_has_as_many_parameters_as_in_diffusers(name: str, settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**settings)
    assert count_parameters(model(name)) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("name", "heads", "depth", "published"),
    [("dit_s_2", 6, 12, 33), ("dit_b_2", 12, 12, 130), ("dit_l_2", 16, 24, 458), ("dit_xl_2", 16, 28, 675)],
)
def test_dit_has_the_published_number_of_parameters(name: str, heads: int, depth: int, published: int) -> None:
    """Millions of Peebles and Xie (2022), Table 1; diffusers keeps an embedding of time and label in every block."""
    found = count_parameters(model(name))
    assert round(found / 1e6) == published
    width = model(name).width
    with torch.device("meta"):
        theirs = DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=width // heads, num_layers=depth, out_channels=8
        )
    embedding = sum(p.numel() for p in theirs.transformer_blocks[0].norm1.emb.parameters())
    assert found == sum(p.numel() for p in theirs.parameters()) - (depth - 1) * embedding


@pytest.mark.parametrize(
    ("name", "millions"), [("sit_xl_2", 675), ("lightning_dit_xl_1", 675), ("dit_dh_xl", 839), ("pixart_xl_2", 610)]
)
def test_others_are_within_a_percent_of_the_published_millions(name: str, millions: int) -> None:
    assert abs(count_parameters(model(name)) / 1e6 / millions - 1) < 0.01


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"dit_xxl.yaml: no such config file; .* holds .*dit_xl_2.yaml.*wan_14b.yaml"):
        config.load(DenoiserRun, FOLDER / "dit_xxl.yaml")
