"""Train an autoencoder or a denoiser: python train.py CONFIG [dotted.key=value ...].

A W&B sweep's --dotted.key=value is read as dotted.key=value. Start it alone, with torchrun, or with deepspeed;
see launch/.
"""

from __future__ import annotations

import sys

from ltd import config
from ltd.command import command_line, leave
from ltd.parallel.interface import ProcessLostError
from ltd.training import autoencoder, denoiser
from ltd.training.guards import GuardError


def main(arguments: list[str]) -> int:
    """Read the configuration and run its stage; returns the exit code."""
    arguments = [item for item in arguments if not item.startswith("--local_rank")]  # the deepspeed launcher's
    arguments = [item.removeprefix("--") if item.startswith("--") and "=" in item else item for item in arguments]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    with command_line(GuardError, ProcessLostError):
        match config.load(autoencoder.AutoencoderRun | denoiser.DenoiserRun, arguments[0], arguments[1:]):
            case autoencoder.AutoencoderRun() as run:
                autoencoder.run(run)
            case denoiser.DenoiserRun() as run:
                denoiser.run(run)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
