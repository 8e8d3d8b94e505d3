"""Real clips that samples are held against: drawn once, as few of a clip as suffice, dealt to any processes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from ltd.config import ConfigError
from ltd.data import DataConfig, ViewConfig
from ltd.data.index import open_index
from ltd.data.latent_join import finish_cache
from ltd.data.real_clips import RealClips
from ltd.data.synthetic import make_toy_shards
from ltd.data.windows import enumerate_windows
from tests.data.latent_cases import write

VIEW = ViewConfig(num_frames=5, height=32, width=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("real") / "train"
    make_toy_shards(folder, num_videos=18, num_images=4, num_frames=9, height=32, width=32, seed=0)
    return DataConfig(shards=str(folder))


def test_the_same_clips_are_dealt_to_any_number_of_processes(data: DataConfig) -> None:
    clips = RealClips(data, VIEW, needed=12, seed=3)
    whole = list(clips.batches(batch_size=5, global_rank=0, world_size=1))
    shares = [list(clips.batches(batch_size=5, global_rank=rank, world_size=2)) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    for number, batch in enumerate(whole):
        other = shares[number % 2][number // 2]
        assert batch.keys == other.keys and batch.draws == other.draws
        assert batch.pixels is not None and other.pixels is not None and batch.pixels.equal(other.pixels)
    assert not any(shares[1][1].weight), "the last process's last batch is filled up"
    assert clips.told(0, 0.5)[0] == whole[0].captions[0] and len(clips) == 12


def test_as_few_windows_of_a_clip_are_drawn_as_suffice(data: DataConfig) -> None:
    def most(view: ViewConfig, needed: int) -> int:
        (batch,) = RealClips(data, view, needed=needed, seed=0).batches(batch_size=60, global_rank=0, world_size=1)
        return max(Counter(key for key in batch.keys if key).values())

    short = ViewConfig(num_frames=3, height=32, width=32)  # three windows of each of 18 clips
    assert [most(short, needed) for needed in (18, 30, 54)] == [1, 2, 3]
    assert len(RealClips(data, short, needed=99, seed=0)) == 54, "as many as there are"


def test_the_digest_tells_data_and_cuts_apart(data: DataConfig, tmp_path: Path) -> None:
    make_toy_shards(tmp_path / "other", num_videos=18, num_images=4, num_frames=9, height=32, width=32, seed=1)
    other = DataConfig(shards=str(tmp_path / "other"))
    wide = ViewConfig(num_frames=5, height=16, width=32)
    found = {
        RealClips(of, view, needed=needed, seed=seed).digest
        for of, view, needed, seed in (
            (data, VIEW, 12, 3),
            (data, VIEW, 12, 4),
            (data, VIEW, 11, 3),
            (data, wide, 12, 3),
            (other, VIEW, 12, 3),
        )
    }
    assert len(found) == 5 and RealClips(data, VIEW, needed=12, seed=3).digest in found


def test_a_latent_cache_has_no_clips(data: DataConfig, tmp_path: Path) -> None:
    assert data.shards is not None
    index = open_index(data.shards)
    write(tmp_path / "cache", index, enumerate_windows(index, [VIEW]))
    finish_cache(tmp_path / "cache")
    with pytest.raises(ConfigError, match="is a latent cache, which holds no pixels"):
        RealClips(DataConfig(shards=str(tmp_path / "cache")), VIEW, needed=4, seed=0)
