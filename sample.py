"""Sample images and videos from a trained denoiser: python sample.py RUN --prompts FILE (--labels CLASSES) --out DIR.

Start it alone or with torchrun; the same command again makes what is missing. Exit code 1: some samples failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from ltd import storage
from ltd.command import command_line, leave
from ltd.config import ConfigError
from ltd.denoisers import TASKS
from ltd.diffusion import GuidanceConfig, SamplerConfig, ShiftConfig
from ltd.inference.conditions import label_prompts, parse_pair
from ltd.inference.generate import Generator, Request, check_guide, load_generator
from ltd.inference.jobs import SampleJob, agree, run_job
from ltd.inference.known import COUNTED, Given
from ltd.inference.options import check_device, refuse_idle
from ltd.inference.run_parts import RunParts, find_weights, read_run_parts
from ltd.inference.tiling import TilingConfig
from ltd.parallel import Layout, ParallelConfig, ProcessLostError
from ltd.parallel.heartbeat import open_watched
from ltd.shapes import VideoShape


def parse(arguments: list[str]) -> argparse.Namespace:
    """Define and read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "run", help="run directory of a denoiser, one of its checkpoints, or the folder it was converted to"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help='text file, one prompt per line; or {"prompt": ..., "task": ..., "condition": FILE or [FILES]}',
    )
    parser.add_argument(
        "--condition", nargs="+", help="image or video that is known of every sample; of first_last two"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        help="classes: numbers, names, or a text file with one per line; with --prompts one for all or one for each",
    )
    parser.add_argument("--original-size", help="HEIGHTxWIDTH that the denoiser is told as the source's; its own")
    parser.add_argument("--crop", default="0,0", help="TOP,LEFT in pixels that the denoiser is told were cut off")
    parser.add_argument("--task", choices=TASKS[1:], help="what is known of it; image_to_video if left out")
    parser.add_argument(
        "--known",
        type=int,
        default=1,
        help="latent frames (in patches) that extension and retrodiction keep; of interpolation, every how many",
    )
    parser.add_argument("--segments", type=int, default=1, help="videos of so many clips, each going on from the last")
    parser.add_argument("--overlap", type=int, default=1, help="latent frames (in patches) that a segment begins with")
    parser.add_argument(
        "--box", help="hole of inpainting in pixels: TOP,LEFT,HEIGHT,WIDTH; the middle half if left out"
    )
    parser.add_argument("--out", required=True, type=Path, help="directory for the files, samples.jsonl and grid.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-prompt", type=int, default=1, help="samples of each prompt and shape")
    parser.add_argument("--shapes", help="FRAMESxHEIGHTxWIDTH,... ; the training views if left out")
    parser.add_argument("--steps", type=int, default=50, help="solver steps")
    parser.add_argument("--solver", choices=get_args(get_type_hints(SamplerConfig)["kind"]), default="euler")
    parser.add_argument("--order", type=int, choices=(1, 2, 3), default=2, help="of unipc")
    parser.add_argument("--noise", type=float, default=1.0, help="strength of the noise of sde")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance scale; 1 is off")
    parser.add_argument("--guidance-interval", help="LOW,HIGH: times (1 is noise) between which guidance acts")
    parser.add_argument(
        "--guidance-rescale", type=float, default=0.0, help="share of the guided result that is rescaled"
    )
    parser.add_argument("--guidance-channels", type=int, help="guide only so many channels of the latents")
    parser.add_argument("--guide", help="run of a weaker denoiser to lead away from instead of the negative prompt")
    parser.add_argument(
        "--grid", choices=get_args(get_type_hints(SamplerConfig)["grid"]), default="even", help="of the times"
    )
    parser.add_argument("--shift", type=float, help="factor of the time shift; the training's if left out")
    parser.add_argument("--negative", default="", help="prompt to lead away from")
    parser.add_argument(
        "--cut-prompts", action="store_true", help="cut prompts that the text encoder cannot read whole, or refuse them"
    )
    parser.add_argument("--weights", default="ema", help="ema, raw, or the name of one average")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the denoiser")
    parser.add_argument("--autoencoder", help="where the autoencoder is, if not where the run's config says")
    parser.add_argument("--tile", help="HEIGHTxWIDTH in pixels: decode in tiles of this size, chunk by chunk in time")
    parser.add_argument(
        "--tile-overlap",
        default="64",
        help="pixels that neighbouring tiles share, or exact: as many as the whole frame's result needs",
    )
    parser.add_argument("--fps", type=float, help="frames per second of the videos; the view's, or 24")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--sequence", type=int, default=1, help="processes that share the tokens of one sample (parallel.sequence)"
    )
    parser.add_argument(
        "--timeout", type=float, default=3600.0, help="seconds that processes wait for one that does not come"
    )
    args = parser.parse_args(arguments)
    # Once more without defaults: which were given.
    absent = object()
    parser.set_defaults(**dict.fromkeys(vars(args), absent))
    args.given = frozenset(name for name, value in vars(parser.parse_args(arguments)).items() if value is not absent)
    return args


