"""Sample images and videos from a trained denoiser: python sample.py RUN --prompts FILE --out DIR."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ltd.command import command_line
from ltd.config import ConfigError
from ltd.data.write import write_image, write_video
from ltd.diffusion import GuidanceConfig, SamplerConfig
from ltd.inference.generate import Request, batches, load_generator, read_run_parts
from ltd.inference.media import tile
from ltd.progress import Progress
from ltd.shapes import VideoShape


def parse(arguments: list[str]) -> argparse.Namespace:
    """Define and read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", help="run directory of a denoiser")
    parser.add_argument("--prompts", required=True, type=Path, help="text file, one prompt per line")
    parser.add_argument("--out", required=True, type=Path, help="directory for the files, samples.jsonl and grid.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-prompt", type=int, default=1, help="samples of each prompt and shape")
    parser.add_argument("--shapes", help="FRAMESxHEIGHTxWIDTH,... ; the run's training views if left out")
    parser.add_argument("--steps", type=int, default=50, help="solver steps")
    parser.add_argument("--solver", choices=("euler", "heun"), default="euler")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance scale; 1 is off")
    parser.add_argument("--negative", default="", help="prompt to lead away from")
    parser.add_argument("--weights", default="ema", help="ema, raw, or the name of one average")
    parser.add_argument("--autoencoder", help="where the autoencoder is, if not where the run's config says")
    parser.add_argument("--fps", type=float, help="frames per second of the videos; the view's, or 24")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def plan(args: argparse.Namespace) -> list[Request]:
    """List what to make.

    Args:
        args: The arguments.

    Returns:
        One request per shape, prompt and repetition.

    Raises:
        ConfigError: If the prompt file or a shape is unusable.
    """
    if not args.prompts.is_file():
        raise ConfigError(f"--prompts: {args.prompts} does not exist")
    prompts = [line.strip() for line in args.prompts.read_text("utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts: {args.prompts} holds no prompt; needed one per line")
    for name in ("per_prompt", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(args, name)}")
    views = read_run_parts(args.run).views
    if args.shapes:
        known = dict(views)
        views = tuple((shape, known.get(shape)) for shape in map(_shape, args.shapes.split(",")))
    return [
        Request(prompt=prompt, repetition=k, shape=shape, fps=args.fps or fps or 24.0)
        for shape, fps in views
        for prompt in prompts
        for k in range(args.per_prompt)
    ]


def main(arguments: list[str]) -> int:
    """Generate, write one file per sample, samples.jsonl and a grid; returns the exit code."""
    args = parse(arguments)
    with command_line():
        requests = plan(args)
        sampler = SamplerConfig(kind=args.solver, steps=args.steps, guidance=GuidanceConfig(scale=args.guidance))
        generator = load_generator(
            args.run,
            sampler=sampler,
            weights=args.weights,
            negative=args.negative,
            autoencoder=args.autoencoder,
            device=args.device,
        )
        args.out.mkdir(parents=True, exist_ok=True)
        rows, tiles = [], []
        with Progress(len(requests), "sample", unit="samples") as progress:
            for batch in batches(requests, args.batch_size):
                for request, frames in zip(batch, generator.generate(batch, seed=args.seed).numpy(), strict=True):
                    rows.append(_write(args, request, len(rows), frames))
                    tiles.append(frames[len(frames) // 2])
                progress.update(len(batch))
        (args.out / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_image(args.out / "grid.png", tile(tiles))
    return 0


def _shape(text: str) -> VideoShape:
    try:
        frames, height, width = (int(part) for part in text.split("x"))
        return VideoShape(frames, height, width)
    except ValueError:
        raise ConfigError(f"--shapes: {text!r} is not FRAMESxHEIGHTxWIDTH, such as 17x64x112") from None


def _write(args: argparse.Namespace, request: Request, number: int, frames) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """Write one sample's file; returns its row of samples.jsonl."""
    is_image = request.shape.num_frames == 1
    name = f"{number:04d}.{'png' if is_image else 'mp4'}"
    if is_image:
        write_image(args.out / name, frames[0])
    else:
        write_video(args.out / name, frames, fps=request.fps)
    return {
        "file": name,
        "prompt": request.prompt,
        "repetition": request.repetition,
        "seed": args.seed,
        "steps": args.steps,
        "solver": args.solver,
        "guidance": args.guidance,
        "negative": args.negative,
        "weights": args.weights,
        "num_frames": request.shape.num_frames,
        "height": request.shape.height,
        "width": request.shape.width,
        "fps": request.fps,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
