"""Diffusion transformer over (t, h, w) tokens of image and video latents of any size: one model for the whole family.

A plain single-device model: it knows nothing of processes, precision policies or training. Parallelism enters through
four attributes (``attend`` of attentions, ``Dit.shard_tokens``, ``Dit.gather_tokens``, ``Dit.shard_lengths``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.denoisers.alignment import TokenProjector
from ltd.denoisers.blocks import (
    DitBlock,
    DualBlock,
    FinalLayer,
    SharedParts,
    TokenContext,
)
from ltd.denoisers.checks import check_inputs
from ltd.denoisers.conditioning import Conditioning, Frames, Prepared
from ltd.denoisers.config import DitConfig
from ltd.denoisers.embeddings import (
    BlockEmbedding,
    WideHead,
    place_embedding,
    rotations,
    text_embedding,
    time_embedding,
)
from ltd.denoisers.modulation import BlockModulation, TableModulation, of_tokens
from ltd.denoisers.steps import Tables, step_conditions
from ltd.denoisers.tokens import (
    Text,
    Tokens,
    fold_padding,
    frame_input,
    join_prefix,
    kept_places,
    levels_of,
    levels_of_pack,
    put_back,
    scaled_positions,
    strip_prefix,
    take_tokens,
)
from ltd.nn import seams
from ltd.nn.attention import CrossAttention
from ltd.nn.embed import (
    ImageEmbedding,
    LabelEmbedding,
    ScalarEmbedding,
    TextPartsEmbedding,
    TimeEmbedding,
    masked_mean,
)
from ltd.nn.moe import ExpertChoice
from ltd.nn.packing import Packing, Segments, mean_by_sample, pack_latents, pack_text, unpack_latents
from ltd.nn.patch import grid_positions, patchify, token_grid, unpatchify
from ltd.shapes import VideoShape

Tap = Callable[[Tensor], None]


class Dit(nn.Module):
    """Predict the velocity of noisy latents: patches, blocks of full attention over (t, h, w), patches.

    At the start the output is exactly zero and every block is the identity.

    Reference: Peebles and Xie (2022), arXiv 2212.09748; Yao et al. (2025), LightningDiT, arXiv 2501.01423; the other
    members of the family are configurations (``docs/denoiser.md``).

    Args:
        config: Size and options.
    """

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        self.shard_tokens = seams.shard_tokens
        self.gather_tokens = seams.gather_tokens
        self.shard_lengths = seams.shard_lengths
        self.needs_all_tokens = config.mixer_depth > 0
        d = config.width
        self.patch_embedding = nn.Linear(config.patch_dim, d)
        self.time_embedding: TimeEmbedding | None = None
        self.label_embedding: LabelEmbedding | None = None
        self.block_embeddings: nn.ModuleList | None = None
        if config.embed_per_block:
            self.block_embeddings = nn.ModuleList(BlockEmbedding(config) for _ in range(config.depth))
        else:
            self.time_embedding = time_embedding(config, d)
            self.label_embedding = LabelEmbedding(config.num_classes, d) if config.num_classes else None
        self.scalar_embedding = ScalarEmbedding(len(config.scalars), d) if config.scalars else None
        self.text_embedding = text_embedding(config)
        self.text_pooling = nn.Linear(d, d) if config.pooled_text else None
        self.image_embedding = ImageEmbedding(config.image_dim, d, config.image_positions) if config.image_dim else None
        self.registers = nn.Parameter(torch.empty(config.registers, d)) if config.registers else None
        self.modulation = nn.Linear(d, 6 * d) if config.modulation == "shared" else None
        self.shared = SharedParts(config) if config.share_attention or config.share_mlp else None
        self.blocks = nn.ModuleList(
            DualBlock(config) if kind == "dual" else DitBlock(config, experts=kind == "experts", shared=self.shared)
            for kind in config.block_kinds
        )
        self.head = WideHead(config) if config.head else None
        self.final = FinalLayer(config, config.out_channels * config.patch_cells)
        #: What only training needs: a projection of one block's tokens; never exported.
        self.alignment: TokenProjector | None = None
        self._tables = Tables()
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw every parameter: Xavier-uniform products, small embeddings, zeros where a branch joins the stream."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, ExpertChoice):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, TimeEmbedding):
                nn.init.normal_(module.input.weight, std=0.02)
                nn.init.normal_(module.output.weight, std=0.02)
            elif isinstance(module, BlockModulation):
                nn.init.zeros_(module.linear.weight)
            elif isinstance(module, TableModulation):
                nn.init.zeros_(module.table)
            elif isinstance(module, CrossAttention):
                nn.init.zeros_(module.out.weight)
        for last in (self.final.linear, self.modulation):
            if last is not None:
                nn.init.zeros_(last.weight)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)

    def decay_groups(self) -> dict[str, list[str]]:
        """Name the parameters that weight decay applies to: weights of products, nothing else.

        Returns:
            ``{"decay": names, "no_decay": names}``; biases, norms, embeddings and tables are not decayed.
        """
        decay = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        for name, module in self.named_modules():
            if isinstance(module, ExpertChoice):
                decay |= {f"{name}.input", f"{name}.out"}
        names = [name for name, _ in self.named_parameters()]
        return {"decay": [n for n in names if n in decay], "no_decay": [n for n in names if n not in decay]}

    def forward(
        self,
        x_t: Tensor | Sequence[Tensor],
        t: Tensor,
        cond: Conditioning | None = None,
        tap: Tap | None = None,
    ) -> Tensor | list[Tensor]:
        """Predict the velocity ``eps - x0``.

        Args:
            x_t: Noisy latents ``(b, c, t, h, w)``, any float dtype; or b samples ``(c, t, h, w)`` of any sizes, which
                run as one sequence without padding and do not see each other.
            t: Times ``(b,)`` in [0, 1]; 0 is data, 1 is noise. For latents of one size also ``(b, t)``: one for every
                latent frame.
            cond: Conditions; None, or a missing field, is the null condition.
            tap: Is given the projected tokens of ``alignment``, ``(b, n, features)``: of the patches alone, all of them
                on every process; ``(1, n, features)`` of samples, one behind the other. What is returned does not
                depend on it.

        Returns:
            The velocity in the shapes and dtypes of ``x_t``; a list where ``x_t`` is samples.

        Raises:
            ValueError: If the latents do not fit the patch or the channels, or the conditions do not fit the model,
                or a tap is given to a model without ``alignment``.
        """
        cond = cond or Conditioning()
        check_inputs(self.config, x_t, t, cond)
        if tap is not None and self.alignment is None:
            raise ValueError("tap: the model projects no tokens; needed its alignment")
        dtype, patch, config = self.patch_embedding.weight.dtype, self.config.patch, self.config
        if isinstance(x_t, Tensor):
            grid = token_grid(VideoShape(*x_t.shape[2:]), patch)
            frames = cond.frames if isinstance(cond.frames, Frames) else None
            times, levels = levels_of(t, frames if config.frames == "times" else None, patch, grid)
            noisy = frame_input(x_t.to(dtype), frames, config.frames, config.frame_mask_channels)
            positions = grid_positions(grid, x_t.device)
            tokens = self._patches(patchify(noisy, patch), positions, [grid], levels=levels, grid=grid)
            out = self._run(tokens, times, cond, tap)
            return self._velocity(unpatchify(out, grid, patch), x_t, t)
        known = cond.frames if isinstance(cond.frames, tuple) else None
        inputs = [
            frame_input(x.to(dtype)[None], frames, config.frames, config.frame_mask_channels)[0]
            for x, frames in zip(x_t, known or (None,) * len(x_t), strict=True)
        ]
        patches, positions, lengths = pack_latents(inputs, patch)
        shapes = [(x.shape[1], x.shape[2], x.shape[3]) for x in x_t]
        grids = [token_grid(VideoShape(*shape), patch) for shape in shapes]
        times, levels = levels_of_pack(t, known if config.frames == "times" else None, patch, grids)
        given = {"lengths": lengths, "levels": levels, "num_levels": times.shape[1]}
        out = self._run(self._patches(patches, positions, grids, **given), times, cond, tap)
        predictions = unpack_latents(out, shapes, patch)
        samples = zip(predictions, x_t, t.split(1), strict=True)
        return [self._velocity(p.unsqueeze(0), x.unsqueeze(0), time).squeeze(0) for p, x, time in samples]

    def prepare(self, cond: Conditioning) -> Conditioning:
        """Compute what text and image give once, for many calls with the same conditions.

        Args:
            cond: Conditions of a batch of latents of one size.

        Returns:
            The same conditions for this model; calls with them give the same result, sooner. As they are where the
            model reads no text by cross-attention, or none is given.
        """
        if self.text_embedding is None or self.config.text_stream != "cross" or cond.text is None:
            return cond
        cond = dataclasses.replace(cond, prepared=None)
        text, image = self._text(cond, cond.batch_size or 0, packed=False), self._image(cond)
        assert text.tokens is not None
        blocks = [block for block in self.blocks if isinstance(block, DitBlock)]
        keys = tuple(block.text_keys(text.tokens, image) for block in blocks)
        read = dataclasses.replace(text, tokens=None)
        return dataclasses.replace(cond, prepared=Prepared(read, keys, self._pooled(text)))

    def prepare_steps(self, cond: Conditioning, times: Tensor) -> list[Conditioning]:
        """Compute once what ``prepare`` does, and what modulates the blocks at every step of a sampler.

        All times go through the time embedding and through every modulation in one product each. Where the result
        would take more than ``steps.MAX_STEP_ELEMENTS`` numbers, that part is left to the steps.

        Args:
            cond: Conditions of a batch of latents of one size.
            times: The times ``(k,)`` that the model will be asked about, any dtype and device.

        Returns:
            Conditions for each time; a call with another time than theirs is wrong, and refused where that costs no
            wait for a device.
        """
        if self.text_embedding is not None and cond.text is None:
            return [cond] * len(times)
        ready = self.prepare(cond)
        if ready.prepared is None:
            text = self._text(ready, cond.batch_size or 0, packed=False)
            ready = dataclasses.replace(ready, prepared=Prepared(text, pooled=self._pooled(text)))
        dual = sum(isinstance(block, DualBlock) for block in self.blocks)
        steps = step_conditions(
            self._modulations,
            ready,
            times,
            vectors=8 if self.modulation is not None else 6 * (len(self.blocks) + dual) + 2,
            known=self.config.frames == "times" and cond.frames is not None,
            like=self.patch_embedding.weight,
        )
        if steps is None:
            return [ready] * len(times)
        assert ready.prepared is not None
        made = [dataclasses.replace(ready.prepared, step=step) for step in steps]
        return [dataclasses.replace(ready, prepared=one) for one in made]

    def _modulations(self, times: Tensor, cond: Conditioning) -> tuple[tuple[Any, ...], tuple[Tensor, ...] | None]:
        """Compute what modulates every block, or all, and the last layer at times ``(b, k)``."""
        shared, last = self._modulation_inputs(self._condition(times, cond, Text()))
        made: list[Any] = shared
        if self.modulation is None:
            blocks: Any = self.blocks
            made = [block.modulations(shared[min(i, len(shared) - 1)]) for i, block in enumerate(blocks)]
        return tuple(made), None if self.head is not None else tuple(self.final.modulation(last))

    def _patches(self, x: Tensor, positions: Tensor, grids: Sequence[tuple[int, int, int]], **given: Any) -> Tokens:
        base = self.config.position_base
        if self.config.position_scale != (1.0, 1.0, 1.0):
            positions = positions * positions.new_tensor(self.config.position_scale)
        places = None if base is None else scaled_positions(grids, base, positions)
        return Tokens(x, positions, places, **given)

    def _run(self, tokens: Tokens, times: Tensor, cond: Conditioning, tap: Tap | None) -> Tensor:
        """Map patches ``(b, n, patch_dim)`` with times ``(b, k)`` to what the last layer predicts of them."""
        config = self.config
        text = self._text(cond, len(times), packed=tokens.lengths is not None)
        step = None if cond.prepared is None else cond.prepared.step
        shared: Sequence[Any]
        last: Any
        if step is None:
            embedded = self._condition(times, cond, text)  # b k d each, one or one per block
            if tokens.lengths is not None and tokens.levels is not None:
                embedded = [vector.flatten(0, 1).unsqueeze(0) for vector in embedded]  # 1 (b k) d
            shared, last = self._modulation_inputs(embedded)
        else:
            shared, last = step.blocks, step.final
        inputs = tokens if self.head is None else tokens.map(self.shard_tokens)
        tokens, context = self._embed(tokens, text)
        if config.text_stream == "cross":
            image = self._image(cond)
            context = dataclasses.replace(
                context, text=text.tokens, text_mask=text.mask, text_repeats=text.repeats, image=image
            )
        x, num_tokens, places = tokens.x, tokens.x.shape[1], None
        for index, block in enumerate(self.blocks):
            if index == config.mixer_depth and cond.kept is not None:
                places = kept_places(cond.kept, tokens)
                x, context = take_tokens(x, places), context.take(places)
            keys = () if cond.prepared is None or not cond.prepared.keys else (cond.prepared.keys[index],)
            x = block(x, shared[min(index, len(shared) - 1)], context, *keys)
            if tap is not None and self.alignment is not None and index + 1 == self.alignment.block:
                tap(strip_prefix(self.gather_tokens(self.alignment(x)), tokens))
        if self.head is not None:
            x, condition = self.head(x, self._time_of_tokens(times, context), inputs, context)
            return self.gather_tokens(self.final(x, condition))
        out = self.final(x, last, context.levels, context.lengths)
        out = out if places is None else put_back(out, places, num_tokens)
        return strip_prefix(self.gather_tokens(out), tokens)  # b n patch_dim

    def _embed(self, tokens: Tokens, text: Text) -> tuple[Tokens, TokenContext]:
        """Make patches tokens of the model's width, with the prefix before them, and take this process's part."""
        config = self.config
        joint = config.text_stream == "joint"
        whole = joint or self.registers is not None  # else each process embeds its own patches only
        if not whole:
            tokens = tokens.map(self.shard_tokens)
        x = self.patch_embedding(tokens.x)
        wide = torch.promote_types(x.dtype, torch.float32)
        places = self._kept(tokens, wide, place_embedding)
        x = x if places is None else x + places.to(x.dtype)
        tokens = dataclasses.replace(tokens, x=x)
        if whole:
            tokens = join_prefix(tokens, self.registers, text if joint else Text())
            tokens = tokens.map(self.shard_tokens)
        cos = sin = None
        if config.rotary:
            cos, sin = self._kept(tokens, wide, rotations)
        packing = None
        if tokens.lengths is not None:
            local = self.shard_lengths(tokens.lengths)
            reads = Segments(local, text.counts) if text.counts is not None and not joint else None
            packing = Packing(Segments(tokens.lengths, tokens.lengths), local, reads)
        streams = None if tokens.streams is None else self.shard_lengths(tokens.streams)
        return tokens, TokenContext(
            cos, sin, levels=tokens.levels, key_mask=tokens.key_mask, packing=packing, streams=streams
        )

    def _kept(self, tokens: Tokens, dtype: torch.dtype, make: Callable[..., Any]) -> Any:
        """Make a table of the positions once per grid of tokens; in a pack, each time."""
        key = None
        if tokens.grid is not None and type(tokens.positions) is Tensor:  # a tracer's stand-in must not stay
            device = tokens.positions.device
            key = (make.__name__, tokens.grid, tokens.prefix, dtype, device, self.shard_tokens)
        return self._tables(key, lambda: make(self.config, tokens, dtype))

    def _modulation_inputs(self, embedded: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Make what the blocks, one or each, and the last layer are modulated by of what ``_condition`` gave."""
        conditions = [F.silu(vector) for vector in embedded]
        shared = [vector if self.modulation is None else self.modulation(vector) for vector in conditions]
        table = self.config.final_modulation == "table"
        return shared, embedded[0].repeat(1, 1, 2) if table else conditions[0]

    def _condition(self, times: Tensor, cond: Conditioning, text: Text) -> list[Tensor]:
        """Embed times ``(b, k)`` and what else modulates, ``(b, k, d)``: once, or with the weights of every block."""
        label = cond.label
        if label is None:
            label = torch.full((len(times),), -1, dtype=torch.long, device=times.device)
        if self.block_embeddings is not None:
            return [layer(times, label) for layer in self.block_embeddings]
        assert self.time_embedding is not None
        vector = self.time_embedding(times.flatten()).unflatten(0, times.shape)
        if self.label_embedding is not None:
            vector = vector + self.label_embedding(label).unsqueeze(1)
        if self.scalar_embedding is not None and cond.scalars is not None:
            vector = vector + self.scalar_embedding(cond.scalars).to(vector.dtype).unsqueeze(1)
        pooled = self._pooled(text) if cond.prepared is None else cond.prepared.pooled
        return [vector if pooled is None else vector + pooled.unsqueeze(1)]

    def _time_of_tokens(self, times: Tensor, context: TokenContext) -> Tensor:
        """Embed the time of every token, ``(b, 1 or n, d)``."""
        assert self.time_embedding is not None
        vectors = self.time_embedding(times.flatten()).unflatten(0, times.shape)
        if context.packing is not None and context.levels is not None:
            return of_tokens([vectors.flatten(0, 1).unsqueeze(0)], context.levels)[0]
        if context.packing is not None:
            counts = torch.tensor(context.packing.lengths, device=times.device)
            return vectors.flatten(0, 1).repeat_interleave(counts, 0).unsqueeze(0)
        return of_tokens([vectors], context.levels)[0]

    def _text(self, cond: Conditioning, rows: int, *, packed: bool) -> Text:
        """Bring the text to the model's width and say which of it is read."""
        if self.text_embedding is None:
            return Text()
        if cond.prepared is not None:
            found: Text = cond.prepared.text
            return found
        weight, length = self.patch_embedding.weight, self.config.text_length
        embed: Callable[[Tensor], Tensor] = self.text_embedding
        tokens, mask = cond.text, cond.text_mask
        parts = self.text_embedding if isinstance(self.text_embedding, TextPartsEmbedding) else None
        if tokens is None or mask is None:
            missing = int(not self.config.folds_text) if parts is None else parts.num_tokens
            tokens = weight.new_zeros(rows, missing, self.text_embedding.text_dim)
            mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=weight.device)
        if parts is not None:  # here, while places still tell the encoder
            tokens, embed = parts(tokens), _as_is
        if length is not None and self.config.folds_text:
            folded = fold_padding(tokens, mask, length, packed=packed)
            assert folded.tokens is not None
            return dataclasses.replace(folded, tokens=embed(folded.tokens))
        if length is not None:
            tokens = F.pad(torch.where(mask[..., None], tokens, 0), (0, 0, 0, length - tokens.shape[1]))
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if packed else None
        if not packed or mask is None:
            return Text(embed(tokens), mask)
        if self.config.text_stream == "joint":
            return Text(embed(tokens[mask].unsqueeze(0)), counts=tuple(mask.sum(1).tolist()))
        tokens, counts, kept = pack_text(tokens, mask)
        return Text(embed(tokens), kept, counts)

    def _pooled(self, text: Text) -> Tensor | None:
        """Average and project the text, ``(b, d)``."""
        if self.text_pooling is None or text.tokens is None:
            return None
        if text.counts is not None:
            return self.text_pooling(mean_by_sample(text.tokens, text.counts, text.mask))
        mask = text.mask if text.mask is not None else text.tokens.new_ones(text.tokens.shape[:2], dtype=torch.bool)
        return self.text_pooling(masked_mean(text.tokens, mask))

    def _image(self, cond: Conditioning) -> Tensor | None:
        if self.image_embedding is None or cond.image is None or (cond.prepared is not None and cond.prepared.keys):
            return None
        return self.image_embedding(cond.image)

    def _velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Turn what the last layer predicts into the velocity, in at least fp32 and then the dtype of ``x_t``.

        Reference: Li and He (2025), Back to Basics, arXiv 2511.13720 (x-prediction with v-loss).
        """
        prediction = prediction[:, : x_t.shape[1]]  # without the variance
        if self.config.prediction == "velocity":
            return prediction.to(x_t.dtype)
        wide = torch.promote_types(x_t.dtype, torch.float32)
        time = t.to(wide).clamp(min=self.config.min_time).reshape(len(t), 1, -1, 1, 1)
        return ((x_t.to(wide) - prediction.to(wide)) / time).to(x_t.dtype)


def _as_is(x: Tensor) -> Tensor:
    return x
