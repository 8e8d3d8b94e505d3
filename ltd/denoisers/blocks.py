"""The transformer blocks of the DiT family and the output layer: single-device modules on tokens and conditions.

Blocks take tensors (and the plain numbers of a pack) and return tensors, so that activation checkpointing can wrap them
from outside, and nothing in them depends on the number of tokens, so that they run unchanged on a part of the sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.denoisers.config import DitConfig
from ltd.denoisers.modulation import (
    BlockModulation,
    Condition,
    ModulatedNorm,
    TableModulation,
    add_gated,
    of_tokens,
    vectors_of,
)
from ltd.denoisers.tokens import take_tokens
from ltd.nn.attention import CrossAttention, HeadProjections, SelfAttention, attend, mix
from ltd.nn.moe import ExpertChoice
from ltd.nn.norm import RMSNorm
from ltd.nn.packing import Packing, Repeats, by_sample

Keys: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TokenContext:
    """What tokens are met with in every block, besides the condition."""

    cos: Tensor | None = None
    """Rotation table ``(b or 1, n, 1, head_dim / 2)``; None rotates nothing."""
    sin: Tensor | None = None
    """Like ``cos``."""
    levels: Tensor | None = None
    """Which row of the condition ``(b, k, d)`` a token is modulated by, ``(b, n)``, long; None = the only one, or that
    of its sample."""
    text: Tensor | None = None
    """``(b, m, d)``, read by cross-attention."""
    text_mask: Tensor | None = None
    """Bool ``(b, m)``; of a pack, which samples have text (``CrossAttention``); None = all is read."""
    text_repeats: Repeats | None = None
    """How many tokens the last one of a text stands for; None = one."""
    image: Tensor | None = None
    """Tokens of an image encoder ``(b, m', d)``, read by cross-attention."""
    key_mask: Tensor | None = None
    """Bool ``(b, n)``: tokens of the sequence that are read; None = all."""
    packing: Packing | None = None
    """Where the samples of a pack lie, b = 1; None when a row is a sample."""
    streams: tuple[int, ...] | None = None
    """Text tokens, other tokens, and so on sample by sample: how many of each are here. For blocks of two streams."""
    per_token: bool = False
    """Whether the condition ``(b, n, d)`` has a row for every token."""

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Tokens of each sample of a pack that are modulated by that sample's row; None = a row is a sample."""
        return self.packing.lengths if self.packing and not self.per_token and self.levels is None else None

    def take(self, places: Tensor) -> TokenContext:
        """Keep what belongs to the tokens at ``places (b, k)`` of a batch of rows."""

        def taken(x: Tensor | None) -> Tensor | None:
            return None if x is None else take_tokens(x, places)

        return dataclasses.replace(self, cos=taken(self.cos), sin=taken(self.sin), levels=taken(self.levels))


class SwiGLU(nn.Module):
    """Gated perceptron: ``out(silu(a) * b)`` with ``a, b`` from one product.

    Reference: Shazeer (2020), arXiv 2002.05202, Eq. 6.

    Args:
        dim: Width of input and output.
        hidden: Width of the gate.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(dim, 2 * hidden)
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., dim)`` to ``(..., dim)``."""
        gate, value = self.input(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class GeluMlp(nn.Module):
    """Perceptron with a GELU in its tanh form.

    Args:
        dim: Width of input and output.
        hidden: Width in between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(dim, hidden)
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., dim)`` to ``(..., dim)``."""
        return self.out(F.gelu(self.input(x), approximate="tanh"))


class Stream(nn.Module):
    """Modulation, head projections and perceptron of one kind of token: what a block has besides attending.

    Args:
        config: Options of the family.
        attention: Holds the head projections.
        mlp: Perceptron.
        width: Channels of a token; the config's by default.
    """

    def __init__(
        self, config: DitConfig, attention: HeadProjections | None, mlp: nn.Module | None, width: int | None = None
    ) -> None:
        super().__init__()
        shared = config.modulation == "shared" and width is None
        width = width or config.width
        self.modulation = TableModulation(width) if shared else BlockModulation(width)
        self.attention, self.mlp = attention, mlp
        self.attention_norm = ModulatedNorm(config, width, config.norm_eps)
        mlp_eps = config.norm_eps if config.mlp_norm_eps is None else config.mlp_norm_eps
        self.mlp_norm = ModulatedNorm(config, width, mlp_eps)

    def attention_input(self, x: Tensor, vectors: Sequence[Tensor], lengths: tuple[int, ...] | None) -> Tensor:
        """Norm and modulate tokens ``(b, n, d)`` before attention by the six vectors."""
        return by_sample(self.attention_norm, lengths, [x], [vectors[0], vectors[1]])

    def mlp_input(self, x: Tensor, vectors: Sequence[Tensor], lengths: tuple[int, ...] | None) -> Tensor:
        """Norm and modulate tokens ``(b, n, d)`` before the perceptron by the six vectors."""
        return by_sample(self.mlp_norm, lengths, [x], [vectors[3], vectors[4]])

    @staticmethod
    def join(x: Tensor, branch: Tensor, gate: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
        """Add a branch through its gate."""
        return by_sample(add_gated, lengths, [x, branch], [gate])


class DitBlock(Stream):
    """Self-attention, text cross-attention (if any) and perceptron, modulated by adaLN-zero: the identity at the start.

    Reference: Peebles and Xie (2022), arXiv 2212.09748, Sec. 3.2.

    Args:
        config: Options of the family.
        experts: Whether the perceptron is a mixture of experts.
        shared: Attention and perceptron that blocks share; None = its own.
        head: Whether this is a block of the wide head: of its width, without text.
    """

    def __init__(
        self,
        config: DitConfig,
        *,
        experts: bool = False,
        shared: SharedParts | None = None,
        head: bool = False,
    ) -> None:
        width, num_heads = config.width, config.num_heads
        if head:
            assert config.head is not None
            width, num_heads = config.head.width, config.head.num_heads
        options = attention_options(config)
        attention, mlp = (shared.attention, shared.mlp) if shared is not None else (None, None)
        own = SelfAttention(width, num_heads, **options) if attention is None else None
        perceptron = _perceptron(config, width, experts=experts) if mlp is None else None
        super().__init__(config, own, perceptron, width if head else None)
        self._shared = (attention, mlp)  # in a tuple: not of this block's parameters
        reads_text = config.text_dim is not None and config.text_stream == "cross" and not head
        self.cross_norm = _cross_norm(config) if reads_text else None
        self.cross_attention = (
            CrossAttention(width, num_heads, image=config.image_dim is not None, **options) if reads_text else None
        )

    def forward(
        self, x: Tensor, condition: Condition, context: TokenContext, keys: Sequence[Keys] | None = None
    ) -> Tensor:
        """Update tokens.

        Args:
            x: ``(b, n, d)``.
            condition: ``(b, k, d)`` after its SiLU, or the shared projection ``(b, k, 6 d)``; a pack's has a row per
                sample. Or what ``modulations`` made of it.
            context: Rotations, text and the places of samples.
            keys: What ``text_keys`` made; takes the place of the context's text and image.

        Returns:
            ``(b, n, d)``.
        """
        lengths = context.lengths
        vectors = of_tokens(vectors_of(self.modulation, condition), context.levels)
        attention: Callable[..., Tensor] = self.attention or self._shared[0]  # type: ignore[assignment]
        segments = context.packing.attention if context.packing else None
        inner = self.attention_input(x, vectors, lengths)
        x = self.join(x, attention(inner, context.cos, context.sin, segments, context.key_mask), vectors[2], lengths)
        if self.cross_attention is not None and self.cross_norm is not None:
            x = x + self._read(x, context, keys)
        mlp: Callable[..., Tensor] = self.mlp or self._shared[1]  # type: ignore[assignment]
        inner = self.mlp_input(x, vectors, lengths)
        if isinstance(mlp, ExpertChoice):
            return self.join(x, mlp(inner, context.packing.lengths if context.packing else None), vectors[5], lengths)
        return self.join(x, mlp(inner), vectors[5], lengths)

    def _read(self, x: Tensor, context: TokenContext, keys: Sequence[Keys] | None) -> Tensor:
        assert self.cross_attention is not None and self.cross_norm is not None
        text: Any = context.text if keys is None else keys[0]
        image: Any = context.image if keys is None else (keys[1] if len(keys) > 1 else None)
        segments = context.packing.text if context.packing else None
        return self.cross_attention(self.cross_norm(x), text, context.text_mask, segments, image, context.text_repeats)

    def modulations(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Make the six vectors ``(b, k, d)`` of a condition, to be given in its place."""
        return self.modulation(condition)

    def text_keys(self, text: Tensor, image: Tensor | None) -> tuple[Keys, ...]:
        """Make the keys and values of text ``(b, m, d)``, and of an image's tokens: they stay the same in all steps."""
        assert self.cross_attention is not None
        keys = (self.cross_attention.keys(text),)
        return keys if image is None else (*keys, self.cross_attention.image_keys(image))


class SharedParts(nn.Module):
    """What all blocks of a model use together, so that its parameters exist once.

    Reference: DiT-Air (2025), arXiv 2503.10618 (shared attention and perceptron).

    Args:
        config: Options of the family.
    """

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        options = attention_options(config)
        self.attention = SelfAttention(config.width, config.num_heads, **options) if config.share_attention else None
        self.mlp = _perceptron(config, config.width) if config.share_mlp else None


class DualBlock(nn.Module):
    """Text and other tokens of one sequence, each with weights of their own, attend together.

    Reference: Esser et al. (2024), arXiv 2403.03206, Sec. 4 (MMDiT).

    Args:
        config: Options of the family.
    """

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.attend = attend
        options = attention_options(config)
        self.text, self.other = (
            Stream(
                config, HeadProjections(config.width, config.num_heads, **options), _perceptron(config, config.width)
            )
            for _ in range(2)
        )

    def modulations(self, condition: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Make the vectors ``(b, k, d)`` of both streams of a condition, to be given in its place."""
        return tuple(stream.modulation(condition) for stream in (self.text, self.other))

    def forward(self, x: Tensor, condition: Condition, context: TokenContext) -> Tensor:
        """Update tokens, as ``DitBlock.forward``; the context says which of them are text (``streams``)."""
        assert context.streams is not None
        sides = []
        cos, sin, levels = (
            split_streams(table, context.streams) for table in (context.cos, context.sin, context.levels)
        )
        halves = split_streams(x, context.streams)
        for side, stream in enumerate((self.text, self.other)):
            lengths = context.streams[side::2] if context.lengths is not None else None
            given = condition[side] if isinstance(condition, tuple) else condition
            vectors = of_tokens(vectors_of(stream.modulation, given), levels[side])
            inner = stream.attention_input(halves[side], vectors, lengths)
            assert stream.attention is not None and stream.mlp is not None
            sides.append((stream, vectors, lengths, stream.attention.project(inner, cos[side], sin[side])))
        q, k, v = (join_streams(*pair, context.streams) for pair in zip(sides[0][3], sides[1][3], strict=True))
        segments = context.packing.attention if context.packing else None
        mixed = split_streams(mix(self.attend, q, k, v, segments, context.key_mask).flatten(2), context.streams)
        out = []
        for (stream, vectors, lengths, _), own, half in zip(sides, mixed, halves, strict=True):
            assert stream.attention is not None and stream.mlp is not None
            half = stream.join(half, stream.attention.out(own), vectors[2], lengths)
            out.append(stream.join(half, stream.mlp(stream.mlp_input(half, vectors, lengths)), vectors[5], lengths))
        return join_streams(out[0], out[1], context.streams)


def split_streams(x: Tensor | None, streams: tuple[int, ...]) -> tuple[Any, Any]:
    """Part tokens ``(b or 1, n, ...)`` into text and others; None gives two of them."""
    if x is None:
        return None, None
    parts = x.split(list(streams), 1)
    return tuple(side[0] if len(side) == 1 else torch.cat(side, 1) for side in (parts[0::2], parts[1::2]))  # type: ignore[return-value]


def join_streams(text: Tensor, other: Tensor, streams: tuple[int, ...]) -> Tensor:
    """Put text and other tokens back into one sequence: the inverse of ``split_streams``."""
    if len(streams) == 2:
        return torch.cat((text, other), 1)
    sides = text.split(list(streams[0::2]), 1), other.split(list(streams[1::2]), 1)
    return torch.cat([part for pair in zip(*sides, strict=True) for part in pair], 1)


class FinalLayer(nn.Module):
    """Modulated norm and projection of tokens to patches; outputs zero at the start.

    Args:
        config: Options of the family.
        patch_dim: Features of one patch of the output.
    """

    def __init__(self, config: DitConfig, patch_dim: int) -> None:
        super().__init__()
        dim = config.width if config.head is None else config.head.width
        table = config.final_modulation == "table"
        self.modulation = TableModulation(dim, 2) if table else BlockModulation(dim, 2)
        self.linear = nn.Linear(dim, patch_dim)
        self.norm = ModulatedNorm(config, dim, config.norm_eps)

    def forward(
        self, x: Tensor, condition: Condition, levels: Tensor | None = None, lengths: tuple[int, ...] | None = None
    ) -> Tensor:
        """Project tokens to patches.

        Args:
            x: ``(b, n, d)``.
            condition: ``(b, k, d)``, ``(b, k, 2 d)`` for a table; a row per sample of a pack. Or the two vectors.
            levels: Which row a token is modulated by, ``(b, n)``; None = the only one.
            lengths: Tokens of each sample of a pack, b = 1; None when a row is a sample.

        Returns:
            ``(b, n, patch_dim)``.
        """
        vectors = of_tokens(vectors_of(self.modulation, condition), levels)
        return self.linear(by_sample(self.norm, lengths, [x], vectors))


def attention_options(config: DitConfig) -> dict[str, Any]:
    """Collect the options that all attentions of a model have in common."""
    options = {"qk_norm": config.qk_norm, "norm_over": config.qk_norm_over, "bias": config.qkv_bias}
    return options | {"eps": config.norm_eps}


def _perceptron(config: DitConfig, width: int, *, experts: bool = False) -> nn.Module:
    hidden = config.hidden_of(width)
    if experts:
        assert config.experts is not None
        return ExpertChoice(width, hidden, num=config.experts.num, capacity=config.experts.capacity)
    return SwiGLU(width, hidden) if config.mlp == "swiglu" else GeluMlp(width, hidden)


def _cross_norm(config: DitConfig) -> nn.Module:
    match config.cross_norm:
        case "rms":
            return RMSNorm(config.width, config.norm_eps)
        case "layer":
            return nn.LayerNorm(config.width, config.norm_eps)
        case _:
            return nn.Identity()
