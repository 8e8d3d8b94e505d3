"""Strips of one decode: how far a latent cell reaches, how rows are dealt, and results on 2 and 4 processes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltd.autoencoders import CausalVae, CausalVaeConfig
from ltd.config import ConfigError
from ltd.inference.halo import plan_strips, spatial_halo
from tests.inference.halo_worker import CONFIG, MODELS, SIZES, WORLDS, Global

ROOT = Path(__file__).resolve().parents[2]

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
    model, halo = _model(config), spatial_halo(config)
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
    model, halo = _model(config), spatial_halo(config, "encode")
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


@pytest.mark.parametrize(("height", "members"), [(13, 4), (4, 4), (7, 2), (9, 1), (30, 4)])
def test_rows_are_dealt_evenly_with_a_halo_inside_the_frame(height: int, members: int) -> None:
    model = CausalVae(CONFIG)
    halo, unit = spatial_halo(CONFIG)[0], model.compression.h
    pieces = plan_strips(model, height, members)
    assert [piece.seen.start for piece in pieces[1:]] == [piece.seen.stop for piece in pieces[:-1]]
    assert (pieces[0].seen.start, pieces[-1].seen.stop) == (0, height * unit)
    rows = [(piece.seen.stop - piece.seen.start) // unit for piece in pieces]
    assert max(rows) - min(rows) <= 1
    for piece in pieces:
        assert piece.cells.start == max(0, piece.seen.start // unit - halo)
        assert piece.cells.stop == min(height, piece.seen.stop // unit + halo)
        assert piece.weight.tolist() == [1.0] * (piece.seen.stop - piece.seen.start)


def test_blended_strips_share_every_row() -> None:
    for height, members, blend in ((13, 4, 1), (13, 4, 3), (8, 4, 9), (7, 2, 2)):
        total = torch.zeros(2 * height, dtype=torch.float64)
        for piece in plan_strips(Global(), height, members, blend=blend):  # type: ignore[arg-type]
            assert piece.inside.start >= 0
            assert piece.inside.stop <= 2 * (piece.cells.stop - piece.cells.start)
            assert piece.weight.min() >= 0
            total[piece.seen] += piece.weight
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("model", "height", "blend", "message"),
    [
        (CausalVae(CONFIG), 3, 0, r"parallel\.sequence: got 4, needed at most 3, one latent row per member"),
        (Global(), 8, 0, r"parallel\.sequence: got 4, but Global does not say how far a latent cell reaches"),
        (Global(), 8, -1, r"blend: latent rows, got -1, needed 0 or more"),
    ],
)
def test_impossible_strips_are_refused(model: Any, height: int, blend: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_strips(model, height, 4, blend=blend)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every process of every world measured, by world and rank."""
    folder = tmp_path_factory.mktemp("halo")
    command = [sys.executable, "-m", "tests.inference.halo_worker", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return {
        name: [json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in range(size)]
        for name, (size, _) in WORLDS.items()
    }


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_strips_equal_one_process(results: dict[str, list[dict[str, Any]]], world: str) -> None:
    sequence = WORLDS[world][1]
    limits = {"replicate": 1e-14, "zeros": 1e-14, "float": 1e-6, "bfloat16": 1e-2}
    for rank, found in enumerate(results[world]):
        for name in MODELS:
            for frames, rows in SIZES:
                assert found[f"{name} {frames}x{rows} True"] <= limits[name], (rank, name, found)
                on_first = found[f"{name} {frames}x{rows} False"]
                assert on_first is None if rank % sequence else on_first <= limits[name]


@pytest.mark.dist
@pytest.mark.parametrize("world", ["two", "four", "pairs"])
def test_refusals_blends_and_chunks_on_processes(results: dict[str, list[dict[str, Any]]], world: str) -> None:
    sequence = WORLDS[world][1]
    # Two for the latents, one for each of three chunks, whoever receives them; the heartbeat compares the count.
    assert [found["collectives"] for found in results[world]] == [[5, 5]] * len(results[world])
    for rank, found in enumerate(results[world]):
        assert found["unknown"].startswith(f"parallel.sequence: got {sequence}, but Global does not say")
        assert found["rows"].startswith(f"parallel.sequence: got {sequence}, needed at most 1")
        assert found["chunk"] == "frames_per_chunk: got 1, needed at least 2 (model.compression.t)"
        assert found["chunks"] == ([1, 2, 2] if rank % sequence == 0 else [None] * 3)
        assert found["blended constant"] is None if rank % sequence else found["blended constant"] < 1e-15
        steps = torch.tensor(found["blended ramp"]).diff()
        assert steps.max() < 2.0, "a cut would step by the difference of the strips' means"
        assert steps.min() >= 0


@pytest.mark.dist
def test_one_process_needs_no_halo(results: dict[str, list[dict[str, Any]]]) -> None:
    assert results["one"][0]["unknown"] is None
