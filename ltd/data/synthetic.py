"""Toy data: moving shapes with captions, written as real tars, for debug configurations and tests.

Eight classes, a square or a disc moving right, left, down or up; colour, place and speed vary with the seed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np

from ltd.data.index import index_tar
from ltd.data.write import encode_image, encode_video

SHAPES = ("square", "disc")
DIRECTIONS = {"right": (0.0, 1.0), "left": (0.0, -1.0), "down": (1.0, 0.0), "up": (-1.0, 0.0)}
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (230, 210, 50)}
FPS = 8.0


def num_classes() -> int:
    """Count the classes of shape and direction."""
    return len(SHAPES) * len(DIRECTIONS)


def draw_clip(number: int, *, num_frames: int, height: int, width: int, seed: int) -> tuple[np.ndarray, str, int]:
    """Draw one clip.

    Args:
        number: Number of the clip; ``number % 8`` is its class.
        num_frames: Frames.
        height: Pixels.
        width: Pixels.
        seed: Seed of the data set.

    Returns:
        uint8 ``(t, h, w, 3)``; the caption; the class.
    """
    rng = np.random.default_rng((seed, number))
    label = number % num_classes()
    shape, direction = SHAPES[label // len(DIRECTIONS)], list(DIRECTIONS)[label % len(DIRECTIONS)]
    color = list(COLORS)[int(rng.integers(len(COLORS)))]
    size = np.array([height, width], dtype=np.float64)
    radius = rng.uniform(0.14, 0.22) * size.min()
    velocity = np.array(DIRECTIONS[direction]) * rng.uniform(0.5, 1.0) * size / max(num_frames, 2)
    # The path's middle lies near the centre, so that the shape stays in sight.
    middle = size * rng.uniform(0.42, 0.58, 2)
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    background = rng.uniform(0.05, 0.25) * 255 * (0.6 + 0.4 * rows / height)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for index in range(num_frames):
        y, x = middle + velocity * (index - (num_frames - 1) / 2)
        if shape == "square":
            distance = np.maximum(np.abs(rows - y), np.abs(columns - x)) - radius
        else:
            distance = np.hypot(rows - y, columns - x) - radius
        inside = np.clip(0.5 - distance, 0, 1)[..., None]
        picture = background[..., None] * (1 - inside) + np.array(COLORS[color]) * inside
        frames[index] = np.round(picture).astype(np.uint8)
    return frames, f"a {color} {shape} moving {direction}", label


def make_toy_shards(
    directory: str | Path,
    *,
    num_videos: int,
    num_images: int,
    num_frames: int,
    height: int,
    width: int,
    seed: int,
) -> Path:
    """Write a folder of one tar, with its index; nothing is done where the same was made before.

    Args:
        directory: Folder of the tar; a finished one of other arguments is replaced.
        num_videos: Clips, mp4.
        num_images: Stills, png.
        num_frames: Frames per clip.
        height: Pixels.
        width: Pixels.
        seed: Seed of the data.

    Returns:
        The folder, for ``data.shards``.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    from webdataset import TarWriter

    directory = Path(directory)
    recipe = {"videos": num_videos, "images": num_images, "size": [num_frames, height, width], "seed": seed}
    marker = directory / "toy.json"
    if marker.is_file() and json.loads(marker.read_text("utf-8")) == recipe:
        return directory
    part = directory.with_name(f"{directory.name}.incomplete-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tar = part / "toy.tar"
    with TarWriter(str(tar), encoder=False, mtime=0.0) as writer:
        for number in range(num_videos + num_images):
            video = number < num_videos
            frames, caption, label = draw_clip(
                number, num_frames=num_frames if video else 1, height=height, width=width, seed=seed
            )
            if not video:
                caption = caption.rsplit(" moving", 1)[0]
            media = {"mp4": encode_video(frames, FPS, crf=10)} if video else {"png": encode_image(frames[0])}
            about = json.dumps({"label": label, "source": "synthetic"}).encode()
            writer.write({"__key__": f"toy{number:06d}", "txt": caption.encode(), "json": about, **media})
    index_tar(tar)
    (part / "toy.json").write_text(json.dumps(recipe), "utf-8")
    if directory.exists():
        if any(directory.iterdir()) and not marker.is_file():
            shutil.rmtree(part)
            raise FileExistsError(f"{directory} holds something other than toy shards; choose another folder")
        shutil.rmtree(directory)
    os.replace(part, directory)
    return directory
