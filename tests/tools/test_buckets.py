from __future__ import annotations

from pathlib import Path

import pytest

from ltd.data.synthetic import make_toy_shards
from tools import buckets

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "debug" / "denoiser.yaml")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("toy") / "shards"
    return str(make_toy_shards(folder, num_videos=12, num_images=20, num_frames=11, height=40, width=48, seed=0))


def test_buckets_are_shown_with_share_batch_and_crop(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    batching = "{kind: buckets, tokens: 100, token: [4, 8, 8], multiple: 2, sides: [32], frames: [1, 9, 17]}"
    assert buckets.main([CONFIG, f"data.shards={shards}", f"data.batching={batching}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    clip, still = (line.split("|")[1:-1] for line in lines[2:4])
    assert [cell.strip() for cell in clip[:5]] == ["9x24x32", "12", "37.5", "36", "2"]  # 3 x 3 x 4 tokens of 100
    assert clip[5].strip() == "28.0" and float(clip[6]) == pytest.approx(10.0, abs=0.05)  # 6:5 cut to 4:3
    assert float(clip[7]) == pytest.approx(100 * 2 / 11, abs=0.05)
    assert [cell.strip() for cell in still[:5]] == ["1x24x32", "20", "62.5", "12", "8"]
    assert "32 samples, 0 left out" in lines[4]
    assert "% of the token budget stays empty" in lines[5]
    assert "the heaviest has 0.00 % more tokens than the mean" in lines[6]


def test_fixed_views_and_packs_are_shown_too(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    views = "data.views=[{num_frames: 9, height: 32, width: 32}, {num_frames: 33, height: 32, width: 32}]"
    assert buckets.main([CONFIG, f"data.shards={shards}", views]) == 0
    assert "empty: 33x32x32" in capsys.readouterr().out
    packed = "data.batching={kind: packed, tokens: 200, packs: 2, token: [4, 8, 8], max_side: 48, max_frames: 9}"
    assert buckets.main([CONFIG, f"data.shards={shards}", packed]) == 0
    out = capsys.readouterr().out
    assert "| 9x40x48 |" in out and "| 1x40x48 |" in out and "% of the token budget stays empty" in out


def test_a_config_without_data_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        buckets.main([CONFIG])
    assert "data.shards: is null" in capsys.readouterr().err
