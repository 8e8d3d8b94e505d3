"""The ledger's advice on a run whose bad sources are known: they were planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from webdataset import TarWriter

import train
from ltd.data.index import index_tar
from ltd.data.synthetic import draw_clip
from ltd.data.write import encode_image
from ltd.tracking.ledger import read_ledger

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "debug" / "denoiser.yaml")


def shapes(seed: int, count: int = 24) -> list[tuple[np.ndarray, str]]:
    """Draw stills with their captions."""
    return [draw_clip(number, num_frames=1, height=32, width=32, seed=seed)[:2] for number in range(count)]


def write_source(folder: Path, samples: list[tuple[np.ndarray, str]]) -> None:
    folder.mkdir()
    with TarWriter(str(folder / "s.tar"), encoder=False, mtime=0.0) as writer:
        for number, (frames, caption) in enumerate(samples):
            media = {"png": encode_image(frames[0])}
            writer.write({"__key__": f"s{number:04d}", "txt": caption.encode(), **media})
    index_tar(folder / "s.tar")


def test_noise_is_for_quarantine_and_copies_of_one_flat_picture_for_less_weight(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [(rng.integers(0, 256, frames.shape, dtype=np.uint8), caption) for frames, caption in shapes(4)]
    flat = [(np.full((1, 32, 32, 3), 90, np.uint8), "a grey wall")]
    sources = {"a": shapes(1), "b": shapes(2), "c": shapes(3), "noise": noise, "copies": flat * 24}
    for name, samples in sources.items():
        write_source(tmp_path / name, samples)
    sets = ", ".join(f"{{shards: {tmp_path / name}, name: {name}}}" for name in sources)
    arguments = [f"run_dir={tmp_path / 'run'}", f"data.datasets=[{sets}]", "steps=200", "data.global_batch=10"]
    arguments += ["data.views=[{num_frames: 1, height: 32, width: 32}]", "evaluation.every=0", "optim.lr=3e-3"]
    arguments += ["checkpoint.every=200", "accounting.ledger_every=20", "parallel.engine=torch"]
    assert train.main([CONFIG, *arguments]) == 0
    found = {row.name.split("/")[0]: row for row in read_ledger(tmp_path / "run").sources()}
    assert found["noise"].relative > 2 and found["noise"].advice.startswith("quarantine")
    assert found["copies"].relative < 0.7 and found["copies"].advice.startswith("lower its weight")
    assert not any(found[name].advice for name in "abc")
