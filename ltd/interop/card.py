"""The card of an exported model: what it is, where it is from, and what its inputs mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltd.denoisers import TIME_CONVENTION, DitConfig, count_parameters
from ltd.diffusion import ParametrizationConfig


def write_card(
    path: Path, name: str, config: DitConfig, meant: ParametrizationConfig, lineage: Mapping[str, Any]
) -> None:
    """Write the card.

    Args:
        path: File to make.
        name: Class or layout of the export.
        config: Of the network.
        meant: What the network predicts, and on which path.
        lineage: Where the weights are from: run, step, weights (raw or which average), data and its licences.
    """
    said = {
        "Architecture": f"{name}, {count_parameters(config):,} parameters",
        "Latents": f"{config.latent_channels} channels, patches of {config.patch} cells (t, h, w)",
        "Prediction": f"{meant.prediction.kind} on the {meant.path.kind} path",
        "Time": f"{TIME_CONVENTION} in ltd; converted to the convention of {name} in this folder",
        **{key: _words(value) for key, value in lineage.items()},
    }
    for key in ("Run", "Weights", "Data", "Data licences"):
        said.setdefault(key, "not recorded")
    rows = "".join(f"| {key} | {value} |\n" for key, value in said.items())
    path.write_text(
        f"---\nlibrary_name: {'diffusers' if name[0].isupper() else 'ltd'}\n---\n\n# {name}\n\n"
        f"Exported by ltd.\n\n| what | value |\n| --- | --- |\n{rows}",
        "utf-8",
    )


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "none"
    return str(value).replace("|", "/").replace("\n", " ")
