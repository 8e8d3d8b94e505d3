"""Sampling jobs on worlds of 1 to 4 gloo processes, side by side; some are killed, starved or given bad text."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sample
from ltd import autoencoders, config, denoisers, storage
from ltd.config import ConfigError
from ltd.inference import jobs
from ltd.inference.generate import Generator, Request
from ltd.training.denoiser import DenoiserRun
from tests.parallel import forked

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a red disc", "a blue square", "a green dot", "a white line")
#: Rows of latents that two processes share unevenly; batches of two, so that some fail with one sample at fault.
ARGUMENTS = ("--shapes", "5x40x32,1x32x32", "--steps", "2", "--batch-size", "2", "--guidance", "2", "--device", "cpu")
#: Two tiles of a still, and a guide.
TILED = ("--shapes", "1x64x32", "--tile", "40x32", "--tile-overlap", "16", "--guide", "{run}")

Patch = Callable[[int], None]


def make_run(folder: Path, *overrides: str) -> None:
    """Write what sampling needs, with every weight redrawn and nothing trained."""
    run = config.load(DenoiserRun, ROOT / "configs" / "debug" / "denoiser.yaml", list(overrides))
    assert run.untrained_autoencoder is not None
    decoder = autoencoders.build_autoencoder(run.untrained_autoencoder)
    network = denoisers.build_denoiser(run.model)
    _redraw(decoder, 0.1)
    _redraw(network, 0.2)
    autoencoders.save(decoder, folder / "autoencoder")
    plain = config.to_dict(run) | {"autoencoder": str(folder / "autoencoder")}
    found = autoencoders.load(folder / "autoencoder")
    lineage = {
        "time": denoisers.TIME_CONVENTION,
        "autoencoder_hash": autoencoders.weights_hash(found),
        "latent_norm": found.latent_norm.to_plain(),
    }
    described = {"model": plain["model"], "time": denoisers.TIME_CONVENTION, "run": plain, "lineage": lineage}
    storage.save_model(folder / "run", network.state_dict(), described)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))


def _redraw(model: nn.Module, std: float) -> None:
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std, generator=random)


def before_drawing(act: Callable[[list[Request], int], object]) -> Patch:
    """Act in front of each batch, given its requests and how many there were before; the process's own patch."""

    def patch(rank: int) -> None:
        right, count = Generator.draw_latents, iter(range(1000))

        def draw(self: Generator, requests: list[Request], *rest: Any, **options: Any) -> torch.Tensor:
            act(requests, next(count))
            return right(self, requests, *rest, **options)

        Generator.draw_latents = draw  # type: ignore[method-assign, assignment]

    return patch


def on(rank: int, patch: Patch) -> Patch:
    return lambda own: patch(own) if own == rank else None


def kill_at_second(requests: list[Request], count: int) -> None:
    if count == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def break_at_second(requests: list[Request], count: int) -> None:
    if count == 1:
        raise KeyError("a bug")


