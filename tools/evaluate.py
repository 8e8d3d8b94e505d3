"""Measure an autoencoder's reconstructions and a denoiser's samples: python tools/evaluate.py RUN ...

Writes RUN/evaluation.json and prints a table. `--autoencoder PATH --shards HELDOUT` gives PSNR and SSIM; `--samples DIR
--reference TRAIN` gives Frechet distances, caption retrieval and nearest training clips; `--metrics` adds others, from
the network that `--features` (of frames) and `--clip-features` (of clips, for fvd) name. A part that is not asked for
keeps the rows of an earlier call.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ltd.autoencoders
from ltd.command import command_line, leave, naming
from ltd.config import ConfigError
from ltd.data import DataConfig, ViewConfig, evaluation_batches
from ltd.data.index import Index, open_index
from ltd.data.windows import enumerate_windows
from ltd.data.write import write_bytes
from ltd.encoders.features import CaptionFeatures, build_features, parse_features
from ltd.encoders.flow import DenseFlow
from ltd.encoders.packaged import build_packaged
from ltd.encoders.perceptual import PerceptualConfig, StLpipsConfig, VggLpipsConfig, build_perceptual
from ltd.encoders.torchscript import I3dFeaturesConfig, InceptionFeaturesConfig
from ltd.evaluation.distribution import DISTRIBUTION_METRICS, check_count
from ltd.evaluation.figures import FRAMES_SHOWN, MOTION_METRICS
from ltd.evaluation.measures import caption_rows, distribution_rows, motion_rows, outputs_of
from ltd.evaluation.protocol import (
    ClipFeatures,
    Clips,
    Reference,
    autoencoder_rows,
    frechet_rows,
    nearest_rows,
    retrieval_rows,
)
from ltd.evaluation.rows import MetricRow, format_table, replace_parts, rows_from_json, rows_to_json
from ltd.inference.media import pixels_to_video, video_to_pixels
from ltd.inference.real_clips import Pairing, pair_up, read_reference
from ltd.inference.sample_table import Shape, check_samples, load_samples, read_samples, shape_of, shared_facts
from ltd.progress import Progress

#: Metrics of clips as a whole, and those of frames one by one; the others need neither network.
_OF_CLIPS = ("fvd",)
_OF_FRAMES = tuple(name for name in DISTRIBUTION_METRICS if name not in _OF_CLIPS)
_OTHER = "not the {} of published figures"
METRICS = (*_OF_FRAMES, *_OF_CLIPS, "clip_score", *MOTION_METRICS, "lpips")
_BLIND = "averaged over frames, so nearly blind to their order (see the shuffled row); frame_differences is not"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Define and read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, help="directory that gets evaluation.json, as a run's")
    parser.add_argument(
        "--autoencoder", help="run or exported folder of an autoencoder; RUN if --shards is given alone"
    )
    parser.add_argument("--shards", help="held-out tars for the autoencoder")
    parser.add_argument("--size", default="17x64x112", help="FRAMESxHEIGHTxWIDTH of the held-out clips")
    parser.add_argument("--windows-per-clip", type=int, default=2, help="held-out windows of each clip, at most")
    parser.add_argument("--weights", default="ema", help="of the autoencoder: ema, raw, or the name of one average")
    parser.add_argument("--samples", type=Path, help="directory that sample.py wrote")
    parser.add_argument("--reference", help="tars that the denoiser was trained on")
    parser.add_argument("--prompts", type=Path, help="measure only samples of these prompts, one per line")
    parser.add_argument(
        "--fps", type=float, help="frames per second that training clips were cut to; theirs if left out"
    )
    parser.add_argument("--max-clips", type=int, default=64, help="samples that enter Frechet distances, at most")
    parser.add_argument(
        "--metrics", nargs="+", default=[], choices=METRICS, metavar="NAME", help=f"more metrics: {', '.join(METRICS)}"
    )
    network = "a packaged network, inception:FILE, i3d:FILE, transformers:FOLDER or a YAML file"
    parser.add_argument("--features", default="efficientnet_lite0", help=f"of frames, for --metrics: {network}")
    parser.add_argument("--clip-features", default="transnetv2", help=f"of clips, for fvd: {network}")
    parser.add_argument(
        "--perceptual", default="st_lpips", help="for lpips: st_lpips, or a file of torchvision's VGG-16 weights"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws of real clips")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure what was asked for, write evaluation.json and print the table; returns the exit code."""
    args = parse(arguments)
    with command_line():
        if args.shards is None and args.samples is None:
            raise ConfigError(
                "nothing to measure: give --shards for the autoencoder, --samples and --reference, or both"
            )
        if args.samples is not None and args.reference is None:
            raise ConfigError(
                "--reference: samples are held against training clips; give the tars they were trained on"
            )
        check_metrics(args)
        for name in ("windows_per_clip", "max_clips"):
            if getattr(args, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(args, name)}")
        if not args.run.is_dir():
            raise ConfigError(f"{args.run}: no such directory; needed a run")
        path = args.run / "evaluation.json"
        read_rows(path)  # what is wrong with it, or with samples, is said before anything is measured
        of_samples = None if args.samples is None else SampleMeasurement(args)
        new = [] if args.shards is None else measure_autoencoder(args)
        new += [] if of_samples is None else of_samples.measure()
        write_bytes(path, rows_to_json(replace_parts(read_rows(path), new)).encode())
        print(format_table(new))
    return 0


