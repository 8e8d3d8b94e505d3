"""Several text encoders as one: their embeddings joined along tokens or along channels.

Along tokens, each encoder has a stretch of its own, padded with zeros to the widest one's channels, and the model
brings each to its width by weights of its own (``DitConfig.text_parts``). Along channels, as two of SD3's encoders are,
the n-th tokens of all make one. One encoder is that encoder, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.encoders.package_files import hash_files
from ltd.encoders.text import (
    BytesTextConfig,
    TextEncoder,
    TextEncoderConfig,
    TransformersTextConfig,
    build_text_encoder,
    resolve_folder,
    text_encoder_hash,
)

#: One text encoder, several, or none.
TextConfig: TypeAlias = (
    TransformersTextConfig | BytesTextConfig | tuple[TransformersTextConfig | BytesTextConfig, ...] | None
)
Join: TypeAlias = Literal["tokens", "channels"]


def build_text(config: TextConfig, join: Join, *, device: torch.device | str = "cpu") -> TextEncoder | None:
    """Build the text encoder of a configuration.

    Args:
        config: One encoder, several, or none.
        join: How several meet.
        device: Where their networks run.

    Returns:
        A frozen encoder; None for none.
    """
    if config is None:
        return None
    found = _several(config, join)
    if len(found) == 1 and join == "channels":
        return build_text_encoder(found[0], device=device)
    return JoinedTextEncoder([build_text_encoder(item, device=device) for item in found], join)


def text_hash(config: TextConfig, join: Join) -> str | None:
    """Hash what the embeddings of a configuration depend on, without loading a network.

    Args:
        config: One encoder, several, or none.
        join: How several meet.

    Returns:
        The ``hash`` of what ``build_text`` would build; None for none.
    """
    if config is None:
        return None
    hashes = [text_encoder_hash(item) for item in _several(config, join)]
    return hashes[0] if len(hashes) == 1 and join == "channels" else _joined_hash(hashes, join)


def _several(config: TextEncoderConfig | tuple[TextEncoderConfig, ...], join: Join) -> tuple[TextEncoderConfig, ...]:
    if isinstance(config, tuple):
        if not config:
            raise ConfigError("text: got no encoder, needed one or more, or null")
        return config
    if join == "tokens":
        raise ConfigError("model.text_parts: got some for one text encoder; needed text to be a list of encoders")
    return (config,)


def text_slices(config: TextConfig, join: Join) -> list[tuple[slice, slice]]:
    """Say which part of joined embeddings each of several encoders has.

    Args:
        config: The encoders; one, or none, has no parts.
        join: How they meet.

    Returns:
        Tokens and channels of each; all tokens where they are joined along channels.
    """
    if not isinstance(config, tuple):
        return []
    if join == "tokens":
        return [(part, slice(None)) for part in _stretches([item.max_length for item in config])]
    return [(slice(None), part) for part in _stretches([_dim(item) for item in config])]


def _stretches(sizes: Sequence[int]) -> list[slice]:
    return [slice(sum(sizes[:number]), sum(sizes[: number + 1])) for number in range(len(sizes))]


def _dim(config: TextEncoderConfig) -> int:
    """Tell the size of an encoder's embeddings without loading it."""
    if isinstance(config, BytesTextConfig):
        return config.dim
    folder = resolve_folder(config.path)[0]
    about = json.loads((folder / "config.json").read_text("utf-8"))
    about = {**about, **about.get("text_config", {})} if "hidden_size" not in about else about
    return int(about.get("hidden_size") or about["d_model"])


def _joined_hash(hashes: Sequence[str], join: Join) -> str:
    return hash_files([], "joined", join, *hashes)


class JoinedTextEncoder:
    """Several encoders behind the interface of one.

    Args:
        encoders: Two or more; one may stand alone along tokens.
        join: Along what their embeddings are joined.
    """

    def __init__(self, encoders: Sequence[TextEncoder], join: Join) -> None:
        self.encoders, self.join = tuple(encoders), join
        self.name = " + ".join(encoder.name for encoder in encoders)
        self.hash = _joined_hash([encoder.hash for encoder in encoders], join)
        dims, lengths = [encoder.dim for encoder in encoders], [encoder.max_length for encoder in encoders]
        along_tokens = join == "tokens"
        self.dim = max(dims) if along_tokens else sum(dims)
        self.max_length = sum(lengths) if along_tokens else max(lengths)
        #: Tokens and channels of each encoder; () along channels, where all share the tokens.
        self.parts = tuple(zip(lengths, dims, strict=True)) if along_tokens else ()

    @property
    def num_truncated(self) -> int:
        """Captions that were cut, counted by each encoder."""
        return sum(encoder.num_truncated for encoder in self.encoders)

    @property
    def flops(self) -> float:
        """Operations of all forward passes so far."""
        return float(sum(getattr(encoder, "flops", 0.0) for encoder in self.encoders))

    def to(self, device: torch.device | str) -> JoinedTextEncoder:
        """Move the networks to a device."""
        self.encoders = tuple(encoder.to(device) for encoder in self.encoders)
        return self

    def excess(self, caption: str) -> int:
        """Count the tokens beyond the limit of the encoder that reads most of a caption; 0 if one reads it whole."""
        return min(encoder.excess(caption) for encoder in self.encoders)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed captions.

        Args:
            captions: ``b`` captions; every encoder gets each.

        Returns:
            Embeddings ``(b, max_length, dim)`` float32 on the CPU, zero where an encoder has no token or fewer
            channels, and the mask ``(b, max_length)``: True where some encoder has a token.
        """
        text = torch.zeros(len(captions), self.max_length, self.dim)
        mask = torch.zeros(len(captions), self.max_length, dtype=torch.bool)
        token, channel = 0, 0
        for encoder in self.encoders:
            found, kept = encoder.encode(captions)
            tokens = slice(token, token + encoder.max_length)
            text[:, tokens, channel : channel + encoder.dim] = found
            mask[:, tokens] |= kept
            if self.join == "tokens":
                token += encoder.max_length
            else:
                channel += encoder.dim
        return text, mask