def plan(args: argparse.Namespace) -> list[Request]:
    """List what to make.

    Args:
        args: The arguments.

    Returns:
        One request per shape, prompt and repetition.

    Raises:
        ConfigError: If the prompt file or a shape is unusable.
    """
    lines, labels = read_told(args)
    parts = read_run_parts(args.run)
    if parts.text is not None and args.prompts is None:
        raise ConfigError("--prompts: missing, but the denoiser takes text; needed a file with one prompt per line")
    prompts = [_prompt(line, args) for line in lines] if lines else [_prompt("", args)] * len(labels)
    classed = parts.text is None and parts.num_classes is not None
    if classed and (not labels or any(prompt for prompt, _ in prompts)):
        raise ConfigError("--prompts: changes nothing here, the denoiser takes classes and no text; needed --labels")
    told = label_prompts(
        [p for p, _ in prompts], labels, parts.num_classes, parts.lineage.get("classes", ()), "--labels"
    )
    numbers = {
        "original": None if args.original_size is None else parse_pair(args.original_size, "x", "--original-size"),
        "crop": parse_pair(args.crop, ",", "--crop"),
    }
    if numbers["original"] is not None and 0 in numbers["original"]:
        raise ConfigError(f"--original-size: got {args.original_size!r}, needed 1 or more pixels")
    return [
        Request(
            **{"prompt": prompt, "repetition": k, "shape": shape, "fps": args.fps or fps or 24.0, "given": given},
            **{"label": label, "class_name": name},
            **numbers,
        )
        for shape, fps in _views(args, parts)
        for (prompt, given), (label, name) in zip(prompts, told, strict=True)
        for k in range(args.per_prompt)
    ]


