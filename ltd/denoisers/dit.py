"""Diffusion transformer over (t, h, w) tokens of image and video latents of any size.

A plain single-device model: it knows nothing of processes, precision policies or training. Parallelism enters through
four attributes (``SelfAttention.attend``, ``Dit.shard_tokens``, ``Dit.gather_tokens``, ``Dit.shard_lengths``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.denoisers.alignment import TokenProjector
from ltd.denoisers.blocks import BlockModulation, DitBlock, FinalLayer, TableModulation
from ltd.denoisers.conditioning import Conditioning
from ltd.nn import seams
from ltd.nn.embed import LabelEmbedding, TextEmbedding, TimeEmbedding, masked_mean, position_sinusoid
from ltd.nn.packing import Packing, Segments, mean_by_sample, pack_latents, pack_text, unpack_latents
from ltd.nn.patch import grid_positions, patchify, token_grid, unpatchify
from ltd.nn.rope import check_rope_split, default_rope_split, rope_tables
from ltd.shapes import VideoShape


@dataclass(frozen=True, kw_only=True)
class DitConfig:
    """Size and options of a diffusion transformer."""

    kind: Literal["dit"] = "dit"
    latent_channels: int = 16
    """Channels of the latents."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent cells per token along (t, h, w)."""
    width: int = 384
    """Channels of a token; divides by num_heads."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 6
    """Attention heads; width / num_heads is even and 6 or more."""
    mlp_ratio: float = 4.0
    """Width of the ungated perceptron the SwiGLU stands for: its gate is 2/3 of that, rounded to mlp_multiple."""
    mlp_multiple: int = 16
    """The SwiGLU gate's width is rounded to the nearest multiple of this."""
    text_dim: int | None = None
    """Size of the text encoder's token embeddings; null = no text."""
    pooled_text: bool = False
    """Whether the mean text token also joins the time embedding that modulates every block; needs text_dim."""
    num_classes: int | None = None
    """Number of class labels; null = no labels."""
    qk_norm: bool = True
    """Whether each head's queries and keys pass an RMSNorm."""
    rope_split: tuple[int, int, int] | None = None
    """Channels of a head rotated by (t, h, w), three even numbers; null = a third each."""
    rope_theta: float = 10_000.0
    """Base of the rotation frequencies, above 1; smaller for short grids."""
    position_embedding: Literal["none", "sincos"] = "sincos"
    """Whether sinusoids of a token's position join its patch: rotations alone tell only differences of positions."""
    modulation: Literal["per_block", "shared"] = "per_block"
    """Whether each block projects the condition itself, or all share one projection plus a table per block."""
    time_scale: float = 1000.0
    """What times in [0, 1] are multiplied by before their sinusoid."""
    prediction: Literal["velocity", "data"] = "velocity"
    """What the last layer stands for. Either way ``forward`` returns the velocity: "data" turns a prediction of x0 into
    (x_t - x0) / t, which spares a narrow model from carrying the noise of wide patches."""
    min_time: float = 0.05
    """Smallest t that a prediction of data is divided by, in (0, 1]."""

    def __post_init__(self) -> None:
        for name in ("latent_channels", "width", "depth", "num_heads", "mlp_multiple", "text_dim", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, needed 1 or more")
        if min(self.patch) < 1:
            raise ConfigError(f"patch: got {self.patch}, needed three positive integers")
        if self.width % self.num_heads:
            raise ConfigError(f"num_heads: got {self.num_heads}, needed a divisor of width = {self.width}")
        if self.mlp_ratio <= 0 or self.rope_theta <= 1 or self.time_scale <= 0:
            raise ConfigError(
                f"mlp_ratio, rope_theta, time_scale: got {self.mlp_ratio}, {self.rope_theta}, {self.time_scale}, "
                "needed above 0, above 1, above 0"
            )
        if self.position_embedding == "sincos" and (self.width % 2 or self.width < 6):
            raise ConfigError(
                f"width: got {self.width}, needed an even number of 6 or more for position_embedding: sincos"
            )
        if not 0 < self.min_time <= 1:
            raise ConfigError(f"min_time: got {self.min_time}, needed above 0 and at most 1")
        if self.pooled_text and self.text_dim is None:
            raise ConfigError("pooled_text: got true without text_dim, needed text_dim = size of the text embeddings")
        try:
            check_rope_split(self.head_split, self.head_dim)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.num_heads

    @property
    def head_split(self) -> tuple[int, int, int]:
        """Channels of a head rotated by (t, h, w)."""
        return self.rope_split or default_rope_split(self.head_dim)

    @property
    def mlp_hidden(self) -> int:
        """Width of the SwiGLU gate."""
        steps = round(2 / 3 * self.mlp_ratio * self.width / self.mlp_multiple)
        return max(1, steps) * self.mlp_multiple

    @property
    def patch_dim(self) -> int:
        """Features of one patch."""
        return self.latent_channels * self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def num_parameters(self) -> int:
        """Number of parameters, in closed form (``docs/denoiser.md``)."""
        d, hidden = self.width, self.mlp_hidden
        heads = 2 * self.head_dim if self.qk_norm else 0
        shared = self.modulation == "shared"
        block = 4 * d * d + 4 * d + heads + 3 * d * hidden + 2 * hidden + d + (6 * d if shared else 6 * d * (d + 1))
        total = (self.patch_dim + 1) * d + (256 + 1) * d + d * (d + 1)
        total += 2 * d * (d + 1) + (d + 1) * self.patch_dim + (6 * d * (d + 1) if shared else 0)
        if self.text_dim is not None:
            block += 4 * d * d + 4 * d + heads + d
            total += self.text_dim + (self.text_dim + 1) * d + d * (d + 1) + (d * (d + 1) if self.pooled_text else 0)
        if self.num_classes is not None:
            total += (self.num_classes + 1) * d
        return total + self.depth * block


class Dit(nn.Module):
    """Predict the velocity of noisy latents: patches, blocks of full attention over (t, h, w), patches.

    At the start the output is exactly zero and every block is the identity.

    Reference: Peebles and Xie (2022), arXiv 2212.09748; Yao et al. (2025), LightningDiT, arXiv 2501.01423.

    Args:
        config: Size and options.
    """

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        self.shard_tokens = seams.shard_tokens
        self.gather_tokens = seams.gather_tokens
        self.shard_lengths = seams.shard_lengths
        d = config.width
        self.patch_embedding = nn.Linear(config.patch_dim, d)
        self.time_embedding = TimeEmbedding(d, scale=config.time_scale)
        self.label_embedding = LabelEmbedding(config.num_classes, d) if config.num_classes else None
        self.text_embedding = TextEmbedding(config.text_dim, d) if config.text_dim else None
        self.text_pooling = nn.Linear(d, d) if config.pooled_text else None
        self.modulation = nn.Linear(d, 6 * d) if config.modulation == "shared" else None
        self.blocks = nn.ModuleList(
            DitBlock(
                d,
                config.num_heads,
                config.mlp_hidden,
                shared_modulation=config.modulation == "shared",
                cross_attention=config.text_dim is not None,
                qk_norm=config.qk_norm,
            )
            for _ in range(config.depth)
        )
        self.final = FinalLayer(d, config.patch_dim)
        #: What only training needs: a projection of one block's tokens; never exported.
        self.alignment: TokenProjector | None = None
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw every parameter: Xavier-uniform products, small embeddings, zeros where a branch joins the stream."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in (self.time_embedding.input, self.time_embedding.output):
            nn.init.normal_(layer.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, BlockModulation):
                nn.init.zeros_(module.linear.weight)
            elif isinstance(module, TableModulation):
                nn.init.zeros_(module.table)
            elif isinstance(module, DitBlock) and module.cross_attention is not None:
                nn.init.zeros_(module.cross_attention.out.weight)
        for last in (self.final.linear, self.modulation):
            if last is not None:
                nn.init.zeros_(last.weight)

    def decay_groups(self) -> dict[str, list[str]]:
        """Name the parameters that weight decay applies to: weights of products, nothing else.

        Returns:
            ``{"decay": names, "no_decay": names}``; biases, norms, embeddings and tables are not decayed.
        """
        decay = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        names = [name for name, _ in self.named_parameters()]
        return {"decay": [n for n in names if n in decay], "no_decay": [n for n in names if n not in decay]}

    def forward(
        self,
        x_t: Tensor | Sequence[Tensor],
        t: Tensor,
        cond: Conditioning | None = None,
        tap: Callable[[Tensor], None] | None = None,
    ) -> Tensor | list[Tensor]:
        """Predict the velocity ``eps - x0``.

        Args:
            x_t: Noisy latents ``(b, c, t, h, w)``, any float dtype; or b samples ``(c, t, h, w)`` of any sizes, which
                run as one sequence without padding and do not see each other.
            t: Times ``(b,)`` in [0, 1]; 0 is data, 1 is noise.
            cond: Text and labels; None, or a missing field, is the null condition.
            tap: Is given the projected tokens of ``alignment``, ``(b, n, features)``, all of them on every process;
                ``(1, n, features)`` of samples, one behind the other. What is returned does not depend on it.

        Returns:
            The velocity in the shapes and dtypes of ``x_t``; a list where ``x_t`` is samples.

        Raises:
            ValueError: If the latents do not fit the patch or the channels, or the conditions do not fit the model,
                or a tap is given to a model without ``alignment``.
        """
        cond = cond or Conditioning()
        self._check(x_t, cond)
        if tap is not None and self.alignment is None:
            raise ValueError("tap: the model projects no tokens; needed its alignment")
        dtype, patch = self.patch_embedding.weight.dtype, self.config.patch
        if isinstance(x_t, Tensor):
            grid = token_grid(VideoShape(*x_t.shape[2:]), patch)
            out = self._tokens(patchify(x_t.to(dtype), patch), grid_positions(grid, x_t.device), t, cond, tap=tap)
            return self._velocity(unpatchify(out, grid, patch), x_t, t)
        patches, positions, lengths = pack_latents([x.to(dtype) for x in x_t], patch)
        out = self._tokens(patches, positions, t, cond, lengths, tap=tap)
        predictions = unpack_latents(out, [(x.shape[1], x.shape[2], x.shape[3]) for x in x_t], patch)
        samples = zip(predictions, x_t, t.split(1), strict=True)
        return [self._velocity(p.unsqueeze(0), x.unsqueeze(0), time).squeeze(0) for p, x, time in samples]

    def _tokens(
        self,
        patches: Tensor,
        positions: Tensor,
        t: Tensor,
        cond: Conditioning,
        lengths: tuple[int, ...] | None = None,
        *,
        tap: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Map patches ``(b, n, patch_dim)`` to what the last layer predicts of them; ``lengths``: of one pack."""
        patches = self.shard_tokens(patches)  # b n patch_dim
        positions = self.shard_tokens(positions)  # 1 n 3
        wide = torch.promote_types(patches.dtype, torch.float32)
        tables = rope_tables(positions, self.config.head_split, theta=self.config.rope_theta, dtype=wide)
        condition, text, text_lengths = self._embed(t, cond, packed=lengths is not None)
        shared = condition if self.modulation is None else self.modulation(condition)
        packing = None if lengths is None else self._packing(lengths, text_lengths)
        x = self.patch_embedding(patches)  # b n d
        if self.config.position_embedding == "sincos":
            x = x + position_sinusoid(positions, self.config.width).to(patches.dtype)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, shared, *tables, *text, packing)
            if tap is not None and self.alignment is not None and number == self.alignment.block:
                tap(self.gather_tokens(self.alignment(x)))
        return self.gather_tokens(self.final(x, condition, packing.lengths if packing else None))  # b n patch_dim

    def _packing(self, lengths: tuple[int, ...], text_lengths: tuple[int, ...] | None) -> Packing:
        local = self.shard_lengths(lengths)
        text = None if text_lengths is None else Segments(local, text_lengths)
        return Packing(Segments(lengths, lengths), local, text)

    def _velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Turn what the last layer predicts into the velocity, in at least fp32 and then the dtype of ``x_t``.

        Reference: Li and He (2025), Back to Basics, arXiv 2511.13720 (x-prediction with v-loss).
        """
        if self.config.prediction == "velocity":
            return prediction.to(x_t.dtype)
        wide = torch.promote_types(x_t.dtype, torch.float32)
        time = t.to(wide).clamp(min=self.config.min_time).reshape(-1, 1, 1, 1, 1)
        return ((x_t.to(wide) - prediction.to(wide)) / time).to(x_t.dtype)

    def _embed(
        self, t: Tensor, cond: Conditioning, *, packed: bool
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], tuple[int, ...] | None]:
        """Make the condition vector ``(b, 1, d)`` after its SiLU, and the text ``(b, m, d)`` with its mask, if any.

        Text of a pack is what ``pack_text`` makes of it, with its lengths.
        """
        condition = self.time_embedding(t)  # b d
        if self.label_embedding is not None:
            label = cond.label if cond.label is not None else t.new_full((len(t),), -1, dtype=torch.long)
            condition = condition + self.label_embedding(label)
        if self.text_embedding is None:
            return F.silu(condition).unsqueeze(1), (None, None), None
        tokens, mask = cond.text, cond.text_mask
        if tokens is None or mask is None:
            tokens = condition.new_zeros(len(t), 1, self.config.text_dim)
            mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=t.device)
        kept: Tensor | None = mask
        lengths = None
        if packed:
            tokens, lengths, kept = pack_text(tokens, mask)
        text = self.text_embedding(tokens)
        if self.text_pooling is not None:
            pooled = masked_mean(text, mask) if lengths is None else mean_by_sample(text, lengths, kept)
            condition = condition + self.text_pooling(pooled)
        return F.silu(condition).unsqueeze(1), (text, kept), lengths

    def _check(self, x_t: Tensor | Sequence[Tensor], cond: Conditioning) -> None:
        config, channels = self.config, self.config.latent_channels
        whole = isinstance(x_t, Tensor)
        shapes = [tuple(x.shape) for x in ((x_t,) if isinstance(x_t, Tensor) else x_t)]
        for shape in shapes or [()]:  # a pack needs a sample
            if len(shape) != 4 + whole or shape[int(whole)] != channels:
                needed = f"({'b, ' if whole else ''}model.latent_channels = {channels}, t, h, w)"
                raise ValueError(f"latents: got {shape}, needed {needed}")
        if cond.text is not None and cond.text.shape[2] != config.text_dim:
            raise ValueError(
                f"text: got embeddings of size {cond.text.shape[2]}, the model has model.text_dim = {config.text_dim}"
            )
        if cond.label is not None and config.num_classes is None:
            raise ValueError("label: the model was built without classes (model.num_classes)")
        if cond.batch_size not in (None, len(x_t)):
            raise ValueError(f"conditions: got {cond.batch_size} rows for {len(x_t)} latents")
