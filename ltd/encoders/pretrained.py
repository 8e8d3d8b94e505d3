"""Features from transformers folders: CLIP's embeddings of images and captions, VideoMAE of clips, DINOv2, ViT, ..."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.encoders.frames import IMAGENET_MEAN, IMAGENET_STD, FramesConfig, in_passes
from ltd.encoders.package_files import hash_files
from ltd.encoders.text import resolve_folder

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
#: What networks see whose folder has no preprocessor_config.json.
_KNOWN: dict[str, dict[str, Any]] = {
    "clip": {"fit": "crop", "mean": _CLIP_MEAN, "std": _CLIP_STD},
    "dinov2": {"fit": "crop", "shorter": 256, **_IMAGENET},
    "videomae": {"fit": "crop", "resize": "bilinear", "layout": "ntchw", **_IMAGENET},
}
#: Networks whose first token is the class token, after the last normalisation.
_CLASS_TOKEN = ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit")
#: Files of a CLIP's tokenizer, one of which holds the vocabulary.
_TOKENIZERS = ("tokenizer.json", "vocab.json")
_FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True, kw_only=True)
class TransformersFeaturesConfig:
    """A vision network in a transformers folder; nothing is downloaded or unpickled."""

    kind: Literal["transformers"] = "transformers"
    #: Folder with config.json and safetensors (CLIP, VideoMAE, DINOv2, ViT, ...), or ``package:NAME``. Its
    #: preprocessor_config.json decides how frames are resized and normalised; without one the kind of network does.
    path: str


class TransformersFeatures:
    """One vector of each frame (its class token) or clip (VideoMAE: the mean of its tokens).

    Args:
        config: The folder.
        device: Where it runs.

    Raises:
        ConfigError: If transformers is missing, or the folder does not load or lacks weights.
    """

    def __init__(self, config: TransformersFeaturesConfig, *, device: torch.device | str = "cpu") -> None:
        self._folder, name = resolve_folder(config.path)
        tree = json.loads((self._folder / "config.json").read_text())
        self.model_type = str(tree.get("model_type", ""))
        if self.model_type not in (*_KNOWN, *_CLASS_TOKEN):
            known = ", ".join(sorted({*_KNOWN, *_CLASS_TOKEN}))
            raise ConfigError(f"path: {self._folder} holds a {self.model_type or 'nameless'} network, needed {known}")
        self._frames = read_frames(self._folder, tree)
        self._network, self._device = load_network(self._folder).to(device), device
        self.dim = int(tree["projection_dim"] if self.model_type == "clip" else tree["hidden_size"])
        digest = hash_files([self._folder / "config.json", *self._folder.glob("*.safetensors")])
        self.name = f"{name} ({self.model_type}, sha256 {digest[:12]})"
        self.preprocessing = str(self._frames)

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features of clips.

        Args:
            clips: ``(b, t, h, w, 3)`` uint8.

        Returns:
            ``(b, dim)`` float32 on the CPU; of a network of single frames the mean over frames.
        """
        return in_passes(clips, self._frames, lambda x: self._pool(x.to(self._device)))

    def _pool(self, x: Tensor) -> Tensor:
        tokens: Tensor = self._network(pixel_values=x).last_hidden_state
        return tokens.mean(dim=1) if self._frames.sees_clips else tokens[:, 0]


