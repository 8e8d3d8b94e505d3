"""Whether a checkpoint is of the autoencoder and the objective that a denoiser run has now."""

from __future__ import annotations

from typing import Any

from ltd.config import ConfigError
from ltd.diffusion import ParametrizationConfig, read_parametrization


def check_lineage(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a checkpoint that was trained on the latents of another autoencoder.

    Args:
        before: Lineage that the checkpoint has.
        now: Lineage of the run.

    Raises:
        ConfigError: Names what differs.
    """
    for name, value in now.items():
        if name == "classes" and before.get(name, value) != value:
            raise ConfigError(
                "data.classes: the names of the classes, or their order, are other than those of the checkpoint; "
                "give that list, or start in another run_dir"
            )
        if name in before and before[name] != value:
            raise ConfigError(
                f"autoencoder: {name} is {value} now, but the checkpoint was trained with {before[name]}; "
                "point autoencoder at the one it was trained with, or start in another run_dir"
            )


def check_objective(manifest: dict[str, Any], now: ParametrizationConfig) -> None:
    """Refuse a checkpoint whose network predicts something else, or on another path.

    Args:
        manifest: The checkpoint's; empty for a new run.
        now: What the run's network predicts.

    Raises:
        ConfigError: Names what differs.
    """
    before = read_parametrization(manifest.get("config", {}).get("objective", {}))
    for name in ("path", "prediction") if manifest else ():
        if getattr(before, name) != getattr(now, name):
            raise ConfigError(
                f"objective.{name}: is {getattr(now, name)} now, but the checkpoint was trained with "
                f"{getattr(before, name)}; set it to that, or start anew in another run_dir"
            )
