"""Size and options of the family of diffusion transformers. Every default is this project's own plain DiT."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from ltd.config import ConfigError
from ltd.nn.rope import check_rope_split, default_rope_split


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A wide, shallow head behind the blocks: it sees the noisy patches again, modulated token by token."""

    width: int = 2048
    """Channels of a token; divides by num_heads. No narrower than latent_channels."""
    depth: int = 2
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"head.{name}: got {getattr(self, name)}, needed 1 or more")
        if self.width % self.num_heads:
            raise ConfigError(f"head.num_heads: got {self.num_heads}, needed a divisor of head.width = {self.width}")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Perceptrons of some blocks become a mixture of experts that choose their tokens."""

    num: int = 8
    """Number of experts."""
    capacity: float = 2.0
    """How many experts a token meets on average: each takes capacity * tokens / num of them; num is all."""
    every: int = 2
    """Every which block has experts: 2 is the second, the fourth and so on; the last block never has."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.every < 1:
            raise ConfigError(f"experts.num, experts.every: got {self.num}, {self.every}, needed 1 or more")
        if not 0 < self.capacity <= self.num:
            raise ConfigError(f"experts.capacity: got {self.capacity}, needed above 0 and at most num = {self.num}")


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
    norm: Literal["rms", "layer"] = "rms"
    """Norm before attention, perceptron and the last layer: RMSNorm or LayerNorm."""
    norm_weight: bool = False
    """Whether these norms have a weight for every channel, besides the modulation."""
    norm_eps: float = 1e-6
    """Epsilon of every norm of tokens."""
    mlp_norm_eps: float | None = None
    """Epsilon of the norm before the perceptron; null = norm_eps."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Perceptron: gated, or plain with a GELU (tanh form)."""
    mlp_ratio: float = 4.0
    """Width of the plain perceptron over width; a SwiGLU's gate is 2/3 of that. Rounded to mlp_multiple."""
    mlp_multiple: int = 16
    """The perceptron's width is rounded to the nearest multiple of this."""
    mlp_width: int | None = None
    """The perceptron's width itself; null = from mlp_ratio."""
    qkv_bias: bool = True
    """Whether the products that make queries, keys and values have a bias."""
    qk_norm: bool = True
    """Whether queries and keys pass an RMSNorm."""
    qk_norm_over: Literal["head", "width"] = "head"
    """What that norm averages over: each head by itself with shared weights, or all channels."""
    share_attention: bool = False
    """Whether all blocks use one attention's weights."""
    share_mlp: bool = False
    """Whether all blocks use one perceptron's weights."""
    text_dim: int | None = None
    """Size of the text encoder's token embeddings; null = no text."""
    text_stream: Literal["cross", "joint"] = "cross"
    """How text is read: by cross-attention, or as tokens of the same sequence."""
    dual_depth: int = 0
    """How many blocks, from the first, have weights of their own for text tokens; needs text_stream: joint."""
    text_norm: bool = True
    """Whether text embeddings pass an RMSNorm before their perceptron."""
    text_length: int | None = None
    """Texts are padded with zeros to this many tokens, all of which are read; null = padding is never read."""
    cross_norm: Literal["rms", "layer", "none"] = "rms"
    """Norm, with parameters, before cross-attention."""
    text_parts: tuple[tuple[int, int], ...] = ()
    """(tokens, channels) of each of several text encoders whose tokens stand one behind another: each has an embedding
    of its own. text_dim is then the largest of these channels. Empty: one encoder, or several joined along channels."""
    pooled_text: bool = False
    """Whether the mean text token also joins the time embedding that modulates every block; needs text_dim."""
    num_classes: int | None = None
    """Number of class labels; null = no labels."""
    scalars: tuple[Literal["fps", "height", "width", "crop_top", "crop_left"], ...] = ()
    """Numbers of a sample, embedded like the time, that join the time embedding."""
    frames: Literal["none", "times", "channels"] = "none"
    """How known latents enter (first frames, inpainting and the like). times: in the place of the noisy ones, at time 0
    of their own tokens. channels: beside them, with their mask, as further channels of the input."""
    frame_mask_channels: int = 1
    """Channels of the mask of frames: channels; more than one where a latent frame stands for several frames."""
    image_dim: int | None = None
    """Size of an image encoder's tokens, which cross-attention reads with keys and values of their own; null = none."""
    image_positions: int | None = None
    """Length of the learned positions of those tokens; null = none."""
    registers: int = 0
    """Number of learned tokens that join every sample and are dropped at the end."""
    rope_split: tuple[int, int, int] | None = None
    """Channels of a head rotated by (t, h, w), three even numbers; null = a third each."""
    rope_theta: float = 10_000.0
    """Base of the rotation frequencies, above 1; smaller for short grids."""
    position_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """What (t, h, w) positions are multiplied by before rotations and sinusoids, above 0; 0.5 brings a range twice as
    long as that of training back into it."""
    position_embedding: Literal["none", "sincos", "sincos_2d"] = "sincos"
    """Whether sinusoids of a token's position join its patch: rotations alone tell only differences of positions.
    sincos_2d is DiT's layout: (sin, cos) of the column, then of the row; it is blind to time."""
    position_base: int | None = None
    """With sincos_2d: positions are scaled so that every grid spans this many rows and columns; null = not."""
    rotary: bool = True
    """Whether queries and keys are rotated by their token's position."""
    modulation: Literal["per_block", "shared"] = "per_block"
    """Whether each block projects the condition itself, or all share one projection plus a table per block."""
    final_modulation: Literal["projected", "table"] = "projected"
    """How the last layer is modulated: by a projection of the condition, or by the time embedding plus a table."""
    embed_per_block: bool = False
    """Whether each block embeds time and label with weights of its own; needs modulation: per_block."""
    time_embedding: Literal["sinusoid", "fourier"] = "sinusoid"
    """Features of the time: fixed geometric frequencies, or frequencies drawn once from a normal distribution."""
    time_features: int = 256
    """Number of features of the time, even."""
    time_feature_shift: int = 0
    """1 lets the lowest frequency be exactly 1/10000, as in the discrete-time models of diffusers."""
    time_scale: float = 1000.0
    """What times in [0, 1] are multiplied by before their features."""
    time_direction: Literal["noise", "data"] = "noise"
    """Which end is 1 in the time that the features are of; t of ``forward`` always has noise at 1."""
    head: HeadConfig | None = None
    """A wide head behind the blocks; null = the last layer follows them."""
    experts: ExpertsConfig | None = None
    """Mixture of experts; null = none."""
    mixer_depth: int = 0
    """How many of the blocks come before tokens are dropped in training (``Conditioning.kept``)."""
    learn_sigma: bool = False
    """Whether the last layer also gives a variance, as imported weights may; it is not used."""
    prediction: Literal["velocity", "data"] = "velocity"
    """What the last layer stands for. Either way ``forward`` returns the velocity: "data" turns a prediction of x0 into
    (x_t - x0) / t, which spares a narrow model from carrying the noise of wide patches."""
    min_time: float = 0.05
    """Smallest t that a prediction of data is divided by, in (0, 1]."""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_options()
        try:
            if self.rotary:
                check_rope_split(self.head_split, self.head_dim)
                if self.head is not None:
                    default_rope_split(self.head.width // self.head.num_heads)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _check_sizes(self) -> None:
        sizes = ("latent_channels", "width", "depth", "num_heads", "mlp_multiple", "mlp_width", "text_dim")
        others = ("text_length", "num_classes", "image_dim", "image_positions", "position_base")
        for name in (*sizes, *others, "frame_mask_channels", "time_features"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, needed 1 or more")
        for name in ("registers", "dual_depth", "mixer_depth"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed 0 or more")
        if min(self.patch) < 1:
            raise ConfigError(f"patch: got {self.patch}, needed three positive integers")
        if self.width % self.num_heads:
            raise ConfigError(f"num_heads: got {self.num_heads}, needed a divisor of width = {self.width}")
        if self.mlp_ratio <= 0 or self.rope_theta <= 1 or self.time_scale <= 0:
            raise ConfigError(
                f"mlp_ratio, rope_theta, time_scale: got {self.mlp_ratio}, {self.rope_theta}, {self.time_scale}, "
                "needed above 0, above 1, above 0"
            )
        if min(self.position_scale) <= 0:
            raise ConfigError(f"position_scale: got {self.position_scale}, needed three numbers above 0")
        if self.time_features % 2 or self.time_feature_shift not in (0, 1):
            raise ConfigError(
                f"time_features, time_feature_shift: got {self.time_features}, {self.time_feature_shift}, "
                "needed an even number, and 0 or 1"
            )
        multiple = {"none": 1, "sincos": 2, "sincos_2d": 4}[self.position_embedding]
        if self.position_embedding != "none" and (self.width % multiple or self.width < 6):
            needed = "an even number of 6 or more" if multiple == 2 else "a multiple of 4 of 8 or more"
            raise ConfigError(
                f"width: got {self.width}, needed {needed} for position_embedding: {self.position_embedding}"
            )
        if not 0 < self.min_time <= 1:
            raise ConfigError(f"min_time: got {self.min_time}, needed above 0 and at most 1")
        last = self.width if self.head is None else self.head.width
        if last < self.latent_channels:
            name = "width" if self.head is None else "head.width"
            raise ConfigError(
                f"{name}: got {last} for latent_channels = {self.latent_channels}; a narrower last layer cannot hold "
                "the noise of all channels, needed at least as many"
            )

    def _check_options(self) -> None:
        for name in ("pooled_text", "text_length"):
            if getattr(self, name) and self.text_dim is None:
                raise ConfigError(
                    f"{name}: got {str(getattr(self, name)).lower()} without text_dim, needed text_dim = size of the "
                    "text embeddings"
                )
        if self.text_parts:
            widest = max(channels for _, channels in self.text_parts)
            if min(min(part) for part in self.text_parts) < 1 or self.text_dim != widest:
                raise ConfigError(
                    f"text_parts: got {self.text_parts} for text_dim = {self.text_dim}; needed 1 token and channel or "
                    f"more each, and text_dim: {widest}, the widest"
                )
            if self.text_length is not None:
                raise ConfigError("text_parts: cannot be combined with text_length; set that to null")
        if self.text_stream == "joint" and self.text_dim is None:
            raise ConfigError("text_stream: got joint without text_dim, needed the size of the text embeddings")
        if self.dual_depth and (self.text_stream != "joint" or self.dual_depth > self.depth):
            raise ConfigError(
                f"dual_depth: got {self.dual_depth}, needed text_stream: joint and at most depth = {self.depth}"
            )
        if self.dual_depth and (self.share_attention or self.share_mlp or self.experts):
            raise ConfigError("dual_depth: cannot be combined with share_attention, share_mlp or experts; set it to 0")
        if self.image_dim is not None and (self.text_dim is None or self.text_stream != "cross"):
            raise ConfigError("image_dim: is read beside text by cross-attention; needed text_dim, text_stream: cross")
        if self.image_positions is not None and self.image_dim is None:
            raise ConfigError("image_positions: got a length without image_dim")
        if self.embed_per_block and (self.modulation != "per_block" or self.pooled_text or self.scalars):
            raise ConfigError("embed_per_block: needs modulation: per_block, and neither pooled_text nor scalars")
        if self.embed_per_block and (self.head is not None or self.final_modulation != "projected"):
            raise ConfigError("embed_per_block: needs final_modulation: projected and no head")
        if self.head is not None and (
            self.registers or self.text_stream == "joint" or self.final_modulation == "table"
        ):
            raise ConfigError("head: cannot be combined with registers, text_stream: joint or final_modulation: table")
        if self.position_base is not None and self.position_embedding != "sincos_2d":
            raise ConfigError("position_base: only of position_embedding: sincos_2d")
        if self.mixer_depth >= self.depth:
            raise ConfigError(f"mixer_depth: got {self.mixer_depth}, needed fewer than depth = {self.depth}")
        if self.mixer_depth and (self.head is not None or self.text_stream == "joint"):
            raise ConfigError("mixer_depth: cannot be combined with head or text_stream: joint; set it to 0")
        if self.frame_mask_channels != 1 and self.frames != "channels":
            raise ConfigError(
                f"frame_mask_channels: got {self.frame_mask_channels} for frames: {self.frames}, needed frames: "
                "channels, or 1"
            )
        if len(set(self.scalars)) < len(self.scalars):
            raise ConfigError(f"scalars: got {', '.join(self.scalars)}, needed each at most once")
        if self.experts is not None and "experts" not in self.block_kinds:
            raise ConfigError(
                f"experts.every: got {self.experts.every} for depth = {self.depth}, which leaves no block with experts "
                f"(the last never has any); needed less than depth, or experts: null"
            )
        if self.experts is not None and self.share_mlp:
            raise ConfigError("experts: cannot be combined with share_mlp")
        if self.share_attention and self.image_dim is not None:
            raise ConfigError("share_attention: cannot be combined with image_dim")

    @property
    def text_join(self) -> Literal["tokens", "channels"]:
        """Along what the embeddings of several text encoders are joined."""
        return "tokens" if self.text_parts else "channels"

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def head_split(self) -> tuple[int, int, int]:
        """Channels of an attention head rotated by (t, h, w)."""
        return self.rope_split or default_rope_split(self.head_dim)

    @property
    def wide_head_split(self) -> tuple[int, int, int]:
        """Channels of an attention head of ``head`` rotated by (t, h, w): shared among the axes as in the blocks."""
        assert self.head is not None
        head_dim = self.head.width // self.head.num_heads
        if self.rope_split is None:
            return default_rope_split(head_dim)
        height, width = (2 * round(part * head_dim / self.head_dim / 2) for part in self.rope_split[1:])
        return head_dim - height - width, height, width

    @property
    def folds_text(self) -> bool:
        """Whether the padding of a text is computed as one token that counts as many: cross-attention alone sees it."""
        return self.text_length is not None and self.text_stream == "cross" and not self.pooled_text

    @property
    def mlp_hidden(self) -> int:
        """Width of the perceptron: of the SwiGLU's gate, or between the two products of a plain one."""
        return self.hidden_of(self.width)

    def hidden_of(self, width: int) -> int:
        """Width of the perceptron of blocks of a width."""
        if self.mlp_width is not None and width == self.width:
            return self.mlp_width
        share = 2 / 3 if self.mlp == "swiglu" else 1
        steps = round(share * self.mlp_ratio * width / self.mlp_multiple)
        return max(1, steps) * self.mlp_multiple

    @property
    def patch_cells(self) -> int:
        """Latent cells of one patch."""
        return prod(self.patch)

    @property
    def in_channels(self) -> int:
        """Channels of the input: of the latents, and of known latents and their mask beside them."""
        beside = self.latent_channels + self.frame_mask_channels if self.frames == "channels" else 0
        return self.latent_channels + beside

    @property
    def out_channels(self) -> int:
        """Channels of the output, with those of a variance."""
        return self.latent_channels * (2 if self.learn_sigma else 1)

    @property
    def patch_dim(self) -> int:
        """Features of one patch of the input."""
        return self.in_channels * self.patch_cells

    @property
    def block_kinds(self) -> tuple[str, ...]:
        """Kind of each block in order: dual, experts or plain."""

        def kind(index: int) -> str:
            if index < self.dual_depth:
                return "dual"
            chosen = self.experts is not None and (index + 1) % self.experts.every == 0
            return "experts" if chosen and index < self.depth - 1 else "plain"

        return tuple(kind(index) for index in range(self.depth))
