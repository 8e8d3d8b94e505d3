"""A mistake, what must come of it, and how the proof ``bad_input`` makes one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import train
from ltd.data.synthetic import make_toy_shards

ROOT = Path(__file__).resolve().parents[2]
AUTOENCODER = str(ROOT / "configs" / "debug" / "autoencoder.yaml")
DENOISER = str(ROOT / "configs" / "debug" / "denoiser.yaml")
VIEWS = "data.views=[{num_frames: %d, height: 32, width: 32}]"


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    message: str


@dataclass(frozen=True)
class Case:
    """A mistake and what must come of it."""

    name: str
    act: Callable[[Path], Outcome]
    code: int
    #: Texts that the message must hold: what, got, needed, which field.
    expected: tuple[str, ...]


def call(main: Callable[[list[str]], int], *arguments: str) -> Outcome:
    """Run a command in this process.

    Args:
        main: Entry point.
        arguments: Its arguments.

    Returns:
        Exit code and what it wrote to standard error.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            code = main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("error:")]
    return Outcome(code, lines[-1] if lines else "")


def train_toy(folder: Path, *overrides: str, config: str = AUTOENCODER, steps: int = 2) -> Outcome:
    """Train on the toy data of ``folder`` in this process."""
    common = [f"run_dir={folder / 'run'}", f"data.shards={folder / 'train'}", f"steps={steps}", "evaluation.every=0"]
    return call(train.main, config, *common, "parallel.engine=torch", "num_threads=null", *overrides)


def toy(folder: Path, count: int = 8) -> Path:
    """Make a training set of ``count`` clips of 9 frames and as many stills."""
    make_toy_shards(folder / "train", num_videos=count, num_images=count, num_frames=9, height=32, width=32, seed=0)
    return next((folder / "train").glob("*.tar"))