def read_rows(path: Path) -> list[MetricRow]:
    """Read the rows of an earlier call; none where there was none."""
    try:
        return rows_from_json(path.read_text("utf-8")) if path.is_file() else []
    except ValueError as error:
        raise ConfigError(f"RUN: {path} is damaged: {error}; remove it, or give another directory") from None


def check_metrics(args: argparse.Namespace) -> None:
    """Check that the metrics asked for belong to what is measured, and that their networks are named rightly."""
    for needed, names in (("--shards", {"lpips"}), ("--samples", set(METRICS) - {"lpips"})):
        asked = [name for name in args.metrics if name in names]
        if asked and getattr(args, needed.removeprefix("--")) is None:
            raise ConfigError(f"--metrics: {asked[0]} measures what {needed} names, which is not given")
    parse_features(args.features)
    parse_features(args.clip_features)


def measure_autoencoder(args: argparse.Namespace) -> list[MetricRow]:
    """Reconstruct held-out clips from the posterior's mean and compare."""
    view = _view(args.size)
    perceptual = None
    if "lpips" in args.metrics:
        config: PerceptualConfig = StLpipsConfig()
        if args.perceptual != "st_lpips":
            config = VggLpipsConfig(backbone=args.perceptual)
        network = build_perceptual(config, device=args.device, field="--perceptual")
        perceptual = OnDevice(network, args.device)
    model = ltd.autoencoders.load(args.autoencoder or args.run, weights=args.weights, device=args.device)
    try:
        model.compression.latent(view.shape)
    except ValueError as error:
        raise ConfigError(f"--size: got {args.size}: {error}") from None

    @torch.no_grad()
    def reconstruct(pixels: Tensor) -> Tensor:
        decoded = model.decode(model.encode(pixels_to_video(pixels).to(args.device)).mean)
        return video_to_pixels(decoded).cpu()

    data = DataConfig(shards=args.shards, views=(view,), caption_required=False)

    def clips() -> Iterator[Tensor]:
        total = len(enumerate_windows(open_index(args.shards), [view], windows_per_clip=args.windows_per_clip))
        with Progress(total, "reconstruct", unit="clips") as progress:
            for batch in evaluation_batches(data, batch_size=8, windows_per_clip=args.windows_per_clip):
                assert batch.pixels is not None  # an index of tars holds media
                yield batch.pixels[batch.weight > 0]
                progress.update(len(batch.keys))

    note = f"held-out clips {args.size}, reconstructed from the posterior's mean"
    with naming({"data.shards": "--shards", "data.views": "--size"}):
        return autoencoder_rows(clips(), reconstruct, weights=args.weights, perceptual=perceptual, note=note)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Samples of one size, checked as far as can be without measuring."""

    rows: list[dict[str, Any]]  #: Of samples.jsonl.
    pairing: Pairing
    suffix: str  #: Ends the names of their metrics.


class SampleMeasurement:
    """Hold every kind of sample (clips, images) against real ones of the same size.

    Args:
        args: Arguments of the command.

    Raises:
        ConfigError: If anything that can be known before measuring is wrong with any size.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.networks = args, Networks(args)
        table = read_samples(args.samples, args.prompts)
        with naming({"data.shards": "--reference", "fps": "--fps"}):
            self.index = open_index(args.reference)
            self.prepared = [self._prepare(shape, table) for shape in dict.fromkeys(map(shape_of, table))]
        if args.shards is not None or len(self.prepared) > 1:  # else they are read before anything is measured
            check_samples(args.samples, table)

    def _prepare(self, shape: Shape, table: list[dict[str, Any]]) -> Prepared:
        fps = self.args.fps if shape[0] > 1 else None
        view = ViewConfig(num_frames=shape[0], height=shape[1], width=shape[2], fps=fps)
        mine = [row for row in table if shape_of(row) == shape]
        same_kind = {shape_of(row) for row in table if (row["num_frames"] > 1) == (shape[0] > 1)}
        pairing = pair_up(self.index, view, len(mine), max_clips=self.args.max_clips)
        self.networks.check_counts(pairing)
        return Prepared(mine, pairing, f"_{view}" if len(same_kind) > 1 else "")

    def measure(self) -> list[MetricRow]:
        """Measure all sizes."""
        rows = []
        for one in self.prepared:
            samples = load_samples(self.args.samples, one.rows)
            measured = _measure_shape(self.args, self.networks, samples, self.index, one.pairing)
            facts = shared_facts(one.rows)
            rows += [dataclasses.replace(row, name=row.name + one.suffix, **facts) for row in measured]
        return rows


