"""Strips of one decode on 2 and 4 gloo processes, all worlds side by side; every process writes what it measured."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltd.autoencoders import Autoencoder, AutoencoderConfig, CausalVaeConfig, ConvVaeConfig, build_autoencoder
from ltd.config import ConfigError
from ltd.inference.halo import decode_strips, stream_strips
from ltd.nn.causal_conv import State
from ltd.parallel import Layout, ParallelConfig
from ltd.parallel.halo import strips
from ltd.shapes import Compression
from tests.parallel import forked

#: World size and sequence degree.
WORLDS = {"two": (2, 2), "four": (4, 4), "pairs": (4, 2), "one": (1, 1)}
CONFIG = CausalVaeConfig(
    latent_channels=3,
    front=(1, 2, 1),
    channels=(4, 6),
    factors=((2, 2, 2),),
    encoder_blocks=(0, 0),
    decoder_blocks=(1, 0),
    shortcuts=False,
    linear_path=True,
)
#: Attention over the frame in the middle, norms over the frame, shortcuts, norms guided by the latent.
CONV = ConvVaeConfig(
    latent_channels=3, encoder_width=4, decoder_width=4, multipliers=(1, 2, 2), halve_time=(False, True), blocks=1
)
MODELS: dict[str, tuple[AutoencoderConfig, torch.dtype]] = {
    "attention": (CONV, torch.float64),
    "group norms": (dataclasses.replace(CONV, norm="group", num_groups=2, front="repeat"), torch.float64),
    "shortcuts": (dataclasses.replace(CONV, shortcuts=True, patch=2), torch.float64),
    "guided": (dataclasses.replace(CONV, conditional_norm=True), torch.float64),
    "attention in float": (CONV, torch.float32),
    "group norms in bfloat16": (dataclasses.replace(CONV, norm="group", num_groups=2), torch.bfloat16),
    "replicate": (CONFIG, torch.float64),
    "zeros": (dataclasses.replace(CONFIG, padding="zeros"), torch.float64),
    "float": (CONFIG, torch.float32),
    "bfloat16": (CONFIG, torch.bfloat16),
}
#: Latent frames and rows; rows never divide evenly by 2 and 4 alike.
SIZES = ((3, 13), (1, 6), (4, 4))


class Global(nn.Module):
    """Sees the whole frame: adds its mean to every pixel."""

    compression = Compression(1, 2, 2)
    latent_channels = 3

    def decode_chunk(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        video = latents.repeat_interleave(2, 3).repeat_interleave(2, 4)
        return video + latents.mean((3, 4), keepdim=True), state


def build(name: str) -> Autoencoder:
    config, dtype = MODELS[name]
    model = build_autoencoder(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        fixed = [value for key, value in model.named_buffers() if key.startswith("linear_decoder")]
        for value in [*model.parameters(), *fixed]:
            fan_in = max(1, value[0].numel()) if value.ndim > 1 else 4
            value.copy_(torch.randn(value.shape, generator=generator) * fan_in**-0.5)
    for side in (model.encoder, model.decoder):  # large frames in pieces: strips of other sizes must be cut alike
        if "piece_pixels" in vars(side):
            side.piece_pixels = 200
    return model.to(dtype).eval()


def draw(frames: int, rows: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, frames, rows, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def measure(layout: Layout) -> dict[str, Any]:
    """Compare with one process's result; the members of a group hold other latents than the first, of other sizes."""
    found: dict[str, Any] = {}
    group = layout.global_rank // layout.sequence
    for name, (_, dtype) in MODELS.items():
        model = build(name)
        for frames, rows in SIZES:
            latents = draw(frames, rows, seed=group, dtype=dtype)
            own = latents if layout.sequence_rank == 0 else draw(1, 2, seed=100 + layout.global_rank, dtype=dtype)
            with torch.no_grad():
                whole = model.decode(latents)
            for everywhere in (False, True):
                video = decode_strips(model, own, layout, frames_per_chunk=3, everywhere=everywhere)
                found[f"{name} {frames}x{rows} {everywhere}"] = _difference(video, whole)
    return found


def measure_encoding(layout: Layout) -> dict[str, Any]:
    """Encode strips of rows at the same seams, and compare with one process's latents."""
    found: dict[str, Any] = {}
    for name, (_, dtype) in MODELS.items():
        model, rows = build(name), 13
        unit = model.compression.h
        video = torch.randn(1, 3, 5, rows * unit, 4 * unit, generator=torch.Generator().manual_seed(3)).to(dtype)
        with torch.no_grad():
            whole = model.encode(video).mean
            with strips(model, rows, layout) as own:
                part = model.encode(video[..., own.start * unit : own.stop * unit, :]).mean
        found[f"encode {name}"] = _difference(part, whole[..., own, :])
    return found


def measure_rest(layout: Layout) -> dict[str, Any]:
    """What is refused, what the chunks are, and that all members call equally often."""
    found: dict[str, Any] = {}
    model, latents = build("replicate"), draw(3, 13, seed=0)
    for name, arguments in {
        "unknown": (Global(), latents),
        "rows": (model, latents[..., :1, :]),
        "chunk": (model, latents),
    }.items():
        try:
            decode_strips(*arguments, layout, frames_per_chunk=1)  # type: ignore[arg-type]
            found[name] = None
        except ConfigError as error:
            found[name] = str(error)
    before = model.decode(latents)
    counts = [layout.collectives]
    for everywhere in (True, False):
        chunks = list(stream_strips(model, latents, layout, frames_per_chunk=2, everywhere=everywhere))
        counts.append(layout.collectives)
    found["chunks"] = [None if chunk is None else chunk.shape[2] for chunk in chunks]
    found["whole after strips"] = _difference(model.decode(latents), before)
    found["collectives"] = [after - before for before, after in pairwise(counts)]
    return found


def _difference(video: Tensor | None, whole: Tensor) -> float | None:
    if video is None:
        return None
    assert video.shape == whole.shape, (video.shape, whole.shape)
    assert video.dtype == whole.dtype
    return float((video.double() - whole.double()).abs().max() / whole.double().abs().max())


def work(out: Path, sequence: int) -> None:
    torch.set_num_threads(1)
    layout = Layout.from_environment(ParallelConfig(sequence=sequence, timeout_s=60))
    try:
        found = measure(layout) | measure_encoding(layout) | measure_rest(layout)
    finally:
        layout.close()
    (out / f"rank{layout.global_rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    worlds = {name: forked.prepare(folder / name) for name in WORLDS}
    for name, (size, sequence) in WORLDS.items():
        forked.launch(worlds[name], lambda rank, n=name, s=sequence: work(folder / n, s), world_size=size)  # type: ignore[misc]
    for name, ends in zip(worlds, forked.collect(worlds.values(), limit_s=120), strict=True):
        logs = "\n".join(path.read_text() for path in sorted((folder / name).glob("log*")))
        assert all(code == 0 for code, _ in ends), f"{name}: {ends}\n{logs[-6000:]}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
