"""Mistakes about metrics and their networks: cases of the proof ``bad_input``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ltd.data.write import write_image
from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.distribution import distribution_values
from tools import evaluate
from tools.proofs._bad_cases import Case, Outcome, call, toy, train_toy


class _Mean(nn.Module):
    """Mean colours; not a number where a frame is black."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        colours = x.mean(dim=[2, 3])
        return colours / colours.sum(dim=1, keepdim=True)


def _evaluate(
    folder: Path, *arguments: str, samples: int = 4, dim: int = 3, damage: Callable[[], object] | None = None
) -> Outcome:
    """Measure stills, the second of them black, against toy data with a network of mean colours (network.yaml)."""
    toy(folder)
    (folder / "run").mkdir()
    (folder / "samples").mkdir()
    rows = []
    for i in range(samples):
        frame = np.full((32, 32, 3), 40 * i + 20, np.uint8)
        frame[:16] = 255
        write_image(folder / f"samples/{i}.png", frame * (i != 1))
        rows.append({"file": f"{i}.png", "prompt": "a disc", "num_frames": 1, "height": 32, "width": 32})
    (folder / "samples/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(_Mean()), str(folder / "net.pt"))
    (folder / "network.yaml").write_text(
        f"kind: torchscript\npath: {folder / 'net.pt'}\ndim: {dim}\nframes: {{size: null}}\n"
    )
    if damage is not None:
        damage()
    command = [str(folder / "run"), "--samples", str(folder / "samples"), "--reference", str(folder / "train")]
    return call(evaluate.main, *command, "--device", "cpu", *arguments)


def _metrics(*names: str) -> tuple[str, ...]:
    return ("--metrics", *names, "--features")


def _too_few(folder: Path) -> Outcome:
    return _evaluate(folder, *_metrics("precision_recall"), "pixels", samples=3)


def _nan(folder: Path) -> Outcome:
    return _evaluate(folder, *_metrics("fid"), str(folder / "network.yaml"))


def _width(folder: Path) -> Outcome:
    return _evaluate(folder, *_metrics("fid"), str(folder / "network.yaml"), dim=2048)


def _output(folder: Path) -> Outcome:
    return _evaluate(folder, *_metrics("sfid"), "pixels")


def _captions(folder: Path) -> Outcome:
    return _evaluate(folder, *_metrics("clip_score"), "pixels")


def _pickle(folder: Path) -> Outcome:
    torch.save({"weight": torch.ones(1)}, folder / "weights.pt")
    return _evaluate(folder, *_metrics("fid"), f"inception:{folder / 'weights.pt'}")


def _absent(folder: Path) -> Outcome:
    return _evaluate(folder, "--metrics", "fvd", "--clip-features", f"i3d:{folder / 'i3d.pt'}")


def _other_network(folder: Path) -> Outcome:
    return _evaluate(folder, *_metrics("fid"), f"inception:{folder / 'net.pt'}")


def _half_a_line(folder: Path) -> Outcome:
    table = folder / "samples/samples.jsonl"
    return _evaluate(folder, damage=lambda: table.write_text(table.read_text()[:-20]))


def _half_a_sample(folder: Path) -> Outcome:
    image = folder / "samples/2.png"
    return _evaluate(folder, damage=lambda: image.write_bytes(image.read_bytes()[:60]))


def _damaged_results(folder: Path) -> Outcome:
    return _evaluate(folder, damage=lambda: (folder / "run/evaluation.json").write_text('[{"part": '))


def _held_out(folder: Path, size: str, shards: str = "train") -> Outcome:
    """Reconstruct held-out data with an autoencoder of 4 x 8 x 8."""
    toy(folder)
    trained = train_toy(folder)
    assert trained.code == 0, trained
    command = [str(folder / "run"), "--shards", str(folder / shards), "--size", size, "--device", "cpu"]
    return call(evaluate.main, *command)


def _off_compression(folder: Path) -> Outcome:
    return _held_out(folder, "9x30x32")


def _longer_than_clips(folder: Path) -> Outcome:
    return _held_out(folder, "33x32x32")


def _absent_shards(folder: Path) -> Outcome:
    return _held_out(folder, "9x32x32", "absent")


def _unequal(folder: Path) -> Outcome:
    del folder
    banks = [FeatureBank(4).update(torch.rand(n, 4)) for n in (9, 8)]
    try:
        distribution_values("fid", *banks)
    except ValueError as error:
        return Outcome(2, str(error))
    return Outcome(0, "")


CASES = (
    Case("too few samples for a metric", _too_few, 2, ("precision_recall", "got 3 samples", "needed 4", "equal n")),
    Case("features that are not numbers", _nan, 2, ("--metrics", "NaN or infinity", "of samples 1")),
    Case("features of another width", _width, 2, ("dim", "(8, 3)", "needed (8, 2048)")),
    Case("a metric whose network lacks the output", _output, 2, ("--features", "'spatial'")),
    Case("captions for a network without", _captions, 2, ("--features", "CLIP", "pixels")),
    Case("pickled weights as a network", _pickle, 2, ("weights.pt", "pickle")),
    Case("missing network file", _absent, 2, ("i3d.pt", "torch.jit.save")),
    Case("another network as Inception", _other_network, 2, ("net.pt", "not the Inception of FID")),
    Case("half a line in samples.jsonl", _half_a_line, 2, ("--samples", "line 4", "not JSON", "cut off")),
    Case("half a sample", _half_a_sample, 2, ("--samples", "2.png", "1x32x32", "cannot be read")),
    Case("damaged results of an earlier call", _damaged_results, 2, ("run/evaluation.json", "damaged", "remove it")),
    Case("held-out size off the compression", _off_compression, 2, ("--size", "9x30x32", "multiple of", "nearest")),
    Case("held-out size longer than the clips", _longer_than_clips, 2, ("--size", "33x32x32", "none of the 16")),
    Case("missing held-out shards", _absent_shards, 2, ("--shards", "absent", "make_shards.py")),
    Case("samples and reference of different size", _unequal, 2, ("9 samples", "8 of the reference", "equal n")),
)
