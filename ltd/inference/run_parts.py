"""What a trained denoiser's run says of it: what it is told, sizes and time shift, for sampling and exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ltd import autoencoders, denoisers, storage
from ltd.config import ConfigError, from_dict, merge_stages
from ltd.diffusion import PathConfig, ShiftConfig, read_parametrization
from ltd.encoders.joined import TextConfig
from ltd.shapes import VideoShape


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a run's configuration says is needed to sample from it."""

    autoencoder: str
    text: TextConfig
    #: Along what the embeddings of several text encoders are joined.
    text_join: Literal["tokens", "channels"]
    #: Classes of the denoiser; None = it takes none.
    num_classes: int | None
    #: Names of the numbers of a sample that the denoiser is told (``DitConfig.scalars``).
    scalars: tuple[str, ...]
    #: (size in pixels, frames per second or None) of each training view; none for a run of buckets or packs.
    views: tuple[tuple[VideoShape, float | None], ...]
    #: How the run made batches: fixed, buckets or packed.
    batching: str
    #: Time shift that the denoiser was trained under; sampling wants the same.
    shift: ShiftConfig
    #: Path between data and noise that its velocities are of.
    path: PathConfig
    #: Hash and latent statistics of the autoencoder that it was trained with.
    lineage: dict[str, Any]


def read_run_parts(run_dir: str | Path) -> RunParts:
    """Read what sampling needs besides the denoiser; of a run with stages, as it was at the checkpoint's last step.

    Args:
        run_dir: Run directory of a denoiser (its latest checkpoint is taken), one checkpoint inside it, or the folder
            that ``tools/convert_checkpoint.py`` made of one.

    Returns:
        Autoencoder path, text encoder and views.

    Raises:
        ConfigError: If it is no denoiser's run, or it trained on an untrained autoencoder.
    """
    config, step, lineage = _read_description(run_dir)
    if config.get("kind") != "denoiser":
        raise ConfigError(f"{run_dir}: is a run of kind {config.get('kind')!r}, needed the run directory of a denoiser")
    if config["autoencoder"] is None:
        raise ConfigError(f"{run_dir}: its autoencoder is null; an untrained autoencoder cannot decode samples")
    config = trained_under(config, step)
    model, batching = config["model"], config["data"].get("batching", {}).get("kind", "fixed")
    views = config["data"]["views"] if batching == "fixed" else ()  # others leave data.views unread
    return RunParts(
        autoencoder=config["autoencoder"],
        text=None if config["text"] is None else from_dict(TextConfig, config["text"]),
        text_join="tokens" if model.get("text_parts") else "channels",
        num_classes=model.get("num_classes"),
        scalars=tuple(model.get("scalars") or ()),
        views=tuple((VideoShape(v["num_frames"], v["height"], v["width"]), v.get("fps")) for v in views),
        batching=batching,
        shift=from_dict(ShiftConfig, config["objective"]["shift"]),
        path=read_parametrization(config["objective"]).path,
        lineage=lineage,
    )


def trained_under(config: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    """Say what a run's last step was done under: a checkpoint at a boundary belongs to the stage before.

    Args:
        config: The run's configuration, with its stages.
        step: Optimizer steps done; None where nobody knows.

    Returns:
        The configuration with the fields of the stages that trained, and without stages.
    """
    return merge_stages(config, max(0, step - 1) if step is not None else 0)[0]


def _read_description(run_dir: str | Path) -> tuple[dict[str, Any], int | None, dict[str, Any]]:
    """Read a run's configuration, steps done and lineage out of a checkpoint, or out of a converted one."""
    if storage.is_export(run_dir):
        exported = storage.read_export_config(run_dir)
        if "run" not in exported:
            raise ConfigError(
                f"{run_dir}: does not say what its denoiser was trained with; needed the run directory, or a folder "
                "that tools/convert_checkpoint.py made of it"
            )
        return exported["run"], exported.get("source", {}).get("step"), exported["lineage"]
    manifest = storage.read_manifest(find_weights(run_dir))
    return manifest["config"], int(manifest["step"]), manifest.get("lineage", {})


def find_weights(run_dir: str | Path) -> Path:
    """Find what a name means now; what it gives means the same while the run goes on.

    Args:
        run_dir: Run directory, one checkpoint inside it, or a converted folder.

    Returns:
        The run's latest checkpoint, or the checkpoint or folder itself.

    Raises:
        ConfigError: If there is no whole checkpoint.
    """
    path = Path(run_dir)
    if storage.is_export(path) or storage.is_checkpoint(path):
        return path
    checkpoint = storage.latest_checkpoint(path)
    if checkpoint is None:
        raise ConfigError(f"{run_dir}: holds no whole checkpoint; needed the run directory of a denoiser")
    return checkpoint


def check_autoencoder(decoder: autoencoders.Autoencoder, parts: RunParts, given: str | None = None) -> None:
    """Refuse an autoencoder that a denoiser was not trained with.

    Args:
        decoder: The autoencoder.
        parts: What the denoiser's run says.
        given: Where the autoencoder is, if not where the run says.

    Raises:
        ConfigError: If the denoiser's latents are another autoencoder's.
    """
    found: dict[str, Any] = {
        "time": denoisers.TIME_CONVENTION,
        "autoencoder_hash": autoencoders.weights_hash(decoder),
        "latent_norm": decoder.latent_norm.to_plain(),
    }
    for name, value in parts.lineage.items():
        if name in found and found[name] != value:
            raise ConfigError(
                f"autoencoder: {name} of {given or parts.autoencoder} is {found[name]}, the denoiser was trained "
                f"with {value}; give the autoencoder it was trained with"
            )
