"""Every shipped configuration loads, and says in its header what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltd import config
from ltd.autoencoders import build_autoencoder
from ltd.inference.cache import CacheConfig
from ltd.training.autoencoder import AutoencoderRun
from ltd.training.denoiser import DenoiserRun

ROOT = Path(__file__).resolve().parents[1]
RUNS = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if "kind: " in path.read_text() and path.stem != "latents"
)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_run_config_loads_and_names_its_command(path: Path) -> None:
    run = config.load(AutoencoderRun | DenoiserRun, path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert all(word in text for word in ("Source:", "Cost:", "Expect:", "Command:")), path
    assert str(path.relative_to(ROOT)) in text
    assert config.from_dict(type(run), config.to_dict(run)) == run


def test_cache_config_loads() -> None:
    config.load(CacheConfig, ROOT / "configs" / "quickstart" / "latents.yaml")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optm.lr=1", "did you mean 'optim.lr'?"),
        ("data.shard=x", "did you mean 'data.shards'?"),
        ("data.globalbatch=4", "did you mean 'data.global_batch'?"),
        ("checkpoint.evry=3", "did you mean 'checkpoint.every'?"),
        ("parallel.zeroo=1", "did you mean 'parallel.zero'?"),
        ("step=3", "did you mean 'steps'?"),
    ],
)
@pytest.mark.parametrize("name", ["autoencoder", "denoiser"])
def test_typo_in_a_real_schema_gets_the_right_hint(name: str, override: str, hint: str) -> None:
    with pytest.raises(config.ConfigError) as error:
        config.load(AutoencoderRun | DenoiserRun, ROOT / "configs" / "debug" / f"{name}.yaml", [override])
    assert hint in str(error.value)
    assert str(error.value).startswith(override.split("=")[0])


@pytest.mark.parametrize(
    ("name", "compression"),
    [
        ("causal_4x8x8", (4, 8, 8)),
        ("high_compression_8x16x16", (8, 16, 16)),
        ("wavelet_4x8x8", (4, 8, 8)),
        ("inflated_sd", (4, 8, 8)),
    ],
)
def test_autoencoder_designs_build_at_their_compression(name: str, compression: tuple[int, int, int]) -> None:
    run = config.load(AutoencoderRun, ROOT / "configs" / "autoencoder" / f"{name}.yaml")
    with torch.device("meta"):
        model = build_autoencoder(run.model)
    assert (model.compression.t, model.compression.h, model.compression.w) == compression
    assert run.adversarial is not None
    assert run.adversarial.discriminator.least_size <= 256
