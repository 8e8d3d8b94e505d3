"""A denoiser run that starts from the weights of another: which, whether they fit, and the record of what was done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltd import config as config_io
from ltd import storage
from ltd.config import ConfigError
from ltd.denoisers import (
    Dit,
    DitConfig,
    SurgeryConfig,
    SurgeryReport,
    Weights,
    build_denoiser,
    open_weights,
    transplant,
)
from ltd.denoisers.surgery import plan
from ltd.diffusion import ParametrizationConfig
from ltd.parallel.layout import Layout
from ltd.training.start import Start

logger = logging.getLogger(__name__)

REPORT = "init_from.json"


@dataclass(frozen=True, kw_only=True)
class InitFromConfig(SurgeryConfig):
    """Weights that a new run starts from, and what may differ between them and ``model``."""

    #: Run directory (its latest checkpoint), checkpoint or exported folder of a denoiser.
    path: str
    #: Which weights of a checkpoint: ``ema``, ``raw`` or the name of one average (``ema_0.9999``).
    weights: str = "ema"


@dataclass(frozen=True)
class Origin:
    """What a run starts from, opened and found to fit its model."""

    weights: Weights
    options: InitFromConfig
    #: What the lineage keeps of it: path, files, weights and fingerprint.
    record: dict[str, str]

    def check_lineage(self, now: Mapping[str, Any]) -> None:
        """Refuse weights that were trained on the latents of another autoencoder, unless that is accepted.

        Args:
            now: What the run's latents depend on (``LatentInputs.lineage``).

        Raises:
            ConfigError: Names what differs.
        """
        before = self.weights.lineage
        wrong = [name for name in now if name in before and before[name] != now[name]]
        if wrong and "autoencoder" not in self.options.accept:
            name = wrong[0]
            raise ConfigError(
                f"init_from: autoencoder: {name} is {now[name]}, {self.options.path} was trained with {before[name]}; "
                "its channels mean something else: list autoencoder in init_from.accept, or set autoencoder to that one"
            )

    def apply(self, model: Dit, run_dir: str, layout: Layout) -> SurgeryReport:
        """Give the model its first values; log and write what was done.

        Args:
            model: Newly built, whole on this process; the same on all.
            run_dir: Where ``init_from.json`` goes.
            layout: This process's position; the main one writes.

        Returns:
            What was done.
        """
        report = transplant(self.weights, model, self.options)
        for line in report.lines():
            logger.info("init_from: %s", line)
        if layout.is_main:
            storage.write_json(Path(run_dir) / REPORT, {**self.record, **report.to_plain()})
        return report


def find_origin(
    settings: InitFromConfig | None,
    model: DitConfig,
    objective: ParametrizationConfig,
    start: Start,
    layout: Layout,
) -> Origin | None:
    """Open the weights that a new run starts from, the same on all processes, and refuse those that do not fit.

    Args:
        settings: The run's ``init_from``.
        model: The run's model.
        objective: The run's path and prediction.
        start: Where the run starts; one that goes on brings its own weights.
        layout: Its processes.

    Returns:
        The weights; None where nothing is to be taken.

    Raises:
        ConfigError: Says what does not fit.
    """
    if settings is None:
        return None
    if start.checkpoint is not None:
        _check_other_weights(settings, start)
        logger.info("init_from counts for a new run only; this one goes on from a checkpoint")
        return None

    def examine() -> dict[str, str]:
        try:
            return _examine(settings, model, objective)
        except (ConfigError, storage.StorageError) as error:
            raise ConfigError(f"init_from: {error}") from None

    record = layout.decide(examine)  # a run that is still training has a latest checkpoint that changes
    return Origin(open_weights(record["files"], settings.weights), settings, record)


def _check_other_weights(settings: InitFromConfig, start: Start) -> None:
    """Refuse weights beside those of a checkpoint, unless they are what the run of the checkpoint began with."""
    if start.own:
        return
    if not start.forked:
        raise ConfigError(f"init_from: resume = {start.run.resume} brings weights too; set one of the two")
    before = start.manifest.get("config", {}).get("init_from")
    # Through the schema, so that fields that are younger than the checkpoint have their defaults.
    if before is None or config_io.from_dict(InitFromConfig, before) != settings:
        raise ConfigError(
            f"init_from: fork = {start.run.fork} brings weights too; leave init_from out (init_from=null), or as it "
            "was in the run that is forked"
        )


def _examine(settings: InitFromConfig, model: DitConfig, objective: ParametrizationConfig) -> dict[str, str]:
    weights = open_weights(settings.path, settings.weights)
    for name in ("path", "prediction"):
        before, now = getattr(weights.objective, name), getattr(objective, name)
        if before != now and f"objective.{name}" not in settings.accept:
            raise ConfigError(
                f"objective.{name}: got {now}, {settings.path} was trained with {before}; set it to that, or list "
                f"objective.{name} in init_from.accept"
            )
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in build_denoiser(model).state_dict().items()}
    plan(weights, model, shapes, settings)
    return {
        "path": settings.path,
        "files": str(weights.files),
        "weights": settings.weights,
        "fingerprint": weights.fingerprint,
    }