class ImageTextFeatures(TransformersFeatures):
    """CLIP's embeddings in the space that images and captions share.

    Args:
        config: The folder, with a tokenizer where captions are embedded.
        device: Where it runs.

    Raises:
        ConfigError: As ``TransformersFeatures``.
    """

    def _pool(self, x: Tensor) -> Tensor:
        return _projected(self._network.get_image_features(pixel_values=x))

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions.

        Args:
            captions: ``b`` captions; longer ones are cut to the network's length.

        Returns:
            ``(b, dim)`` float32 on the CPU.

        Raises:
            ConfigError: If the folder holds no tokenizer.
        """
        import transformers

        if not any((self._folder / name).is_file() for name in _TOKENIZERS):
            # transformers makes one without a vocabulary, which reads all captions alike.
            raise ConfigError(
                f"path: {self._folder} holds no tokenizer ({' or '.join(_TOKENIZERS)}), captions need one"
            )
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"path: {self._folder} holds no tokenizer, which captions need: {error}") from error
        length = int(self._network.config.text_config.max_position_embeddings)
        tokens = tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self._device)
        found = self._network.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return _projected(found).float().cpu()


def build_transformers(
    config: TransformersFeaturesConfig, *, device: torch.device | str = "cpu"
) -> TransformersFeatures | ImageTextFeatures:
    """Build the features of a transformers folder: with captions beside frames where it is a CLIP.

    Args:
        config: The folder.
        device: Where it runs.

    Returns:
        The features.
    """
    folder, _ = resolve_folder(config.path)
    is_clip = json.loads((folder / "config.json").read_text()).get("model_type") == "clip"
    return (ImageTextFeatures if is_clip else TransformersFeatures)(config, device=device)


def read_frames(folder: Path, tree: dict[str, Any]) -> FramesConfig:
    """Read how a folder's network wants its frames.

    Args:
        folder: Where preprocessor_config.json may be.
        tree: Content of config.json.

    Returns:
        The description.

    Raises:
        ConfigError: If the file asks for a filter that is not known here.
    """
    model_type = str(tree.get("model_type", ""))
    vision = tree.get("vision_config", tree)
    fields: dict[str, Any] = {"size": vision.get("image_size", 224), **_KNOWN.get(model_type, _IMAGENET)}
    if model_type == "dinov2":
        fields["size"] = 224  # its config's image_size is that of its position embeddings
    if model_type == "videomae":
        fields["num_frames"] = tree.get("num_frames", 16)
    path = folder / "preprocessor_config.json"
    if path.is_file():
        fields = _apply(fields, json.loads(path.read_text()), path)
    return FramesConfig(**fields)


def _apply(fields: dict[str, Any], stated: dict[str, Any], path: Path) -> dict[str, Any]:
    """Let preprocessor_config.json overrule what is known of the kind of network."""
    size, crop = stated.get("size"), stated.get("crop_size")
    edge = _side(size)
    cropped = stated.get("do_center_crop", crop is not None)
    if edge is not None:
        fields = {key: value for key, value in fields.items() if key != "shorter"}
        if cropped:
            side = _side(crop) or edge
            fields |= {"fit": "crop", "size": side, "shorter": edge}
        else:
            fields |= {"fit": "whole", "size": edge}
    if "resample" in stated:
        if stated["resample"] not in _FILTERS:
            raise ConfigError(f"path: {path} asks for filter {stated['resample']}, needed 2 (bilinear) or 3 (bicubic)")
        fields["resize"] = _FILTERS[stated["resample"]]
    if stated.get("do_normalize", True):
        fields |= {key: tuple(stated[f"image_{key}"]) for key in ("mean", "std") if f"image_{key}" in stated}
    else:
        fields |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return fields


def _side(size: Any) -> int | None:
    """Read a side from the forms that preprocessor_config.json has had."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return int(size) if size is not None else None


def load_network(folder: Path) -> Any:
    """Load a vision network from a transformers folder: from safetensors only, every weight of it, frozen.

    Args:
        folder: Folder with config.json and safetensors.

    Returns:
        The network in evaluation mode, in float32, on the CPU.

    Raises:
        ConfigError: If transformers is missing, or the folder does not load or lacks weights.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("kind: 'transformers' needs the package transformers; install the 'text' extra") from error
    transformers.utils.logging.disable_progress_bar()
    try:
        network, info = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"path: {folder} does not load as a vision network: {error}") from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise ConfigError(f"path: {folder} lacks {len(missing)} weights of its own config, the first is {missing[0]}")
    return network.eval().requires_grad_(False)


def _projected(output: Any) -> Tensor:
    """Take the embedding out of what transformers returns: a tensor before version 5, an object since."""
    tensor: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return tensor