def read_told(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Read prompts and classes, and check the numbers that need no run.

    Args:
        args: The arguments.

    Returns:
        Lines of the prompt file, and classes; one of them may be empty.

    Raises:
        ConfigError: If there are neither, a file is unusable, or a number is.
    """
    if args.prompts is None and args.labels is None:
        raise ConfigError("--prompts: missing, needed a file with one prompt per line, or --labels")
    lines, labels = _lines(args.prompts, "--prompts"), read_labels(args.labels)
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise ConfigError(f"--fps: must be above 0 and finite, got {args.fps}")
    if args.prompts is not None and not lines:
        raise ConfigError(f"--prompts: {args.prompts} holds no prompt; needed one per line")
    if args.labels is not None and not labels:
        raise ConfigError(f"--labels: {args.labels[0]} holds no class; needed one per line")
    if args.segments > 1 and args.sequence > 1:
        raise ConfigError(f"--segments: got {args.segments} with --sequence {args.sequence}; needed one of them at 1")
    for name in ("per_prompt", "batch_size", "segments", "overlap"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(args, name)}")
    return lines, labels


def _views(args: argparse.Namespace, parts: RunParts) -> list[tuple[VideoShape, float | None]]:
    """List the sizes to make with their frames per second: as told, or the training views."""
    if not args.shapes and not parts.views:
        raise ConfigError(
            f"--shapes: missing, and {args.run} has no training views (data.batching.kind is {parts.batching}); "
            "needed FRAMESxHEIGHTxWIDTH,..."
        )
    known = dict(parts.views)
    told = map(_shape, args.shapes.split(",")) if args.shapes else known
    return [(shape, known.get(shape)) for shape in told]


def read_labels(given: list[str] | None) -> list[str]:
    """Read the classes: as they are, or out of one text file."""
    if given is not None and len(given) == 1 and Path(given[0]).is_file():
        return _lines(Path(given[0]), "--labels")
    return given or []


def _lines(path: Path | None, option: str) -> list[str]:
    """Read the lines of a file that are not empty; none without a file."""
    if path is None:
        return []
    if not path.is_file():
        raise ConfigError(f"{option}: {path} does not exist")
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}: {path} is not UTF-8: {error}") from None


def _prompt(line: str, args: argparse.Namespace) -> tuple[str, Given | None]:
    """Read one line of the prompts: plain, or JSON with what is known of the sample."""
    row: dict[str, Any] = {"prompt": line}
    if line.startswith("{"):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"--prompts: a line is not JSON: {error}: {line[:80]}") from None
        unknown = sorted(row.keys() - {"prompt", "task", "condition", "known", "box"})
        if unknown or not isinstance(row.get("prompt"), str):
            raise ConfigError(f"--prompts: got {unknown or 'no prompt'} in {line[:80]}, needed prompt, task, condition")
    files = row.get("condition", args.condition)
    if not isinstance(files, str | list | None):
        raise ConfigError(f"--prompts: got condition {files!r} in {line[:80]}, needed a file or a list of files")
    if files is None:
        if row.get("task", args.task):
            raise ConfigError(f"--task: {row.get('task', args.task)} needs --condition FILE")
        if idle := sorted(row.keys() & {"known", "box"}):
            raise ConfigError(f"--prompts: got {idle[0]} without condition in {line[:80]}; needed both")
        return row["prompt"], None
    task, box = row.get("task", args.task) or "image_to_video", row.get("box", args.box)
    given = Given(
        task=task,
        media=(files,) if isinstance(files, str) else tuple(files),
        known=row.get("known", args.known),
        box=None if box is None else _box(box),
    )
    if "known" in row and task not in COUNTED:
        raise ConfigError(f"--prompts: got known for task {task} in {line[:80]}; needed one of {sorted(COUNTED)}")
    return row["prompt"], given


def _box(given: str | list[int]) -> tuple[int, int, int, int]:
    text = given if isinstance(given, str) else str(given).strip("[]")
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"--box: got {given!r}, needed TOP,LEFT,HEIGHT,WIDTH in pixels")
    top, left, height, width = map(int, parts)
    return top, left, height, width


def read_job(
    named: argparse.Namespace,
) -> tuple[argparse.Namespace, SampleJob, SamplerConfig, TilingConfig | None]:
    """Read what to make and how; a mistake is an error before any work.

    Args:
        named: The arguments.

    Returns:
        The arguments with the checkpoints that run and guide mean now, which a run that goes on does not change; what
        to make, with which solver, and in which tiles.

    Raises:
        ConfigError: If an argument is unusable, or changes nothing.
    """
    read_told(named)  # what needs no run is said before one is looked for
    args = argparse.Namespace(**vars(named))
    args.run = find_weights(named.run)
    args.guide = None if named.guide is None else find_weights(named.guide)
    requests = tuple(plan(args))
    refuse_idle(args, args.given, read_run_parts(args.run), requests)
    if args.guide is not None:
        check_guide(args.run, args.guide)
    apart = ["given", "out", "device", "timeout"]
    # What earlier releases did not know stands in request.json only where it is given.
    apart += [
        name for name, off in (("labels", None), ("original_size", None), ("crop", "0,0")) if vars(args)[name] == off
    ]
    identity = {name: str(value) for name, value in vars(named).items() if name not in apart}
    identity["prompts"] = "" if args.prompts is None else args.prompts.read_text("utf-8")
    if args.labels is not None:
        identity["labels"] = ",".join(read_labels(args.labels))
    media = sorted({path for request in requests if request.given for path in request.given.media})
    identity["media"] = ",".join(storage.sha256_file(Path(path)) for path in media)
    identity["checkpoint"] = identify(args.run) + (identify(args.guide) if args.guide else "")
    columns = ["seed", "steps", "solver", "guidance", "negative", "weights", "precision"]
    columns += ["segments", "overlap"] if args.segments > 1 else []
    job = SampleJob(
        requests=requests,
        out=args.out,
        seed=args.seed,
        batch_size=args.batch_size,
        identity=identity,
        columns={name: getattr(args, name) for name in columns},
        segments=args.segments,
        overlap=args.overlap,
        cut_prompts=args.cut_prompts,
    )
    return args, job, read_sampler(args), read_tiling(args)


def load(
    args: argparse.Namespace, sampler: SamplerConfig, tiling: TilingConfig | None, device: torch.device | str
) -> Generator:
    """Load what one process samples with."""
    return load_generator(
        args.run,
        sampler=sampler,
        weights=args.weights,
        negative=args.negative,
        autoencoder=args.autoencoder,
        precision=args.precision,
        device=device,
        tiling=tiling,
        guide=args.guide,
    )


def pick_device(args: argparse.Namespace, layout: Layout) -> torch.device | str:
    """Say where this process computes: as told if it is alone, else on its own device of the kind that was told."""
    if layout.world_size == 1 or args.device == "cpu":
        return args.device
    if args.device != layout.device.type:
        raise ConfigError(
            f"--device: got {args.device} for {layout.world_size} processes, each of which takes its own; needed "
            f"{layout.device.type} or cpu"
        )
    return layout.device


def main(arguments: list[str]) -> int:
    """Make the samples that are missing, one file each, with samples.jsonl and a grid; returns the exit code."""
    args = parse(arguments)
    with command_line(ProcessLostError):
        parallel = ParallelConfig(sequence=args.sequence, timeout_s=args.timeout)
        with open_watched(parallel) as (layout, beat):
            read = agree(layout, lambda: read_job(args) if layout.is_main else None)
            found, job, sampler, tiling = layout.broadcast_object(read)
            device = agree(layout, lambda: check_device(pick_device(args, layout)))
            failed = run_job(job, lambda: load(found, sampler, tiling, device), layout, beat)
            return 1 if failed and layout.is_main else 0


def read_sampler(args: argparse.Namespace) -> SamplerConfig:
    """Read the solver and guidance; the shift is the training's if none is given."""
    low, comma, high = (args.guidance_interval or "0,1").partition(",")
    try:
        interval = (float(low), float(high if comma else "nan"))
    except ValueError:
        interval = (math.nan, math.nan)
    if not math.isfinite(sum(interval)):
        raise ConfigError(f"--guidance-interval: got {args.guidance_interval!r}, needed LOW,HIGH such as 0.1,0.9")
    with _flags("--guidance-"):
        guidance = GuidanceConfig(
            scale=args.guidance,
            interval=interval,
            channels=args.guidance_channels,
            rescale=args.guidance_rescale,
        )
    with _flags("--shift "):
        shift = None if args.shift is None else ShiftConfig(factor=args.shift)
    with _flags("--"):
        return SamplerConfig(
            kind=args.solver,
            steps=args.steps,
            order=args.order,
            noise=args.noise,
            grid=args.grid,
            shift=shift or read_run_parts(args.run).shift,
            guidance=guidance,
        )


@contextlib.contextmanager
def _flags(prefix: str) -> Iterator[None]:
    """Name the option in the errors of a config that options fill."""
    try:
        yield
    except ConfigError as error:
        # The scale is the option that the others of guidance are named after.
        raise ConfigError(f"{prefix}{error}".replace("--guidance-scale:", "--guidance:")) from None


def read_tiling(args: argparse.Namespace) -> TilingConfig | None:
    """Read the tiles that frames are decoded in; None where they are decoded whole."""
    if args.tile is None:
        return None
    height, by, width = args.tile.partition("x")
    if not (by and height.isdigit() and width.isdigit()):
        raise ConfigError(f"--tile: got {args.tile!r}, needed HEIGHTxWIDTH in pixels, such as 512x512")
    overlap = args.tile_overlap
    if overlap != "exact" and not overlap.isdigit():
        raise ConfigError(f"--tile-overlap: got {overlap!r}, needed pixels, or exact")
    return TilingConfig(tile=(int(height), int(width)), overlap="exact" if overlap == "exact" else int(overlap))


def identify(weights: Path) -> str:
    """Name the weights of a checkpoint, or of a converted one, by a hash of what it holds."""
    return storage.sha256_file(weights / "config.yaml") if storage.is_export(weights) else storage.fingerprint(weights)


def _shape(text: str) -> VideoShape:
    try:
        frames, height, width = (int(part) for part in text.split("x"))
        return VideoShape(frames, height, width)
    except ValueError:
        raise ConfigError(f"--shapes: {text!r} is not FRAMESxHEIGHTxWIDTH, such as 17x64x112") from None


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