def starve(requests: list[Request], count: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def refuse_blue(rank: int) -> None:
    embed = Generator.condition

    def condition(self: Generator, requests: list[Request]) -> Any:
        if any("blue" in request.prompt for request in requests):
            raise ValueError("text: 99 tokens, needed at most 48\nat blue")
        return embed(self, requests)

    Generator.condition = condition  # type: ignore[method-assign, assignment]


def fail_some(rank: int) -> None:
    """Blue cannot be embedded, the still of green is not finite, and no two green and white clips fit in memory."""
    refuse_blue(rank)
    right = Generator.draw_latents

    def draw(self: Generator, requests: list[Request], *rest: Any, **options: Any) -> torch.Tensor:
        if len(requests) > 1 and requests[0].shape.num_frames > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")
        latents = right(self, requests, *rest, **options)
        for row, request in enumerate(requests):
            if "green" in request.prompt and request.shape.num_frames == 1:
                latents[row, 0, 0, 1, 1] = float("nan")
        return latents

    Generator.draw_latents = draw  # type: ignore[method-assign, assignment]


def refuse_on_second(rank: int) -> None:
    if rank == 1:

        def load(*rest: Any, **options: Any) -> Generator:
            raise ConfigError("autoencoder: not on this host")

        sample.load_generator = load


def record(out: Path) -> Patch:
    """Note batches, their videos before they are rounded to files, and how much this process computed itself."""

    def patch(rank: int) -> None:
        write, prepare = jobs._Maker._write, jobs._prepare
        seen: dict[str, list[Any]] = {"tokens": [], "rows": [], "batches": []}

        def note(self: Any, batch: Any, video: Any) -> None:
            if video is not None:
                torch.save(video, out / f"video{batch[0][0]}.pt")
            seen["batches"].append([number for number, _ in batch])
            (out / f"seen{rank}.json").write_text(json.dumps(seen))
            write(self, batch, video)

        def watched(*arguments: Any) -> Generator:
            made = prepare(*arguments)
            blocks: Any = made.denoiser.blocks
            blocks[0].register_forward_pre_hook(lambda _, inputs: seen["tokens"].append(inputs[0].shape[1]))
            autoencoder: Any = made.autoencoder
            decode = autoencoder.decode_chunk

            def decode_chunk(latents: torch.Tensor, state: Any) -> Any:
                seen["rows"].append(latents.shape[3])
                return decode(latents, state)

            autoencoder.decode_chunk = decode_chunk
            return made

        jobs._Maker._write, jobs._prepare = note, watched  # type: ignore[method-assign]

    return patch


def work(folder: Path, name: str, rank: int, patch: Patch | None, arguments: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    if patch is not None:
        patch(rank)
    command = [str(folder / "run"), "--prompts", str(folder / "prompts.txt"), "--out", str(folder / name)]
    sys.exit(sample.main([*command, *ARGUMENTS, *(word.format(run=folder / "run") for word in arguments)]))


Case = tuple[str, int, Patch | None, tuple[str, ...]]


def run_side_by_side(folder: Path, cases: dict[str, Case]) -> dict[str, list[int]]:
    """Run jobs at once: by name, folder of the samples, number of processes, patch and further arguments."""
    worlds = {name: forked.prepare(folder / "logs" / name) for name in cases}
    for name, (out, size, patch, arguments) in cases.items():
        forked.launch(
            worlds[name],
            lambda rank, o=out, p=patch, a=arguments: work(folder, o, rank, p, a),  # type: ignore[misc]
            world_size=size,
        )
    ends = forked.collect(worlds.values(), grace_s=25, limit_s=100)
    return {name: [code for code, _ in found] for name, found in zip(worlds, ends, strict=True)}


def main(folder: Path) -> None:
    make_run(folder)
    for name in ("one", "pair", "pairs", "failing"):
        (folder / f"{name}-seen").mkdir()
    sequence = ("--sequence", "2")
    first: dict[str, Case] = {
        "one": ("one", 1, record(folder / "one-seen"), ()),
        "two": ("two", 2, None, ()),
        "three": ("three", 3, None, ()),
        "pair": ("pair", 2, record(folder / "pair-seen"), sequence),
        "pairs": ("pairs", 4, record(folder / "pairs-seen"), sequence),
        "tiled": ("tiled", 1, None, TILED),
        "tiled pair": ("tiled-pair", 2, None, (*TILED, *sequence)),
        "killed": ("killed", 2, on(1, before_drawing(kill_at_second)), ()),
        "broken": ("broken", 2, on(1, before_drawing(break_at_second)), ()),
        "starved": ("starved", 2, on(1, before_drawing(starve)), sequence),
        "failing": ("failing", 2, fail_some, ()),
        "one-sided": ("one-sided", 2, on(1, refuse_blue), (*sequence, "--shapes", "1x32x32")),
        "host": ("host", 2, refuse_on_second, ()),
        "odd": ("odd", 3, None, sequence),
        "thin": ("thin", 2, None, (*sequence, "--shapes", "5x8x32")),
    }
    codes = run_side_by_side(folder, first)
    times = {
        name: {path.name: path.stat().st_mtime_ns for path in (folder / name).glob("0*")}
        for name in ("killed", "failing")
    }
    (folder / "killed" / "0006.png.77-1.incomplete").write_bytes(b"half")
    (folder / "killed" / "0007.png").write_bytes(b"")
    second: dict[str, Case] = {
        "killed again": ("killed", 3, None, ()),
        "failing again": ("failing", 2, record(folder / "failing-seen"), ()),
        "shape": ("two", 2, None, ("--shapes", "1x32x32,8x32x32")),
    }
    (folder / "failing-before").mkdir()
    for path in (folder / "failing").iterdir():
        (folder / "failing-before" / path.name).write_bytes(path.read_bytes())
    codes |= run_side_by_side(folder, second)
    (folder / "codes.json").write_text(json.dumps({"codes": codes, "times": times}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
