"""What a run's network predicts, and on which path, is kept with it: loading, converting and resuming take the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train
from ltd import config as config_io
from ltd import denoisers, storage
from ltd.config import ConfigError
from ltd.denoisers import Conditioning, Dit, Parametrized
from ltd.diffusion import (
    EdmPredictionConfig,
    GvpPathConfig,
    ParametrizationConfig,
    SamplerConfig,
    as_denoiser,
    sample,
)
from ltd.training.denoiser import DenoiserRun
from tools import convert_checkpoint

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "debug" / "denoiser.yaml"
OBJECTIVE = ("objective.path.kind=gvp", "objective.prediction.kind=edm", "objective.prediction.sigma_data=0.8")
EXPECTED = ParametrizationConfig(path=GvpPathConfig(), prediction=EdmPredictionConfig(sigma_data=0.8))


def start(run_dir: Path, *overrides: str, steps: int = 2) -> int:
    small = ("toy_data.num_samples=4", "toy_data.num_heldout=2", "parallel.engine=torch", "evaluation.every=2")
    return train.main([str(CONFIG), f"run_dir={run_dir}", f"steps={steps}", *small, *overrides])


@pytest.fixture(scope="module")
def edm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("objective") / "run"
    assert start(run_dir, *OBJECTIVE, "objective.loss=edm", "optim.lr=0.01", "optim.warmup_steps=0") == 0
    return run_dir


def inputs() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(3, 4, 32, generator=generator)
    cond = Conditioning(text=text, text_mask=torch.ones(3, 4, dtype=torch.bool))
    return torch.randn(3, 8, 1, 4, 4, generator=generator), torch.tensor([0.01, 0.5, 1.0]), cond


def test_a_loaded_run_returns_the_velocity_that_its_network_means(edm_run: Path) -> None:
    loaded = denoisers.load(edm_run)
    assert isinstance(loaded, Parametrized) and loaded.parametrization == EXPECTED and not loaded.training
    x_t, t, cond = inputs()
    network = loaded.network
    assert isinstance(network, Dit)
    with torch.no_grad():
        assert torch.equal(loaded(x_t, t, cond), as_denoiser(network, EXPECTED)(x_t, t, cond))
        assert not torch.allclose(loaded(x_t, t, cond), network(x_t, t, cond), atol=0.1)
        listed = loaded(list(x_t), t, cond)
    assert torch.allclose(torch.stack(listed), loaded(x_t, t, cond), atol=1e-5)


def test_converted_and_saved_folders_keep_prediction_and_path(edm_run: Path, tmp_path: Path) -> None:
    loaded = denoisers.load(edm_run)
    assert convert_checkpoint.main([str(edm_run), str(tmp_path / "converted"), "--to", "safetensors"]) == 0
    denoisers.save(loaded, tmp_path / "saved")
    x_t, _, cond = inputs()
    cond = cond.select(slice(0, 1))
    expected = sample(loaded, x_t[:1], cond, SamplerConfig(steps=3))
    for name in ("converted", "saved"):
        again = denoisers.load(tmp_path / name)
        assert isinstance(again, Parametrized) and again.parametrization == EXPECTED
        assert torch.allclose(sample(again, x_t[:1], cond, SamplerConfig(steps=3)), expected, rtol=0, atol=1e-5)


def test_a_run_from_before_the_choice_loads_as_velocity_on_the_linear_path(edm_run: Path, tmp_path: Path) -> None:
    denoisers.save(denoisers.load(edm_run), tmp_path / "old")
    config = storage.read_export_config(tmp_path / "old")
    del config["objective"]
    config_io.save(config, tmp_path / "old" / "config.yaml")
    assert isinstance(denoisers.load(tmp_path / "old"), Dit)
    config["objective"] = {"path": {"kind": "spiral"}}
    config_io.save(config, tmp_path / "old" / "config.yaml")
    with pytest.raises(ConfigError, match="objective.path.kind: "):
        denoisers.load(tmp_path / "old")


def test_training_and_heldout_compare_what_the_network_predicts(tmp_path: Path) -> None:
    """The first network's output is 0, so its error in eps is that of the noise alone, 1, at every time."""
    chosen = ("objective.prediction.kind=eps", "objective.loss=eps", "optim.lr=1e-9")
    assert start(tmp_path / "run", *chosen, steps=1) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["loss/denoise"] == pytest.approx(1.0, abs=0.1)
    assert row["eval/denoise"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.prediction.sigma_data=0.9", "objective.prediction: is EdmPredictionConfig"),
        ("objective.path.kind=linear", "objective.path: is LinearPathConfig"),
    ],
)
def test_resuming_with_another_prediction_or_path_is_refused(
    edm_run: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (edm_run / "config.yaml").read_bytes()
    with pytest.raises(SystemExit) as ended:
        start(edm_run, *OBJECTIVE, "objective.prediction.min_time=0.0001", override, steps=3)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert (edm_run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.prediction=data", "objective.prediction.kind=eps"],
            "objective.prediction: got path linear and prediction eps for model.prediction data",
        ),
        (["model.prediction=data", "objective.path.kind=vp"], "objective.prediction: got path vp"),
        (["objective.loss=edm"], "objective.loss: got edm with prediction.kind velocity"),
        (
            ["stages=[{from_step: 2, set: {objective: {path: {kind: vp}}}}]"],
            "set.objective.path: is one for the whole run",
        ),
    ],
)
def test_choices_that_do_not_fit_are_refused_before_any_work(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_io.load(DenoiserRun, CONFIG, overrides)
