"""Whether the parts of a denoiser run fit together, and a checkpoint its autoencoder and objective."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ltd.config import ConfigError
from ltd.denoisers import DitConfig
from ltd.diffusion import ParametrizationConfig, read_parametrization

if TYPE_CHECKING:
    from ltd.training.denoiser import DenoiserRun


def check_conditions(run: DenoiserRun) -> None:
    """Refuse conditions that the model, the text encoders and the rates of dropping do not agree on.

    Args:
        run: The run.

    Raises:
        ConfigError: Names the field.
    """
    _check_rates(run)
    if run.text is None and run.model.text_dim is not None:
        raise ConfigError("text: got null for model.text_dim; give a text encoder, or set model.text_dim to null")
    if run.text == ():
        raise ConfigError("text: got no encoder, needed one or more, or null")
    found = run.text if isinstance(run.text, tuple) else (() if run.text is None else (run.text,))
    encoders = max(1, len(found))
    if run.model.text_parts and len(run.model.text_parts) != encoders:
        raise ConfigError(
            f"model.text_parts: got {len(run.model.text_parts)}, needed one for each encoder of text ({encoders})"
        )
    longest = max((encoder.max_length for encoder in found), default=0)
    if run.model.text_length is not None and run.model.text_length < longest:
        raise ConfigError(
            f"model.text_length: got {run.model.text_length}, but the text encoder gives {longest} tokens "
            f"(text.max_length); needed {longest} or more, or a smaller text.max_length"
        )
    if run.text_dropout and (encoders < 2 or len(run.text_dropout) != encoders):
        raise ConfigError(
            f"text_dropout: got {len(run.text_dropout)} rates for {encoders} text encoders; needed one for each, "
            "of several"
        )


def check_trainable(model: DitConfig) -> None:
    """Refuse a model of which training would leave a part as it is.

    Args:
        model: The run's.

    Raises:
        ConfigError: If it reads an image encoder's tokens: no run makes any.
    """
    if model.image_dim is not None:
        raise ConfigError(
            f"model.image_dim: got {model.image_dim}, but there is no image encoder in training, and the keys and "
            "values of its tokens would not be trained; set it to null: known frames (frame_tasks) condition on images"
        )


def _check_rates(run: DenoiserRun) -> None:
    """Refuse rates outside [0, 1], and those of conditions that the model does not have."""
    if any(not 0 <= rate <= 1 for rate in run.text_dropout):
        raise ConfigError(f"text_dropout: must lie in [0, 1], got {run.text_dropout}")
    defaults = {field.name: field.default for field in dataclasses.fields(run)}
    needs = {
        "caption_dropout": ("text", run.text is not None),
        "label_dropout": ("model.num_classes", run.model.num_classes is not None),
        "scalar_dropout": ("model.scalars", bool(run.model.scalars)),
    }
    for name, (condition, given) in needs.items():
        rate = getattr(run, name)
        if not 0 <= rate <= 1:
            raise ConfigError(f"{name}: must lie in [0, 1], got {rate}")
        if not given and rate not in (0, defaults[name]):
            raise ConfigError(f"{name}: got {rate} for a model without {condition}; needed that, or leave it out")


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