class OnDevice:
    """A perceptual distance whose inputs come from the CPU.

    Args:
        network: The distance.
        device: Where it is.
    """

    def __init__(self, network: Any, device: str) -> None:
        self._network, self._device = network, device
        self.name, self.preprocessing = network.name, network.preprocessing

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Compare ``(b, 3, t, h, w)`` in [-1, 1]; ``(b,)`` on the CPU."""
        return self._network(x.to(self._device), y.to(self._device)).cpu()


class Networks:
    """Networks that ``--metrics`` needs, built before any sample is read.

    Args:
        args: Arguments of the command.

    Raises:
        ConfigError: If a network cannot be built, or lacks what a metric reads.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.of_frames = [name for name in args.metrics if name in _OF_FRAMES]
        self.of_clips = [name for name in args.metrics if name in _OF_CLIPS]
        self.of_motion = [name for name in args.metrics if name in MOTION_METRICS]
        self.captions: CaptionFeatures | None = None
        self.frames: ClipFeatures | None = None
        self.clips: ClipFeatures | None = None
        self.flow = DenseFlow() if self.of_motion else None
        if self.of_frames or "clip_score" in args.metrics:
            config = parse_features(args.features)
            features = build_features(config, device=args.device)
            self.frames_note = "" if isinstance(config, InceptionFeaturesConfig) else _OTHER.format("Inception")
            if "clip_score" in args.metrics:
                if not isinstance(features, CaptionFeatures):
                    raise ConfigError(
                        f"--features: clip_score needs a CLIP folder (transformers:FOLDER), got {args.features}"
                    )
                self.captions = features
            try:
                self.frames = ClipFeatures(
                    features, frames=FRAMES_SHOWN, outputs=("features", *outputs_of(self.of_frames))
                )
            except ValueError as error:
                raise ConfigError(f"--features: {error}") from error
        if self.of_clips:
            config = parse_features(args.clip_features)
            self.clips = ClipFeatures(build_features(config, device=args.device))
            self.clips_note = "" if isinstance(config, I3dFeaturesConfig) else _OTHER.format("I3D")

    def check_counts(self, pairing: Pairing) -> None:
        """Refuse a size with too few samples for a metric."""
        view = pairing.view
        asked = ((self.frames, self.of_frames), (self.clips, self.of_clips if view.num_frames > 1 else []))
        for features, names in asked:
            for name in names:
                assert features is not None
                try:
                    check_count(name, pairing.num_compared * features.num_vectors(view.num_frames), features.dim)
                except ValueError as error:
                    raise ConfigError(f"--metrics: {view}: {error}") from None

    def measure(self, samples: Clips, reference: Reference, *, seed: int) -> list[MetricRow]:
        """Measure samples of one size; the metrics of clips only where they are clips."""
        rows = []
        suffix = "_frames" if samples.is_video else "_images"
        if self.frames is not None:
            rows += distribution_rows(
                samples, reference, self.frames, self.of_frames, suffix=suffix, seed=seed, note=self.frames_note
            )
            if self.captions is not None:
                rows += caption_rows(samples, reference, self.frames, self.captions.embed_captions, suffix=suffix)
        if samples.is_video and self.clips is not None:
            rows += distribution_rows(samples, reference, self.clips, self.of_clips, seed=seed, note=self.clips_note)
        if samples.is_video and self.flow is not None:
            rows += motion_rows(samples, reference, self.flow, self.of_motion)
        return rows


