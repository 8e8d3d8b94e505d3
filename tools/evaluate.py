"""Measure an autoencoder's reconstructions and a denoiser's samples: python tools/evaluate.py RUN ...

Writes RUN/evaluation.json and prints a table. `--autoencoder PATH --shards HELDOUT` gives PSNR and SSIM; `--samples DIR
--reference TRAIN` gives Frechet distances, caption retrieval and nearest training clips; `--metrics` adds others, from
the network that `--features` (of frames) and `--clip-features` (of clips, for fvd) name. A part that is not asked for
keeps the rows of an earlier call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ltd.autoencoders
from ltd.command import command_line, leave
from ltd.config import ConfigError
from ltd.data import DataConfig, ViewConfig, evaluation_batches
from ltd.data.decode import decode_clip, decode_image
from ltd.data.index import Entry, Index, open_index
from ltd.data.media import decode_cut
from ltd.data.plan import Placement
from ltd.data.windows import enumerate_windows
from ltd.data.write import write_bytes
from ltd.encoders.features import CaptionFeatures, build_features, parse_features
from ltd.encoders.flow import DenseFlow
from ltd.encoders.packaged import build_packaged
from ltd.encoders.perceptual import PerceptualConfig, StLpipsConfig, VggLpipsConfig, build_perceptual
from ltd.encoders.torchscript import I3dFeaturesConfig, InceptionFeaturesConfig
from ltd.evaluation.distribution import DISTRIBUTION_METRICS
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
from ltd.progress import Progress
from ltd.rng import generator

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
        new: list[MetricRow] = []
        if args.shards is not None:
            new += measure_autoencoder(args)
        if args.samples is not None:
            new += measure_samples(args)
        path = args.run / "evaluation.json"
        old = rows_from_json(path.read_text()) if path.is_file() else []
        write_bytes(path, rows_to_json(replace_parts(old, new)).encode())
        print(format_table(new))
    return 0


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
        network = build_perceptual(config, device=args.device)
        perceptual = OnDevice(network, args.device)
    model = ltd.autoencoders.load(args.autoencoder or args.run, weights=args.weights, device=args.device)

    @torch.no_grad()
    def reconstruct(pixels: Tensor) -> Tensor:
        decoded = model.decode(model.encode(pixels_to_video(pixels).to(args.device)).mean)
        return video_to_pixels(decoded).cpu()

    data = DataConfig(shards=args.shards, views=(view,), caption_required=False)
    total = len(enumerate_windows(open_index(args.shards), [view], windows_per_clip=args.windows_per_clip))

    def clips() -> Iterator[Tensor]:
        with Progress(total, "reconstruct", unit="clips") as progress:
            for batch in evaluation_batches(data, batch_size=8, windows_per_clip=args.windows_per_clip):
                assert batch.pixels is not None  # an index of tars holds media
                yield batch.pixels[batch.weight > 0]
                progress.update(len(batch.keys))

    note = f"held-out clips {args.size}, reconstructed from the posterior's mean"
    return autoencoder_rows(clips(), reconstruct, weights=args.weights, perceptual=perceptual, note=note)


def measure_samples(args: argparse.Namespace) -> list[MetricRow]:
    """Hold every kind of sample (clips, images) against real ones of the same size."""
    networks = Networks(args)
    table = read_samples(args.samples, args.prompts)
    index = open_index(args.reference)
    shapes = dict.fromkeys((row["num_frames"], row["height"], row["width"]) for row in table)
    rows = []
    for shape in shapes:
        mine = [row for row in table if (row["num_frames"], row["height"], row["width"]) == shape]
        view = ViewConfig(num_frames=shape[0], height=shape[1], width=shape[2], fps=args.fps if shape[0] > 1 else None)
        same_kind = sum((other[0] > 1) == (shape[0] > 1) for other in shapes)
        suffix = f"_{view}" if same_kind > 1 else ""
        measured = _measure_shape(args, networks, load_samples(args.samples, mine), index, view)
        rows += [dataclasses.replace(row, name=row.name + suffix, **_facts(mine)) for row in measured]
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
    args: argparse.Namespace, networks: Networks, samples: Clips, index: Index, view: ViewConfig
) -> list[MetricRow]:
    """Measure samples of one size."""
    counted, reference = read_reference(samples, index, view, max_clips=args.max_clips, seed=args.seed)
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


def read_samples(directory: Path, prompts: Path | None) -> list[dict[str, Any]]:
    """Read samples.jsonl.

    Args:
        directory: What sample.py wrote.
        prompts: Keep only samples of the prompts in this file; None keeps all.

    Returns:
        Its rows.

    Raises:
        ConfigError: If a file is missing, a row lacks a field or no sample is left.
    """
    path = directory / "samples.jsonl"
    if not path.is_file():
        raise ConfigError(f"--samples: no samples.jsonl in {directory}; needed a directory that sample.py wrote")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    for row in rows:
        missing = {"file", "prompt", "num_frames", "height", "width"} - row.keys()
        if missing:
            raise ConfigError(f"--samples: a row of {path} lacks {', '.join(sorted(missing))}")
    if prompts is not None:
        if not prompts.is_file():
            raise ConfigError(f"--prompts: {prompts} does not exist")
        wanted = {line.strip() for line in prompts.read_text("utf-8").splitlines()}
        rows = [row for row in rows if row["prompt"].strip() in wanted]
    if not rows:
        raise ConfigError(f"--samples: {path} holds no sample" + (f" of a prompt in {prompts}" if prompts else ""))
    return rows


def load_samples(directory: Path, rows: list[dict[str, Any]]) -> Clips:
    """Decode samples of one size.

    Args:
        directory: Where the files are.
        rows: Their rows of samples.jsonl.

    Returns:
        The clips, in the rows' order.

    Raises:
        ConfigError: If a file is missing or not of the size its row says.
    """
    clips = []
    for row in rows:
        path = directory / row["file"]
        if not path.is_file():
            raise ConfigError(f"--samples: {path} is named in samples.jsonl and does not exist")
        data = path.read_bytes()
        is_image = row["num_frames"] == 1
        frames = decode_image(data) if is_image else decode_clip(data, start=0, num_frames=row["num_frames"])
        if frames.shape != (row["num_frames"], row["height"], row["width"], 3):
            raise ConfigError(f"--samples: {path} is {frames.shape}, its row of samples.jsonl says otherwise")
        clips.append(torch.from_numpy(frames.copy()))
    return Clips(torch.stack(clips), tuple(row["prompt"].strip() for row in rows), tuple(row["file"] for row in rows))


def read_reference(
    samples: Clips, index: Index, view: ViewConfig, *, max_clips: int, seed: int
) -> tuple[Clips, Reference]:
    """Draw real clips for samples, and the samples that are compared at equal n.

    Args:
        samples: All samples of one size.
        index: Training tars.
        view: Size of the samples.
        max_clips: Compare at most this many samples.
        seed: Seed of the draws.

    Returns:
        ``n`` samples, evenly spread, and the reference: ``2 n`` windows of all training clips and, where every
        compared sample's prompt is a training caption, ``n`` windows of the clips of these captions.

    Raises:
        ConfigError: If there are fewer than 2 samples or 4 training windows.
    """
    windows = enumerate_windows(index, [view])
    n = min(len(samples), max_clips, len(windows) // 2)
    if n < 2:
        raise ConfigError(
            f"Frechet distances of {view} need 2 samples and 4 training windows or more, "
            f"got {len(samples)} (--samples), {len(windows)} (--reference) and --max-clips {max_clips}"
        )
    counted = samples if n == len(samples) else samples.take([i * len(samples) // n for i in range(n)])
    order = torch.randperm(len(windows), generator=generator(seed, "evaluation pool", str(view)))[: 2 * n].tolist()
    by_caption: dict[str, list[Entry]] = {}
    for entry in index.entries:
        if entry.kind == view.kind and entry.frames >= view.span(entry.fps):
            by_caption.setdefault(index.caption(entry).strip(), []).append(entry)
    pool = _read(index, view, [(windows[i].entry, windows[i].placement) for i in order])
    if not set(counted.captions) <= by_caption.keys():
        return counted, Reference(pool, None)
    random = generator(seed, "evaluation matched", str(view))
    cuts = []
    for caption in counted.captions:
        entries = by_caption[caption]
        entry = entries[int(torch.randint(len(entries), (), generator=random))]
        slack = entry.frames - view.span(entry.fps)
        start = int(torch.randint(slack + 1, (), generator=random))
        cuts.append((entry, Placement(start, view.frame_step(entry.fps), (0.5, 0.5), False)))
    return counted, Reference(pool, _read(index, view, cuts))


def _read(index: Index, view: ViewConfig, cuts: list[tuple[Entry, Placement]]) -> Clips:
    pixels = []
    with Progress(len(cuts), "read real clips", unit="clips") as progress:
        for entry, placement in cuts:
            frames = decode_cut(index.read(entry, entry.media), entry, view, placement)
            pixels.append(torch.from_numpy(frames.copy()))
            progress.update()
    captions = tuple(index.caption(entry).strip() for entry, _ in cuts)
    return Clips(torch.stack(pixels), captions, tuple(f"{entry.shard}/{entry.key}" for entry, _ in cuts))


def _with_known_captions(samples: Clips, reference: Reference) -> Clips | None:
    """Pick the samples whose captions the matched clips have; None where retrieval has no two captions."""
    if reference.matched is None or len(set(reference.matched.captions)) < 2:
        return None
    known = set(reference.matched.captions)
    keep = [i for i, caption in enumerate(samples.captions) if caption in known]
    return samples if len(keep) == len(samples) else samples.take(keep)


def _facts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Collect how the samples were made, where all agree."""
    facts = {}
    for name in ("weights", "steps", "guidance", "seed"):
        values = {row.get(name) for row in rows}
        facts[name] = values.pop() if len(values) == 1 else None
    return facts


def _view(size: str) -> ViewConfig:
    try:
        frames, height, width = (int(part) for part in size.split("x"))
    except ValueError:
        raise ConfigError(f"--size: {size!r} is not FRAMESxHEIGHTxWIDTH, such as 17x64x112") from None
    return ViewConfig(num_frames=frames, height=height, width=width)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
