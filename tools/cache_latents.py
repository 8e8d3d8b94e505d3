"""Encode shards once into a latent cache: python tools/cache_latents.py CONFIG [dotted.key=value ...].

Start it alone or with torchrun; an interrupted job goes on where it stopped.
"""

from __future__ import annotations

import sys

from ltd import config
from ltd.command import command_line, leave
from ltd.inference.cache import CacheConfig, build_caches


def main(arguments: list[str]) -> int:
    """Read the configuration and build the caches; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    with command_line():
        for cache in build_caches(config.load(CacheConfig, arguments[0], arguments[1:])):
            print(cache)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
