"""Operations of a denoiser, counted from its configuration and the sizes of what it is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltd.denoisers.conditioning import Conditioning
from ltd.denoisers.config import DitConfig
from ltd.nn.flops import Flops, Number, attention, linear, total
from ltd.nn.patch import token_grid
from ltd.shapes import VideoShape

_SCALAR_FEATURES = 256


@dataclass(frozen=True, kw_only=True)
class DitInputs:
    """Sizes of what one call is given, in numbers."""

    #: Latent cells (t, h, w) of every sample.
    cells: tuple[tuple[int, int, int], ...]
    #: Text tokens of every sample: of rows the padded length, of a pack the real tokens; a tensor ``(b,)`` where only
    #: the device knows.
    text: Sequence[int] | Tensor = ()
    #: Whether the samples run as one sequence without padding.
    packed: bool = False
    #: Times of a sample: 1, or one for each latent frame.
    times: int = 1
    #: Whether known frames are given.
    frames: bool = False
    #: Tokens of a sample that are kept behind the first blocks; None = all.
    kept: int | None = None
    #: Whether the numbers of ``DitConfig.scalars`` are given.
    scalars: bool = True
    #: Tokens of an image encoder per sample; 0 = none.
    image: int = 0

    @classmethod
    def of(cls, x_t: Tensor | Sequence[Tensor], cond: Conditioning, *, times: int = 1) -> DitInputs:
        """Read the sizes of what ``Dit.forward`` is given; waits for no device.

        Args:
            x_t: Latents ``(b, c, t, h, w)``, or a pack of ``(c, t, h, w)``.
            cond: Conditions.
            times: Times of a sample.

        Returns:
            The sizes.
        """
        packed = not isinstance(x_t, Tensor)
        cells = tuple((x.shape[1], x.shape[2], x.shape[3]) for x in x_t)
        text: Sequence[int] | Tensor = ()
        if cond.text is not None and cond.text_mask is not None:
            text = cond.text_mask.sum(1).double() if packed else (cond.text.shape[1],) * len(cells)
        return cls(
            cells=cells,
            text=text,
            packed=packed,
            times=times,
            frames=cond.frames is not None,
            scalars=cond.scalars is not None,
            kept=None if cond.kept is None else cond.kept.shape[1],
            image=0 if cond.image is None else cond.image.shape[1],
        )


@dataclass(frozen=True)
class DitFlops:
    """Operations of one call, over all its samples."""

    #: Of each of ``Dit.blocks``.
    blocks: tuple[Flops, ...]
    #: Of embeddings, wide head and last layer.
    rest: Flops
    #: Tokens of the latents, over all samples.
    patches: int
    #: Text tokens that are computed, over all samples.
    text: Number

    @property
    def all(self) -> Flops:
        """Of the whole model."""
        return _sum_of(self.blocks) + self.rest

    def recomputed(self, every: int, *, keep_attention: bool = False) -> Number:
        """Count the forward operations that activation checkpointing repeats.

        Args:
            every: Every which block is recomputed, from the first; 0 = none.
            keep_attention: Whether what attention gave is kept.

        Returns:
            The operations.
        """
        chosen = _sum_of(self.blocks[::every] if every else ())
        return chosen.forward - chosen.attention if keep_attention else chosen.forward


def _sum_of(blocks: Sequence[Flops]) -> Flops:
    """Add up blocks, most of which are alike: few operations where the counts are on a device."""
    alike = Counter(id(block) for block in blocks)
    distinct = {id(block): block for block in blocks}
    return total(distinct[key] * count for key, count in alike.items())


def count_flops(config: DitConfig, inputs: DitInputs) -> DitFlops:
    """Count the operations of one call of a model.

    Args:
        config: The model's.
        inputs: Sizes of what it is given.

    Returns:
        The operations; of a training step, without what is computed twice.

    Raises:
        ValueError: If a size does not divide by the patch.
    """
    counts = _Counts(config, inputs)
    kinds = [(kind, index >= config.mixer_depth) for index, kind in enumerate(config.block_kinds)]
    made = {key: counts.block(*key) for key in dict.fromkeys(kinds)}
    blocks, rest = tuple(made[key] for key in kinds), counts.embeddings() + counts.ending()
    return DitFlops(blocks, rest, sum(counts.patches), counts.text)


@dataclass(frozen=True)
class _Tokens:
    """Sums over the samples of a call."""

    num: Number
    #: Of squares.
    pairs: Number
    #: Of products with the sample's text tokens.
    with_text: Number


class _Counts:
    """The parts of one call."""

    def __init__(self, config: DitConfig, inputs: DitInputs) -> None:
        self.config, self.inputs = config, inputs
        self.samples = len(inputs.cells)
        grids = [token_grid(VideoShape(*cells), config.patch) for cells in inputs.cells]
        self.patches = [t * h * w for t, h, w in grids]
        self.joint = config.text_stream == "joint"
        text = self._text()
        self.text = _add(text)
        self.whole = self._tokens(self.patches, text)
        #: Behind the blocks that see all tokens.
        self.kept = self.whole if inputs.kept is None else self._tokens([inputs.kept] * self.samples, text)
        #: Rows of the condition.
        self.rows = self.samples * (inputs.times + (inputs.frames and config.frames == "times"))

    def _text(self) -> Sequence[int] | Tensor:
        """Count the text tokens of every sample that the model works on."""
        config, given = self.config, self.inputs.text
        if config.text_dim is None:
            return [0] * self.samples
        if config.text_length is not None and not config.folds_text:
            return [config.text_length] * self.samples
        if config.text_length is not None:
            return self._folded(config.text_length, given)
        cross = config.text_stream == "cross"
        if isinstance(given, Tensor):
            # Packed text keeps one token of a sample without any, for cross-attention.
            return given.clamp(min=1) if cross else given
        if not len(given):
            return [int(not self.inputs.packed or cross)] * self.samples
        return [max(count, 1) if self.inputs.packed and cross else count for count in given]

    def _folded(self, length: int, given: Sequence[int] | Tensor) -> Sequence[int] | Tensor:
        """Count real tokens and the one that stands for the padding."""
        if isinstance(given, Tensor):
            return given + 1
        counts = given if len(given) else [0] * self.samples
        return [count + 1 if self.inputs.packed else min(count + 1, length) for count in counts]

    def _tokens(self, patches: Sequence[int], text: Sequence[int] | Tensor) -> _Tokens:
        """Sum over sequences of patches, registers and, in a joint sequence, text."""
        own = [count + self.config.registers for count in patches]
        if isinstance(text, Tensor):
            base = torch.tensor(own, dtype=text.dtype).to(text.device, non_blocking=True)
            tokens = base + text if self.joint else base
            return _Tokens(tokens.sum(), tokens.square().sum(), (tokens * text).sum())
        counts = [n + m for n, m in zip(own, text, strict=True)] if self.joint else own
        products = (n * m for n, m in zip(counts, text, strict=True))
        return _Tokens(sum(counts), sum(n * n for n in counts), sum(products))

    def block(self, kind: str, dropped: bool) -> Flops:
        """Count one of the blocks; ``dropped``: whether it comes behind those that see all tokens."""
        config, d, tokens = self.config, self.config.width, self.kept if dropped else self.whole
        parts = [self._transformer(tokens, d, kind, dropped=dropped)]
        if config.modulation == "per_block":
            parts.append(linear(self.rows, d, 6 * d) * (2 if kind == "dual" else 1))
        if config.text_dim is not None and not self.joint:
            parts += [linear(tokens.num, d, 2 * d), linear(self.text, d, 2 * d)]  # queries and output; keys and values
            parts.append(attention(tokens.with_text, 1, d))
            if self.inputs.image:
                parts.append(linear(self.samples * self.inputs.image, d, 2 * d))
                parts.append(attention(tokens.num, self.inputs.image, d))
        return total(parts)

    def _transformer(self, tokens: _Tokens, width: int, kind: str = "plain", *, dropped: bool = False) -> Flops:
        """Count self-attention and perceptron."""
        hidden = self.config.hidden_of(width)
        parts = [linear(tokens.num, width, 4 * width), attention(tokens.pairs, 1, width)]
        if kind != "experts":
            gates = 2 if self.config.mlp == "swiglu" else 1
            return total([*parts, linear(tokens.num, width, gates * hidden), linear(tokens.num, hidden, width)])
        assert self.config.experts is not None
        parts.append(linear(tokens.num, width, self.config.experts.num))
        return total([*parts, linear(self._taken(dropped), width, hidden) * 2])

    def _taken(self, dropped: bool) -> int:
        """Count the tokens that experts take of each sample; packed joint text is waited for, as routing waits too."""
        experts, kept = self.config.experts, self.inputs.kept
        assert experts is not None
        text: Any = self._text()
        taken = 0
        for place, patches in enumerate(self.patches):
            own = kept if dropped and kept is not None else patches
            n = own + self.config.registers + (int(text[place]) if self.joint else 0)
            taken += experts.num * min(n, max(1, round(experts.capacity * n / experts.num)))
        return taken

    def embeddings(self) -> Flops:
        """Count what is embedded before the blocks."""
        config, d, samples = self.config, self.config.width, self.samples
        parts = [linear(sum(self.patches), config.patch_dim, d, leaf=True)]
        parts.append(self._time() * (config.depth if config.embed_per_block else 1))
        scalar = linear(samples, _SCALAR_FEATURES, d, leaf=True) + linear(samples, d, d)
        parts.append(scalar * (len(config.scalars) if self.inputs.scalars else 0))
        if config.modulation == "shared":
            parts.append(linear(self.rows, d, 6 * d))
        for tokens, channels in config.text_parts:
            count = samples * tokens
            parts += [linear(count, channels, d, leaf=not config.text_norm), linear(count, d, d)]
        if config.text_dim is not None and not config.text_parts:
            parts += [linear(self.text, config.text_dim, d, leaf=not config.text_norm), linear(self.text, d, d)]
        if config.pooled_text:
            parts.append(linear(samples, d, d))
        if config.image_dim is not None and self.inputs.image:
            tokens = samples * self.inputs.image
            parts += [linear(tokens, config.image_dim, config.image_dim), linear(tokens, config.image_dim, d)]
        return total(parts)

    def _time(self) -> Flops:
        d = self.config.width
        return linear(self.rows, self.config.time_features, d, leaf=True) + linear(self.rows, d, d)

    def ending(self) -> Flops:
        """Count the wide head, if any, and the last layer."""
        config, head, d = self.config, self.config.head, self.config.width
        outputs = config.out_channels * config.patch_cells
        num = self.kept.num
        if head is None:
            table = config.final_modulation == "table"
            return linear(num, d, outputs) + (Flops() if table else linear(self.rows, d, 2 * d))
        parts = [self._time(), linear(num, config.patch_dim, head.width, leaf=True)]
        if d != head.width:
            parts.append(linear(num, d, head.width))
        block = self._transformer(self.kept, head.width)
        parts.append((block + linear(num, head.width, 6 * head.width)) * head.depth)
        return total([*parts, linear(num, head.width, 2 * head.width), linear(num, head.width, outputs)])


def _add(counts: Sequence[int] | Tensor) -> Number:
    return counts.sum() if isinstance(counts, Tensor) else sum(counts)
