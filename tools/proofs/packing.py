"""Samples of different sizes in one sequence against the same one by one, and against padding: error and speed."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.denoisers import Conditioning, Dit, DitConfig, Frames, FrameTasksConfig, draw_tasks, told
from ltd.denoisers.blocks import TokenContext
from ltd.denoisers.tokens import Text, Tokens
from ltd.diffusion import FlowMatching, FlowMatchingConfig, ShiftConfig
from ltd.nn.attention import attend
from ltd.nn.packing import Segments, pack_latents
from ltd.rng import DrawRandom, generator
from tools.proofs.table import Cell, Proof, markdown_table

NAME = "packing"
LIMIT = 1e-5
ROUNDS = 5
CHANNELS, PATCH, TEXT_DIM, TEXT_LENGTH = 8, (1, 2, 2), 32, 16
#: Latent cells (t, h, w): images and clips, some of one size, some with an odd number of tokens (patch 1x2x2).
MIXES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "images of 3 aspects": ((1, 8, 14), (1, 14, 8), (1, 10, 10), (1, 8, 14)),
    "clips of 3 durations": ((3, 6, 10), (9, 6, 10), (5, 10, 6)),
    "images and clips": ((1, 8, 14), (5, 6, 10), (1, 8, 14), (3, 6, 6), (9, 6, 10), (1, 2, 2)),
}
MODELS: dict[str, dict[str, Any]] = {
    "per-block modulation": {},
    "shared modulation": {"modulation": "shared"},
    "text": {"text_dim": TEXT_DIM},
    "text, pooled, shared, predicts data": {
        "text_dim": TEXT_DIM,
        "pooled_text": True,
        "modulation": "shared",
        "prediction": "data",
    },
    "known frames by times": {"frames": "times", "text_dim": TEXT_DIM},
    "known frames by channels": {"frames": "channels", "text_dim": TEXT_DIM},
}
#: What is known of the samples of the last two.
TASKS = FrameTasksConfig(image_to_video=0.25, interpolation=0.25, retrodiction=0.25, inpainting=0.25)

NOTES = f"""
**Equality** (fp32, a DiT of width 64 and 3 blocks, every parameter redrawn so that no layer is zero, flow matching with
a time shift by each sample's size). *loss* is the largest relative difference of a sample's loss, *gradient* the
relative L2 difference of the gradient of the summed loss, between one call with the list of samples and one call per
sample with the same draws. Texts have 0 to {TEXT_LENGTH} real tokens; one sample has none. With known frames, each
sample has a task drawn for it (first frame, every second to fourth, the last ones, around a hole), and only cells that
are not known count. Limit {LIMIT:g}. Four rows are wrong on purpose and must fail.

**Speed** (fp32, width 256, 6 blocks with text, patch 1x2x2, forward and backward, one thread): tokens of samples per
second of this process's CPU time, median of {ROUNDS} rounds (smallest to largest). Every round draws another batch of
8: half images of 1x16x28 cells, half clips of 3 to 9 latent frames at 16x28, 12x20 or 8x14 cells, and runs all ways
on that batch, in an order that turns from round to round; *against padded* is the median of the rounds' own ratios.
*padded* is the usual way: every sample is filled up to the longest of its batch, keys of the filling are masked in
attention, and the loss leaves it out; its loss and gradient are held to the limit above too, so all ways compute the
same. *filling* is the share of tokens that padding adds. Limit: packed is not slower than padded.

Not shown: CUDA, where attention runs through flash-attn's kernels for packs, and batches of one shape (buckets), which
need no filling but see one size a step.
"""


@dataclass(frozen=True)
class Samples:
    """Latents of some sizes, their conditions, and the random numbers of their draws."""

    latents: list[Tensor]
    cond: Conditioning
    random: DrawRandom
    #: Cells that count in the loss ``(t, h, w)``; None = all.
    cells: list[Tensor] | None = None

    def alone(self, index: int) -> tuple[Tensor, Conditioning, DrawRandom]:
        """Take one sample as a batch of one."""
        draw = DrawRandom(self.random.seed, [self.random.draws[index]])
        cond = self.cond.select(slice(index, index + 1))
        if isinstance(cond.frames, tuple):
            cond = dataclasses.replace(cond, frames=cond.frames[0])
        return self.latents[index].unsqueeze(0), cond, draw


def draw_samples(sizes: Sequence[tuple[int, int, int]], *, text: bool, seed: int = 0) -> Samples:
    """Draw latents of the given sizes and, where asked for, texts of 0 to ``TEXT_LENGTH`` tokens, the last empty."""
    source = generator(seed, "proof", "packing")
    latents = [torch.randn(CHANNELS, *size, generator=source) for size in sizes]
    cond = Conditioning()
    if text:
        counts = torch.randint(0, TEXT_LENGTH + 1, (len(sizes),), generator=source)
        counts[-1] = 0
        embeddings = torch.randn(len(sizes), TEXT_LENGTH, TEXT_DIM, generator=source)
        cond = Conditioning(text=embeddings, text_mask=torch.arange(TEXT_LENGTH) < counts[:, None])
    return Samples(latents, cond, DrawRandom(seed, range(len(sizes))))


def give_frames(samples: Samples, mode: str) -> Samples:
    """Make a part of every sample known, by a task that is drawn for it; it does not count in the loss."""
    frames, cells = [], []
    for index, x in enumerate(samples.latents):
        x0, _, random = samples.alone(index)
        mask, _ = draw_tasks(TASKS, (x.shape[1], x.shape[2], x.shape[3]), PATCH, random)
        frames.append(told(Frames(x0, mask), mode, 1))
        cells.append(~mask[0, 0])
    return dataclasses.replace(samples, cond=dataclasses.replace(samples.cond, frames=tuple(frames)), cells=cells)


def build_model(width: int, depth: int, **options: Any) -> Dit:
    """Make a DiT with every parameter redrawn, so that no layer is zero."""
    torch.manual_seed(0)
    heads = width // 32
    model = Dit(DitConfig(latent_channels=CHANNELS, patch=PATCH, width=width, depth=depth, num_heads=heads, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def objective() -> FlowMatching:
    """Make the objective of every row; the shift tells whose size was used."""
    return FlowMatching(FlowMatchingConfig(shift=ShiftConfig(base_cells=64)))


def packed(model: Callable[..., Any], samples: Samples) -> Tensor:
    """Compute the losses ``(b,)`` in one call with the list of samples, and their gradient."""
    losses, _ = objective().loss(model, samples.latents, samples.cond, samples.random, cell_weight=samples.cells)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    return losses.detach()


def one_by_one(model: Callable[..., Any], samples: Samples) -> Tensor:
    """Compute the losses ``(b,)`` and their gradient with one call per sample."""
    losses = []
    for index in range(len(samples.latents)):
        x0, cond, random = samples.alone(index)
        cells = None if samples.cells is None else samples.cells[index].unsqueeze(0)
        loss, _ = objective().loss(model, x0, cond, random, cell_weight=cells)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return torch.cat(losses)


def padded(model: Dit, samples: Samples) -> Tensor:
    """Compute the losses ``(b,)`` and their gradient with every sample filled up to the longest of the batch."""
    cut = [pack_latents([x], PATCH) for x in samples.latents]
    lengths = [length for _, _, (length,) in cut]
    fill = lambda x: F.pad(x, (0, 0, 0, max(lengths) - x.shape[1]))  # noqa: E731
    positions = torch.cat([fill(places) for _, places, _ in cut])
    keep = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def denoise(x_t: list[Tensor], t: Tensor, cond: Conditioning) -> list[Tensor]:
        patches = torch.cat([fill(pack_latents([x], PATCH)[0]) for x in x_t])
        return list(model._run(Tokens(patches, positions), t[:, None], cond, None))

    # The objective's own times and noise; its velocity and mean are taken on patches, where the filling is.
    seen: list[tuple[list[Tensor], Tensor]] = []

    def spy(x_t: list[Tensor], t: Tensor, cond: Conditioning) -> list[Tensor]:
        seen.append((x_t, t))
        return x_t

    objective().loss(spy, samples.latents, samples.cond, samples.random)
    (x_t, t), noise = seen[0], [samples.alone(i)[2].normal(x.shape, "noise")[0] for i, x in enumerate(samples.latents)]
    velocity = torch.cat([fill(pack_latents([e - x], PATCH)[0]) for e, x in zip(noise, samples.latents, strict=True)])
    for block in model.blocks:
        block.attention.attend = functools.partial(attend, key_mask=keep)
    try:
        error = torch.stack(denoise(x_t, t, samples.cond)) - velocity
    finally:
        for block in model.blocks:
            block.attention.attend = attend
    squares = torch.where(keep[..., None], error.square(), 0).mean(2).sum(1)
    losses = squares / torch.tensor(lengths)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    return losses.detach()


WAYS: dict[str, Callable[[Dit, Samples], Tensor]] = {"packed": packed, "padded": padded, "one by one": one_by_one}


def gradient_of(model: Dit) -> Tensor:
    """Take the gradient out of the model, as one vector."""
    flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    model.zero_grad()
    return torch.cat(flat)


def errors(model: Dit, samples: Samples, way: Callable[[Dit, Samples], Tensor]) -> tuple[float, float]:
    """Measure a way against one by one: largest relative error of a loss, relative L2 error of the gradient."""
    losses, gradient = one_by_one(model, samples), gradient_of(model)
    other, other_gradient = way(model, samples), gradient_of(model)
    return float(((other - losses) / losses).abs().max()), float((other_gradient - gradient).norm() / gradient.norm())


def neighbours_time(model: Dit, samples: Samples) -> Tensor:
    """Go wrong: every sample is told the next one's time."""
    return packed(lambda x_t, t, cond: model(x_t, t.roll(1), cond), samples)


def moved_boundary(model: Dit, samples: Samples) -> Tensor:
    """Go wrong: the first sample's attention takes one token of the second."""
    genuine = model._embed

    def moved(tokens: Tokens, text: Text) -> tuple[Tokens, TokenContext]:
        tokens, context = genuine(tokens, text)
        packing = context.packing
        assert packing is not None
        lengths = packing.attention.q_lengths
        wrong = (lengths[0] + 1, lengths[1] - 1, *lengths[2:])
        packing = dataclasses.replace(packing, attention=Segments(wrong, wrong))
        return tokens, dataclasses.replace(context, packing=packing)

    model._embed = moved  # type: ignore[method-assign]
    try:
        return packed(model, samples)
    finally:
        del model._embed


def neighbours_frames(model: Dit, samples: Samples) -> Tensor:
    """Go wrong: the tokens of every sample that are known have the next sample's time, not 0."""
    genuine = model._run

    def wrong(tokens: Tokens, times: Tensor, cond: Conditioning, tap: Any) -> Tensor:
        return genuine(tokens, torch.stack((times[:, 0], times[:, 0].roll(1)), 1), cond, tap)

    model._run = wrong  # type: ignore[method-assign]
    try:
        return packed(model, samples)
    finally:
        del model._run


def summed(model: Dit, samples: Samples) -> Tensor:
    """Go wrong: every sample counts by its size, as a mean over all tokens of the pack would have it."""
    sizes = torch.tensor([float(x.numel()) for x in samples.latents])
    losses, _ = objective().loss(model, samples.latents, samples.cond, samples.random, cell_weight=samples.cells)
    losses = losses * sizes / sizes.mean()
    losses.sum().backward()  # type: ignore[no-untyped-call]
    return losses.detach()


def num_tokens(samples: Samples) -> list[int]:
    """Count the tokens of each sample."""
    return list(pack_latents(samples.latents, PATCH)[2])


def equality_rows(mixes: Sequence[str], models: Sequence[str]) -> tuple[list[list[Cell]], list[str]]:
    """Measure packed against one by one for every mix and model, and three wrong ways on the last of them.

    Args:
        mixes: Keys of ``MIXES``.
        models: Keys of ``MODELS``.

    Returns:
        Rows and misses.
    """
    rows: list[list[Cell]] = []
    misses = []
    for mix in mixes:
        for name in models:
            last = (mix, name) == (mixes[-1], models[-1])
            model = build_model(64, 3, **MODELS[name])
            samples = draw_samples(MIXES[mix], text="text_dim" in MODELS[name])
            mode = MODELS[name].get("frames")
            samples = samples if mode is None else give_frames(samples, mode)
            wrong = (neighbours_time, moved_boundary, summed) if last else ()
            wrong = (*wrong, neighbours_frames) if mode == "times" and mix == mixes[-1] else wrong
            wrong_ways: dict[str, Callable[[Dit, Samples], Tensor]] = {w.__name__.replace("_", " "): w for w in wrong}
            for way, run in ({"packed": packed} | wrong_ways).items():
                loss, gradient = errors(model, samples, run)
                holds = max(loss, gradient) <= LIMIT
                title = f"{mix}; {name}"
                if way == "packed" and not holds:
                    misses.append(f"{title}: loss {loss:.3g}, gradient {gradient:.3g}, needed {LIMIT:g}")
                if way != "packed" and holds:
                    misses.append(f"{title}: {way} passed, but is wrong")
                verdict = (
                    ("holds" if holds else "FAILS") if way == "packed" else "PASSES" if holds else "fails, as it must"
                )
                rows.append([way, title, len(samples.latents), sum(num_tokens(samples)), loss, gradient, verdict])
    return rows, misses


def mixed_batch(round_index: int) -> Samples:
    """Draw the batch of a round: 8 samples, half images, half clips of 3 to 9 latent frames at 3 resolutions."""
    source = generator(round_index, "proof", "sizes")
    pick = lambda low, high: int(torch.randint(low, high, (), generator=source))  # noqa: E731
    clips = [(pick(3, 10), *((16, 28), (12, 20), (8, 14))[pick(0, 3)]) for _ in range(4)]
    return draw_samples([(1, 16, 28)] * 4 + clips, text=True, seed=round_index)


def speed_rows(width: int = 256, depth: int = 6, rounds: int = ROUNDS) -> tuple[list[list[Cell]], list[str]]:
    """Measure tokens of samples per CPU second of all ways, in interleaved rounds.

    Args:
        width: Of the DiT.
        depth: Of the DiT.
        rounds: How many batches; one more comes first to warm up.

    Returns:
        Rows and misses.
    """
    model = build_model(width, depth, text_dim=TEXT_DIM)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    real, filled = 0, 0
    wrong = {way: errors(model, mixed_batch(0), WAYS[way]) for way in ("packed", "padded")}  # warms up too
    for index in range(rounds):
        samples = mixed_batch(index)
        tokens = num_tokens(samples)
        real, filled = real + sum(tokens), filled + max(tokens) * len(tokens)
        ways = list(WAYS)
        for way in ways[index % 3 :] + ways[: index % 3]:
            start = time.process_time()
            WAYS[way](model, samples)
            rates[way].append(sum(tokens) / (time.process_time() - start))
            model.zero_grad()
    misses = [
        f"{way} at width {width}: loss {loss:.3g}, gradient {gradient:.3g}, needed {LIMIT:g}"
        for way, (loss, gradient) in wrong.items()
        if not max(loss, gradient) <= LIMIT
    ]
    rows: list[list[Cell]] = []
    for way, found in rates.items():
        ratios = [a / b for a, b in zip(found, rates["padded"], strict=True)]
        ratio = statistics.median(ratios)
        if way == "packed" and not ratio >= 1:
            misses.append(f"packed runs at {ratio:.3g} of padded's tokens per CPU second, needed 1")
        filling = 1 - real / filled if way == "padded" else 0.0
        spread = f"{statistics.median(found):.0f} ({min(found):.0f} to {max(found):.0f})"
        against = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([way, spread, against, f"{filling:.0%}", *wrong.get(way, (None, None))])
    return rows, misses


def measure() -> Proof:
    """Measure both parts on one thread.

    Returns:
        The table of equality; the table of speed stands first in its notes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, misses = equality_rows(list(MIXES), list(MODELS))
        speed, slow = speed_rows()
    finally:
        torch.set_num_threads(threads)
    columns = ("way", "mix and model", "samples", "tokens", "loss", "gradient", "verdict")
    speed_columns = ("way", "tokens per CPU second", "against padded", "filling", "loss", "gradient")
    notes = f"{markdown_table(speed_columns, speed)}\n{NOTES}"
    return Proof("Samples of different sizes in one sequence", columns, rows, misses + slow, notes)


def main() -> int:
    """Measure and write ``docs/proofs/packing.md``; return 1 on a miss."""
    from tools.proofs.__main__ import main as run_proofs

    return run_proofs([NAME])


if __name__ == "__main__":
    sys.exit(main())
