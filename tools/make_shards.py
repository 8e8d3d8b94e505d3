"""Make WebDataset shards from manifests, folders and globs of media, or index tars that exist. See docs/data.md."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys

from ltd.config import ConfigError
from ltd.data.curate.filters import FilterOptions
from ltd.data.curate.shots import ContentShots, ShotDetector, ShotOptions
from ltd.data.cut import CutOptions
from ltd.data.labels import read_classes
from ltd.data.records import Columns
from ltd.data.shards import ShardOptions, index_existing, make_shards


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="manifest (JSONL, CSV, TSV, Parquet), folder of media, glob in quotes, or (with --index-only) tars",
    )
    parser.add_argument("--out", help="folder of the shards; train/ and heldout/ are made in it")
    parser.add_argument("--media-root", help="folder a manifest's paths are relative to (default: the manifest's)")
    parser.add_argument("--path-column", default="path", help="what the manifests call the media file")
    parser.add_argument("--caption-column", default="caption", help="what the manifests call the caption")
    parser.add_argument("--label-column", default="label", help="what the manifests call the class, number or name")
    parser.add_argument("--classes", help="class list: a text file with one name per line, in the order of the numbers")
    parser.add_argument("--size", type=int, help="short side in pixels that larger media are scaled down to")
    parser.add_argument("--crf", type=int, default=16, help="x264 quality, 0 (lossless) to 51")
    parser.add_argument("--keyframe-every", type=int, default=12, help="frames between key frames")
    parser.add_argument("--shard-size-mb", type=float, default=512.0, help="MiB after which a tar is closed")
    parser.add_argument("--workers", type=int, default=2, help="source files or tars worked on at once")
    parser.add_argument("--index-only", action="store_true", help="write the index beside tars that exist")
    shots = parser.add_argument_group("shots of whole videos")
    shots.add_argument("--shots", choices=("none", "content", "transnet"), default="none", help="how they are found")
    shots.add_argument("--shot-threshold", type=float, help="the detector's (content: 3, transnet: 0.5)")
    shots.add_argument("--min-shot-s", type=float, default=0.5, help="shorter shots are left out, seconds")
    shots.add_argument("--max-shot-s", type=float, help="longer shots are split evenly, seconds")
    shots.add_argument("--device", default="cpu", help="where transnet runs")
    limits = parser.add_argument_group("filters (length limits are for clips only)")
    for name, kind, text in (
        ("side", int, "short side of the source, pixels"),
        ("aspect", float, "width over height of the source"),
        ("duration-s", float, "length of a clip, seconds"),
        ("frames", int, "length of a clip, frames"),
    ):
        for end in ("min", "max"):
            limits.add_argument(f"--{end}-{name}", type=kind, help=f"{end}imum {text}")
    limits.add_argument("--dedupe-bits", type=int, help="leave out media whose hash differs in so many of 64 bits")
    return parser.parse_args(arguments)


def build_options(args: argparse.Namespace) -> ShardOptions:
    """Make options of the command line."""
    return ShardOptions(
        cut=CutOptions(size=args.size, crf=args.crf, keyframe_every=args.keyframe_every),
        shots=ShotOptions(min_shot_s=args.min_shot_s, max_shot_s=args.max_shot_s),
        filters=FilterOptions(**{item.name: getattr(args, item.name) for item in dataclasses.fields(FilterOptions)}),
        shard_size_mb=args.shard_size_mb,
        workers=args.workers,
    )


def build_detector(args: argparse.Namespace) -> ShotDetector | None:
    """Make the shot detector; None where shots are not looked for."""
    threshold = {} if args.shot_threshold is None else {"threshold": args.shot_threshold}
    match args.shots:
        case "content":
            return ContentShots(**threshold)
        case "transnet":
            from ltd.encoders.shots import TransNetShots  # torch takes seconds that the others need not wait for

            return TransNetShots(**threshold, device=args.device)
    for name, value, default in (
        ("--shot-threshold", args.shot_threshold, None),
        ("--min-shot-s", args.min_shot_s, 0.5),
        ("--max-shot-s", args.max_shot_s, None),
    ):
        if value != default:
            raise ConfigError(f"{name}: got {value}, but no shots are looked for; needed --shots content or transnet")
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        options = build_options(args)
        if args.index_only:
            counts = index_existing(args.sources, workers=args.workers)
            print(f"{counts['tars']} tars, {counts['samples']} samples; left out: {counts['bad'] or 'none'}")
            return 0
        if not args.out:
            raise ConfigError("--out: missing, needed the folder to write the shards to")
        make_shards(
            args.sources,
            args.out,
            options=options,
            media_root=args.media_root,
            columns=Columns(path=args.path_column, caption=args.caption_column, label=args.label_column),
            classes=read_classes(args.classes, "--classes"),
            detector=build_detector(args),
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