def _measure_shape(
    args: argparse.Namespace, networks: Networks, samples: Clips, index: Index, pairing: Pairing
) -> list[MetricRow]:
    """Measure samples of one size."""
    view = pairing.view
    counted, reference = read_reference(samples, index, pairing, seed=args.seed)
    pixels = ClipFeatures(build_packaged("pixels"))
    frames = ClipFeatures(build_packaged("efficientnet_lite0", device=args.device), frames=FRAMES_SHOWN)
    kind = "clip" if samples.is_video else "image"
    plan = [(frames, "frechet_frames" if samples.is_video else "frechet_images", "")]
    if samples.is_video:
        motion = ClipFeatures(build_packaged("frame_differences"))
        video = ClipFeatures(build_packaged("transnetv2", device=args.device))
        plan += [(video, "frechet_clips", _BLIND), (motion, "frechet_motion", "")]
    rows = []
    with Progress(len(plan) + 2, f"evaluate {view}", unit="metrics") as progress:
        try:
            rows += networks.measure(counted, reference, seed=args.seed)
        except ValueError as error:
            raise ConfigError(f"--metrics: {view}: {error}") from error
        progress.update()
        for features, name, note in plan:
            rows += frechet_rows(counted, reference, features, name=name, seed=args.seed, note=note)
            progress.update()
        known = _with_known_captions(samples, reference)
        if known is not None:
            for features, name in ((frames, "features"), (pixels, "pixels")):
                rows += retrieval_rows(known, reference, features, name=f"{kind}_retrieval_top1_{name}")
        rows += nearest_rows(samples, reference, pixels, name=f"nearest_training_{kind}", unit="8-bit RMSE")
        progress.update()
    return rows


def _with_known_captions(samples: Clips, reference: Reference) -> Clips | None:
    """Pick the samples whose captions the matched clips have; None where retrieval has no two captions."""
    if reference.matched is None or len(set(reference.matched.captions)) < 2:
        return None
    known = set(reference.matched.captions)
    keep = [i for i, caption in enumerate(samples.captions) if caption in known]
    return samples if len(keep) == len(samples) else samples.take(keep)


def _view(size: str) -> ViewConfig:
    try:
        frames, height, width = (int(part) for part in size.split("x"))
    except ValueError:
        raise ConfigError(f"--size: {size!r} is not FRAMESxHEIGHTxWIDTH, such as 17x64x112") from None
    try:
        return ViewConfig(num_frames=frames, height=height, width=width)
    except ConfigError as error:
        raise ConfigError(f"--size: {error}") from None


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
