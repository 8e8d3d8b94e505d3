"""A folder that diffusers' WanPipeline runs: denoiser, autoencoder, text encoder and scheduler together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltd import storage
from ltd.autoencoders import Autoencoder
from ltd.config import ConfigError
from ltd.denoisers import Dit, Parametrized
from ltd.diffusion import ShiftConfig
from ltd.encoders.joined import TextConfig
from ltd.encoders.text import TransformersTextConfig, resolve_folder
from ltd.interop import wan_vae
from ltd.interop.denoisers import export_denoiser
from ltd.interop.folders import export_autoencoder
from ltd.interop.wan_dit import CLASS_NAME

_TEXT_CLASSES = {"umt5": "UMT5EncoderModel", "t5": "T5EncoderModel"}
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")


def export_pipeline(
    denoiser: Dit | Parametrized,
    autoencoder: Autoencoder,
    text: TextConfig,
    directory: str | Path,
    *,
    shift: ShiftConfig,
    lineage: Mapping[str, Any] | None = None,
) -> str:
    """Write a folder for ``WanPipeline.from_pretrained``.

    ``sample.py`` makes the same frames from the same noise with ``--solver euler --grid flow_match``.

    Args:
        denoiser: Of Wan's architecture, without known frames.
        autoencoder: Of Wan's architecture; its latents are the denoiser's.
        text: Encoder of the prompts: a local folder of T5 or UMT5.
        directory: Folder to make.
        shift: Time shift that the denoiser was trained under: a factor.
        lineage: What the card says of where the weights are from.

    Returns:
        What was written, in words.

    Raises:
        ConfigError: If one part is not of the architecture that the pipeline needs, or the folder exists.
    """
    if denoiser.config.text_dim is None or denoiser.config.frames == "channels":
        raise ConfigError("frames: WanPipeline takes text alone; needed model.text_dim, and frames: none or times")
    if shift.base_dim is not None or shift.base_cells is not None:
        raise ConfigError(f"objective.shift: got {shift}, WanPipeline has one factor for all sizes")
    folder, kind = _text_folder(text)
    if Path(directory).exists():
        raise ConfigError(f"{directory}: exists; name a new folder")
    with storage.atomic_directory(directory) as out:
        name = export_denoiser(denoiser, out / "transformer", lineage=lineage)
        vae = export_autoencoder(autoencoder, out / "vae")
        if vae != wan_vae.CLASS_NAME:
            raise ConfigError(f"autoencoder: would be a {vae}, WanPipeline needs {wan_vae.CLASS_NAME}")
        _copy(folder, out)
        scheduler = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": shift.factor,
        }
        (out / "scheduler").mkdir()
        storage.write_json(out / "scheduler" / "scheduler_config.json", scheduler)
        parts = {
            "scheduler": ["diffusers", _SCHEDULER],
            "text_encoder": ["transformers", _TEXT_CLASSES[kind]],
            "tokenizer": ["transformers", _tokenizer_class(folder)],
            "transformer": ["diffusers", CLASS_NAME],
            "transformer_2": [None, None],
            "vae": ["diffusers", vae],
        }
        expand = denoiser.config.frames == "times"
        index = {"_class_name": "WanPipeline", "boundary_ratio": None, "expand_timesteps": expand, **parts}
        storage.write_json(out / "model_index.json", index)
        shutil.copy(out / "transformer" / "README.md", out / "README.md")
    return f"WanPipeline with {name} and {vae}"


def _text_folder(text: TextConfig) -> tuple[Path, str]:
    if not isinstance(text, TransformersTextConfig):
        got = ": got none"
        if text is not None:
            got = f": got {len(text)} encoders" if isinstance(text, tuple) else f".kind: got {text.kind}"
        raise ConfigError(f"text{got}, WanPipeline needs one T5 or UMT5 from a folder (transformers)")
    folder, _ = resolve_folder(text.path)
    kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type", "")
    if kind not in _TEXT_CLASSES:
        raise ConfigError(f"text.path: {folder} holds a {kind!r}, WanPipeline needs {' or '.join(_TEXT_CLASSES)}")
    return folder, kind


def _tokenizer_class(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    given = json.loads(path.read_text("utf-8")).get("tokenizer_class") if path.is_file() else None
    return given or "T5TokenizerFast"


def _copy(folder: Path, out: Path) -> None:
    """Copy weights and tokenizer to the folders that a pipeline keeps them in."""
    for name in ("text_encoder", "tokenizer"):
        (out / name).mkdir()
    weights = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
    for path in sorted(weights):
        shutil.copy(path, out / "text_encoder" / path.name)
    for pattern in ("*token*.json", "*.model", "vocab*", "merges*", "spiece*", "added_tokens.json"):
        for path in sorted(set(folder.glob(pattern)) - weights):
            shutil.copy(path, out / "tokenizer" / path.name)
