"""Make WebDataset shards from a JSONL manifest or a folder of media, or index tars that exist. See docs/data.md."""

from __future__ import annotations

import argparse
import logging
import sys

from ltd.config import ConfigError
from ltd.data.cut import CutOptions
from ltd.data.shards import ShardOptions, index_existing, make_shards


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("source", help="JSONL manifest, folder of media, or (with --index-only) tars")
    parser.add_argument("--out", help="folder of the shards; train/ and heldout/ are made in it")
    parser.add_argument("--media-root", help="folder the manifest's paths are relative to (default: the manifest's)")
    parser.add_argument("--size", type=int, help="short side in pixels that larger media are scaled down to")
    parser.add_argument("--crf", type=int, default=16, help="x264 quality, 0 (lossless) to 51")
    parser.add_argument("--keyframe-every", type=int, default=12, help="frames between key frames")
    parser.add_argument("--shard-size-mb", type=float, default=512.0, help="MiB after which a tar is closed")
    parser.add_argument("--workers", type=int, default=2, help="source files worked on at once")
    parser.add_argument("--index-only", action="store_true", help="write the index beside tars that exist")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if args.index_only:
            counts = index_existing(args.source)
            print(f"{counts['tars']} tars, {counts['samples']} samples; left out: {counts['bad'] or 'none'}")
            return 0
        if args.out is None:
            raise ConfigError("--out: missing, needed the folder to write the shards to")
        cut = CutOptions(size=args.size, crf=args.crf, keyframe_every=args.keyframe_every)
        options = ShardOptions(cut=cut, shard_size_mb=args.shard_size_mb, workers=args.workers)
        make_shards(args.source, args.out, options=options, media_root=args.media_root)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
