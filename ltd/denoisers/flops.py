"""Operations of a denoiser, counted from its configuration and the sizes of what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def all(self) -> Flops:
        """Of the whole model."""
        return total((*self.blocks, self.rest))

    def recomputed(self, every: int, *, keep_attention: bool = False) -> Number:
        """Count the forward operations that activation checkpointing repeats.

        Args:
            every: Every which block is recomputed, from the first; 0 = none.
            keep_attention: Whether what attention gave is kept.

        Returns:
            The operations.
        """
        chosen = total(self.blocks[::every] if every else ())
        return chosen.forward - chosen.attention if keep_attention else chosen.forward


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
    blocks = [counts.block(index, kind) for index, kind in enumerate(config.block_kinds)]
    return DitFlops(tuple(blocks), counts.embeddings() + counts.ending())


class _Counts:
    """The parts of one call."""

    def __init__(self, config: DitConfig, inputs: DitInputs) -> None:
        self.config, self.inputs = config, inputs
        self.samples = len(inputs.cells)
        grids = [token_grid(VideoShape(*cells), config.patch) for cells in inputs.cells]
        self.patches = [t * h * w for t, h, w in grids]
        self.text = self._text()
        self.joint = config.text_stream == "joint"
        #: Rows of the condition.
        self.rows = self.samples * (inputs.times + (inputs.frames and config.frames == "times"))

    def _text(self) -> list[Number]:
        """List the text tokens of every sample that the model works on."""
        config, given = self.config, self.inputs.text
        if config.text_dim is None:
            return [0] * self.samples
        if config.text_length is not None:
            return [config.text_length] * self.samples
        cross = config.text_stream == "cross"
        if isinstance(given, Tensor):
            # Packed text keeps one token of a sample without any, for cross-attention.
            return list((given.clamp(min=1) if cross else given).unbind())
        if not len(given):
            return [int(not self.inputs.packed or cross)] * self.samples
        return [max(count, 1) if self.inputs.packed and cross else count for count in given]

    def sequence(self, index: int) -> list[Number]:
        """Count the tokens of every sample that a block (or what follows the last) works on."""
        config, kept = self.config, self.inputs.kept
        dropped = kept is not None and index >= config.mixer_depth
        own: list[Number] = [kept if dropped and kept is not None else count for count in self.patches]
        return [n + config.registers + (m if self.joint else 0) for n, m in zip(own, self.text, strict=True)]

    def block(self, index: int, kind: str) -> Flops:
        """Count one of the blocks."""
        config, d = self.config, self.config.width
        tokens = self.sequence(index)
        parts = [self._transformer(tokens, d, config.hidden_of(d), kind)]
        if config.modulation == "per_block":
            parts.append(linear(self.rows, d, 6 * d) * (2 if kind == "dual" else 1))
        if config.text_dim is not None and not self.joint:
            parts += [linear(sum(tokens), d, 2 * d), linear(sum(self.text), d, 2 * d)]  # queries and output; keys
            parts += [attention(n, m, d) for n, m in zip(tokens, self.text, strict=True)]
            if self.inputs.image:
                parts.append(linear(self.samples * self.inputs.image, d, 2 * d))
                parts += [attention(n, self.inputs.image, d) for n in tokens]
        return total(parts)

    def _transformer(self, tokens: Sequence[Number], width: int, hidden: int, kind: str = "plain") -> Flops:
        """Count self-attention and perceptron over the tokens of every sample."""
        num: Number = sum(tokens)
        parts = [linear(num, width, 4 * width), *(attention(n, n, width) for n in tokens)]
        if kind != "experts":
            gates = 2 if self.config.mlp == "swiglu" else 1
            return total([*parts, linear(num, width, gates * hidden), linear(num, hidden, width)])
        experts = self.config.experts
        assert experts is not None
        parts.append(linear(num, width, experts.num))
        for n in tokens:
            assert not isinstance(n, Tensor)
            taken = experts.num * min(n, max(1, round(experts.capacity * n / experts.num)))
            parts.append(linear(taken, width, hidden) * 2)
        return total(parts)

    def embeddings(self) -> Flops:
        """Count what is embedded before the blocks."""
        config, d, samples = self.config, self.config.width, self.samples
        parts = [linear(sum(self.patches), config.patch_dim, d, leaf=True)]
        parts.append(self._time() * (config.depth if config.embed_per_block else 1))
        parts.append((linear(samples, _SCALAR_FEATURES, d, leaf=True) + linear(samples, d, d)) * len(config.scalars))
        if config.modulation == "shared":
            parts.append(linear(self.rows, d, 6 * d))
        if config.text_dim is not None:
            tokens: Number = sum(self.text)
            parts += [linear(tokens, config.text_dim, d, leaf=not config.text_norm), linear(tokens, d, d)]
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
        tokens = self.sequence(config.depth)
        num: Number = sum(tokens)
        if head is None:
            table = config.final_modulation == "table"
            return linear(num, d, outputs) + (Flops() if table else linear(self.rows, d, 2 * d))
        parts = [self._time(), linear(num, config.patch_dim, head.width, leaf=True)]
        if d != head.width:
            parts.append(linear(num, d, head.width))
        block = self._transformer(tokens, head.width, config.hidden_of(head.width))
        parts.append((block + linear(num, head.width, 6 * head.width)) * head.depth)
        return total([*parts, linear(num, head.width, 2 * head.width), linear(num, head.width, outputs)])
