"""Strips of one decode: how far a latent cell reaches, how rows are dealt, and results on 2 and 4 processes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from ltd.autoencoders import CausalVae, CausalVaeConfig
from tests import launched
from tests.inference.halo_worker import CONFIG, MODELS, SIZES, WORLDS

#: Architectures, and what (height, width) in cells their decoder and encoder reach, worked out by hand.
REACHES: dict[str, tuple[CausalVaeConfig, tuple[int, int] | None, tuple[int, int] | None]] = {
    "base": (CONFIG, (3, 3), (2, 2)),
    "deep": (
        dataclasses.replace(
            CONFIG,
            channels=(4, 4, 4),
            factors=((1, 2, 4), (2, 2, 1)),
            encoder_blocks=(1, 0, 1),
            decoder_blocks=(1, 2, 0),
        ),
        (4, 6),
        (4, 4),
    ),
    "kernels": (
        dataclasses.replace(CONFIG, block_kernels=((1, 5, 1), (3, 3, 1)), stem_kernel=(3, 1, 3), encoder_blocks=(2, 1)),
        (2, 2),
        None,
    ),
    "linear": (
        dataclasses.replace(CONFIG, decoder_blocks=(0, 0), stem_kernel=(1, 1, 1), linear_kernel=(1, 7, 5)),
        (3, 2),
        (0, 0),
    ),
    "one level": (
        dataclasses.replace(
            CONFIG,
            front=(1, 4, 4),
            channels=(6,),
            factors=(),
            encoder_blocks=(1,),
            decoder_blocks=(1,),
            padding="zeros",
        ),
        (4, 4),
        (4, 4),
    ),
}


def _model(config: CausalVaeConfig) -> CausalVae:
    model = CausalVae(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*model.parameters(), *model.linear_encoder.buffers(), *model.linear_decoder.buffers()]:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model.double()


def _extent(changed: Tensor, axis: int) -> tuple[int, int]:
    """First and last index along an axis at which anything changed."""
    places = changed.movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
    return int(places[0]), int(places[-1])


@pytest.mark.parametrize("name", REACHES)
def test_one_latent_cell_changes_pixels_exactly_as_far_as_the_halo_says(name: str) -> None:
    config, expected, _ = REACHES[name]
    model, halo = _model(config), _model(config).spatial_halo("decode")
    assert expected in (None, halo)
    size, place, block = 21, 10, model.compression
    latents = torch.randn(1, 3, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = latents.clone()
    moved[..., place, place] += 1.0
    with torch.no_grad():
        changed = model.decode(moved) != model.decode(latents)
    for axis, unit in ((3, block.h), (4, block.w)):
        first, last = _extent(changed, axis)
        assert (first // unit, last // unit) == (place - halo[axis - 3], place + halo[axis - 3])


@pytest.mark.parametrize("name", REACHES)
def test_one_cell_of_pixels_changes_latents_exactly_as_far_as_the_halo_says(name: str) -> None:
    config, _, expected = REACHES[name]
    model, halo = _model(config), _model(config).spatial_halo("encode")
    assert expected in (None, halo)
    size, place, block = 21, 10, model.compression
    shape = (1, 3, 1, size * block.h, size * block.w)
    video = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = video.clone()
    moved[..., place * block.h : (place + 1) * block.h, place * block.w : (place + 1) * block.w] += 1.0
    with torch.no_grad():
        before, after = model.encode(video), model.encode(moved)
    changed = (before.mean != after.mean) | (before.logvar != after.logvar)
    for axis in (3, 4):
        assert _extent(changed, axis) == (place - halo[axis - 3], place + halo[axis - 3])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every process of every world measured, by world and rank."""
    folder = tmp_path_factory.mktemp("halo")
    launched.fork("tests.inference.halo_worker", str(folder))
    return {
        name: [json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in range(size)]
        for name, (size, _) in WORLDS.items()
    }


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_strips_equal_one_process(results: dict[str, list[dict[str, Any]]], world: str) -> None:
    sequence = WORLDS[world][1]
    limits = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}
    for rank, found in enumerate(results[world]):
        for name, (_, dtype) in MODELS.items():
            assert found[f"encode {name}"] <= limits[dtype], (rank, name, found)
            for frames, rows in SIZES:
                assert found[f"{name} {frames}x{rows} True"] <= limits[dtype], (rank, name, found)
                on_first = found[f"{name} {frames}x{rows} False"]
                assert on_first is None if rank % sequence else on_first <= limits[dtype]


@pytest.mark.dist
@pytest.mark.parametrize("world", ["two", "four", "pairs"])
def test_refusals_and_chunks_on_processes(results: dict[str, list[dict[str, Any]]], world: str) -> None:
    sequence = WORLDS[world][1]
    for rank, found in enumerate(results[world]):
        assert found["unknown"].startswith(f"parallel.sequence: got {sequence}, but Global has no row seams")
        assert found["rows"].startswith(f"parallel.sequence: got {sequence}, needed at most 1 for 1 latent rows")
        assert found["chunk"] == "frames_per_chunk: got 1, needed at least 2 (model.compression.t)"
        assert found["chunks"] == ([1, 2, 2] if rank % sequence == 0 else [None] * 3)
        assert found["whole after strips"] == 0
        # The heartbeat compares the count: it is the same whoever receives the frames, and on all members.
        first, second = found["collectives"]
        assert first == second == results[world][0]["collectives"][0]


@pytest.mark.dist
def test_one_process_needs_no_seams(results: dict[str, list[dict[str, Any]]]) -> None:
    assert results["one"][0]["unknown"] is None
