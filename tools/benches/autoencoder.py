"""Encoding and decoding with the Wan 2.1 design against diffusers: as shipped, and with channels-last tensors.

Equal random weights; before anything is timed the outputs of both in fp64 must agree to 1e-6 of their standard
deviation (in fp32 both round: at this width by about 1e-5). Times are in bf16 for a clip of 17 frames. Peak memory is
resident memory above the weights while 49 frames of 256x256 are decoded: diffusers streams one latent frame at a time,
as ours does, but returns the whole clip, of which 18 MB lie beside the rest at its peak, where ours gives frames as
they come; each in a process of its own. Where there is a GPU, times and memory are measured there too, memory as its
allocator counts it; equality and rounding errors are those of the CPU.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ltd.autoencoders import ConvVae
from ltd.interop import import_autoencoder
from tools.benches.table import Row, System, interleave

KIND = "autoencoder"
NAME = "autoencoder"
ROOT = Path(__file__).resolve().parents[2]
SIZES, TINY_SIZES = (64, 128), (16,)
FRAMES, TINY_FRAMES = 17, 5
TINY_WIDTH = 8
LAYOUT = "one process"
SHAPES = f"Wan 2.1's design, width 96; clips of {FRAMES} frames of {SIZES} pixels a side; memory: 49 x 256 x 256"
TINY_SHAPES = f"Wan 2.1's design, width {TINY_WIDTH}; clips of {TINY_FRAMES} frames of {TINY_SIZES} pixels a side"
#: What is asked for: the peer's time over ours.
TARGETS = {"as shipped": 3.0, "tuned": 1.4}
MEMORY_TARGET = 0.5
_LATENTS = (1, 16, 13, 32, 32)
_memory: dict[tuple[str, str], float] = {}
#: Error in bf16 against fp64 with the same rounded weights, over the output's standard deviation, by side and system.
_errors: dict[str, dict[str, float]] = {}


def measure(repeats: int, *, tiny: bool = False) -> list[Row]:
    """Check equality, then time encoding and decoding, then measure memory.

    Args:
        repeats: Rounds of each.
        tiny: The smallest sizes, to see that it runs.

    Returns:
        Rows per 1,000 clips.
    """
    theirs, ours = _models(width=TINY_WIDTH if tiny else 96)
    _check_equal(theirs, ours)
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    tuned = _channels_last(copy.deepcopy(theirs))
    _errors.update(_rounding(theirs, ours, tuned, 32 if tiny else 64))
    rows = []
    num_frames = TINY_FRAMES if tiny else FRAMES
    for device in _devices():
        models = {"ltd": ours.to(device), "as shipped": theirs.to(device), "tuned": tuned.to(device)}
        for size in TINY_SIZES if tiny else SIZES:
            for work, runs in _works(models, num_frames, size, device).items():
                systems = [System(name=_named(who), run=run, ours=who == "ltd") for who, run in runs.items()]
                what = f"{work} {num_frames}x{size}x{size}, bf16{_where(device.type)}"
                rows += interleave(what, systems, repeats=repeats)
        for who in () if tiny else ("ltd", "diffusers"):
            _memory[who, device.type] = _peak_in_a_process(who, device.type)
    return rows


def summary(rows: list[Row]) -> list[str]:
    """Compare the medians of paired ratios with what is asked for.

    Args:
        rows: What ``measure`` gave.

    Returns:
        Lines of a Markdown list.
    """
    lines = [
        "- Wan 2.1's configuration (width 96, 127M weights), weights drawn at random; an item is a clip.",
        "- The ratios to reach are those that matrix units for bf16 (AMX) allow, where channels-last convolutions run "
        "several times faster than contiguous ones; without them both run at the same rate, near the peak of the core.",
        *(
            f"- Error of the {side} in bf16, root mean square over the output's standard deviation: "
            + ", ".join(f"{system} {error:.2g}" for system, error in found.items())
            for side, found in _errors.items()
        ),
    ]
    for work in dict.fromkeys(row.work for row in rows):
        same = [row for row in rows if row.work == work]
        ours = next(row for row in same if row.ours)
        for kind, target in TARGETS.items():
            other = next(row for row in same if row.system == _named(kind))
            cpu, wall = (
                statistics.median(b / a for a, b in zip(x, y, strict=True))
                for x, y in ((ours.cpu_s, other.cpu_s), (ours.wall_s, other.wall_s))
            )
            verdict = "reached" if wall >= target else "MISSED"
            lines.append(
                f"- {work}: {wall:.2f} times as fast as {kind} (CPU {cpu:.2f}); asked for {target:g}: {verdict}"
            )
    for device in dict.fromkeys(device for _, device in _memory):
        own, peer = _memory["ltd", device], _memory["diffusers", device]
        verdict = "reached" if own / peer <= MEMORY_TARGET else "MISSED"
        lines.append(
            f"- Peak memory above the weights, decode 49x256x256 in bf16{_where(device)}: {own:.0f} MB against "
            f"{peer:.0f} MB, {own / peer:.2f} of it; asked for {MEMORY_TARGET:g}: {verdict}"
        )
    return lines


def _devices() -> list[torch.device]:
    gpu = [torch.device("cuda")] if torch.cuda.is_available() else []
    return [torch.device("cpu"), *gpu]


def _where(device: str) -> str:
    return "" if device == "cpu" else ", GPU"


def _works(
    models: dict[str, Any], num_frames: int, size: int, device: torch.device
) -> dict[str, dict[str, Callable[[], int]]]:
    """List what each system does, by work and system; the tuned peer is given channels-last tensors."""
    video = (torch.rand(1, 3, num_frames, size, size) * 2 - 1).bfloat16().to(device)
    latents = torch.randn(1, 16, 1 + (num_frames - 1) // 4, size // 8, size // 8).bfloat16().to(device)
    works: dict[str, dict[str, Callable[[], int]]] = {"encode": {}, "decode": {}}
    for who, model in models.items():
        for work, given in (("encode", video), ("decode", latents)):
            x = given.contiguous(memory_format=torch.channels_last_3d) if who == "tuned" else given
            works[work][who] = _once(functools.partial(getattr(model, work), x), device)
    return works


def _named(kind: str) -> str:
    return kind if kind == "ltd" else f"diffusers, {kind}"


def _once(run: Callable[[], Any], device: torch.device) -> Callable[[], int]:
    def once() -> int:
        with torch.no_grad():
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1

    return once


def _models(width: int = 96) -> tuple[nn.Module, ConvVae]:
    """Make one model in both libraries."""
    warnings.filterwarnings("ignore")
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    theirs = AutoencoderKLWan(base_dim=width).eval()
    with tempfile.TemporaryDirectory(prefix="ltd-bench-autoencoder-") as folder:
        theirs.save_pretrained(folder)
        return theirs, import_autoencoder(folder)


@torch.no_grad()
def _check_equal(theirs: Any, ours: ConvVae) -> None:
    theirs, ours = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()
    video = torch.rand(1, 3, 5, 32, 32, dtype=torch.float64) * 2 - 1
    mean = theirs.encode(video).latent_dist.mean
    decoded = theirs.decode(mean).sample
    for what, got, wanted in (("mean", ours.encode(video).mean, mean), ("frames", ours.decode(mean), decoded)):
        worst = float((got - wanted).abs().max() / wanted.std())
        if worst > 1e-6:  # theirs casts to fp32 where it enlarges
            raise RuntimeError(f"{what} differ by {worst:.2g} of their standard deviation: nothing is compared")


@torch.no_grad()
def _rounding(theirs: Any, ours: ConvVae, tuned: Any, size: int) -> dict[str, dict[str, float]]:
    """Measure the error in bf16 of both sides of each system."""
    exact = copy.deepcopy(theirs).double()
    video = (torch.rand(1, 3, 9, size, size) * 2 - 1).bfloat16()
    latents = torch.randn(1, 16, 3, size // 8, size // 8).bfloat16()
    mean, frames = exact.encode(video.double()).latent_dist.mean, exact.decode(latents.double()).sample
    peers = {"as shipped": theirs, "tuned": tuned}
    encoded = {"ltd": ours.encode(video).mean} | {k: v.encode(video).latent_dist.mean for k, v in peers.items()}
    decoded = {"ltd": ours.decode(latents)} | {k: v.decode(latents).sample for k, v in peers.items()}
    return {
        side: {_named(name): float((y - exact).square().mean().sqrt() / exact.std()) for name, y in found.items()}
        for side, found, exact in (("encoder", encoded, mean), ("decoder", decoded, frames))
    }


def _channels_last(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def _peak_in_a_process(who: str, device: str) -> float:
    command = [sys.executable, "-m", "tools.benches.autoencoder", who, device]
    # Freed memory goes back at once: what is measured is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])


@torch.no_grad()
def _decode_for_memory(who: str, device: str) -> float:
    """Decode once and give the peak of memory above what is held before, in MB: resident, or allocated on a GPU.

    A small clip is decoded before: the code of libraries, which the first call loads, is no memory of a decode.
    """
    theirs, ours = _models()
    latents = torch.randn(*_LATENTS).bfloat16().to(device)
    model: nn.Module = theirs if who == "diffusers" else ours
    del theirs, ours
    model = model.bfloat16().to(device)

    def decode(latents: Tensor) -> Iterator[Tensor]:
        if isinstance(model, ConvVae):
            for frames in model.decode_stream(latents.split(1, dim=2)):  # written out as they come
                yield (frames.float() * 127.5 + 127.5).round().clamp(0, 255).byte()
        else:
            yield model.decode(latents).sample

    small = torch.randn(1, 16, 2, 4, 4).bfloat16().to(device)
    assert sum(frames.shape[2] for frames in decode(small)) == 5
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        assert sum(frames.shape[2] for frames in decode(latents)) == 49
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    process, peak, ended = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.005)

    before = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    count = sum(frames.shape[2] for frames in decode(latents))
    ended.set()
    thread.join()
    assert count == 49
    return (peak[0] - before) / 1e6


if __name__ == "__main__":
    print(json.dumps({"peak_mb": _decode_for_memory(sys.argv[1], sys.argv[2])}))
