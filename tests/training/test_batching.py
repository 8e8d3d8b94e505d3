"""Training with buckets and with packs: the same stage and loop, equal however the batch is dealt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from ltd.config import ConfigError
from ltd.data import BucketsConfig, DataConfig, PackedConfig
from ltd.shapes import Compression
from ltd.training.data_wait import DataWait
from ltd.training.latent_inputs import pack, unpack
from ltd.training.run import check_views

ROOT = Path(__file__).resolve().parents[2]
TORCH = ("parallel.engine=torch", "checkpoint.every=3", "evaluation.every=6")
BUCKETS = (
    "data.batching={kind: buckets, tokens: 192, token: [4, 8, 8], multiple: 4, sides: [32], frames: [1, 5, 9]}",
    "seed=2",
)


def run(name: str, run_dir: Path, *overrides: str) -> int:
    config = str(ROOT / "configs" / "debug" / f"{name}.yaml")
    return train.main([config, f"run_dir={run_dir}", *TORCH, *overrides])


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))} for line in lines]


@pytest.mark.parametrize(("name", "overrides"), [("denoiser_packed", ()), ("denoiser", BUCKETS)])
def test_accumulation_and_resume_change_nothing(tmp_path: Path, name: str, overrides: tuple[str, ...]) -> None:
    assert run(name, tmp_path / "whole", "steps=6", *overrides) == 0
    whole = rows(tmp_path / "whole")
    metrics = {"data/epochs", "data/padding_share", "data/rank_imbalance", "data/samples", "data/units_seen"}
    assert all(metrics <= row.keys() for row in whole)
    assert len({row["data/samples"] for row in whole}) > 1
    assert "eval/denoise_video" in whole[-1] and "eval/denoise_image" in whole[-1]
    first = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 <= first["perf/data_wait_share"] <= 1

    assert run(name, tmp_path / "cut", "steps=3", *overrides) == 0
    assert run(name, tmp_path / "cut", "steps=6", *overrides) == 0
    rest = rows(tmp_path / "cut")[-3:]
    assert [row["data/keys_hash"] for row in rest] == [row["data/keys_hash"] for row in whole[3:]]

    assert run(name, tmp_path / "two", "steps=6", "parallel.accumulation=2", *overrides) == 0
    two = rows(tmp_path / "two")
    assert [row["data/keys_hash"] for row in two] == [row["data/keys_hash"] for row in whole]
    # The first step's loss and gradient are the same sums; later ones differ by what Adam makes of rounding.
    for name in ("loss/denoise", "optim/grad_norm"):
        assert two[0][name] == pytest.approx(whole[0][name], rel=1e-6)
        assert two[-1][name] == pytest.approx(whole[-1][name], rel=5e-3)


def test_pack_and_unpack_are_inverse() -> None:
    groups = [
        {
            "latents": torch.randn(count, 3, *shape),
            "text": torch.randn(count, tokens, 2),
            "text_mask": torch.ones(count, tokens, dtype=torch.bool),
            "weight": torch.ones(count),
            "draws": torch.arange(count) + 10 * count,
        }
        for count, shape, tokens in ((2, (1, 4, 5), 3), (1, (3, 2, 2), 5))
    ]
    packed = pack(groups)
    assert packed["latents"].ndim == 1 and packed["shapes"].tolist() == [[3, 1, 4, 5]] * 2 + [[3, 3, 2, 2]]
    assert packed["text"].shape == (3, 5, 2) and packed["text_mask"].sum(1).tolist() == [3, 3, 5]
    assert packed["draws"].tolist() == [20, 21, 10]
    latents = unpack(packed)
    assert isinstance(latents, list)
    assert all(torch.equal(a, b) for a, b in zip(latents, [*groups[0]["latents"], *groups[1]["latents"]], strict=True))


def test_an_autoencoder_refuses_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("autoencoder", tmp_path, "data.batching={kind: packed, tokens: 64, packs: 2}")
    assert "data.batching.kind: packed is for denoisers" in capsys.readouterr().err


@pytest.mark.parametrize("batching", [BucketsConfig(tokens=4096), PackedConfig(tokens=4096, packs=2)])
def test_tokens_must_be_what_the_models_make_of_pixels(batching: Any) -> None:
    data = DataConfig(shards="x", batching=batching)
    check_views(data, Compression(4, 8, 8), (1, 2, 2))
    check_views(data, Compression(4, 16, 16))
    with pytest.raises(ConfigError, match=r"data.batching.token: got \[4, 16, 16\], needed multiples of \[4, 32, 32\]"):
        check_views(data, Compression(4, 16, 16), (1, 2, 2))
    with pytest.raises(ConfigError, match=r"with patch\[0\] = 1"):
        check_views(data, Compression(2, 8, 8), (2, 2, 2))


def test_waiting_for_data_is_told_with_what_to_raise(caplog: pytest.LogCaptureFixture) -> None:
    quiet = DataWait(DataConfig(shards="x"))
    for _ in range(100):
        quiet.add([0.001, 0.004], 0.1)
    assert not caplog.records
    loud = DataWait(DataConfig(shards="x"))
    for _ in range(60):
        found = loud.add([0.001, 0.02], 0.1)
    assert found == {"perf/data_wait_share": pytest.approx(0.2), "perf/data_wait_rank": 1.0}
    assert len(caplog.records) == 1
    assert "waits for data 20 % of the time (the slowest process: 1); raise data.num_workers (0" in caplog.text
    busy = DataWait(DataConfig(shards="x", num_workers=4))
    for _ in range(10):
        busy.add([0.05], 0.1)
    assert "data.num_workers (now 4), data.prefetch (now 2)" in caplog.text


def test_compiled_packs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(__file__).resolve().parents[2] / "configs" / "debug" / "denoiser_packed.yaml")
    with pytest.raises(SystemExit) as stop:
        train.main([config, f"run_dir={tmp_path}", "parallel.compile=blocks"])
    assert stop.value.code == 2 and "parallel.compile" in capsys.readouterr().err


def test_fields_of_fixed_batching_are_named_where_nothing_reads_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run("denoiser", tmp_path / "buckets", "steps=1", "checkpoint.every=0", "evaluation.every=0", *BUCKETS) == 0
    found = [message for message in caplog.messages if "only of data.batching.kind: fixed" in message]
    assert [message.split(":")[0] for message in found] == ["data.global_batch", "data.views"]
    caplog.clear()
    assert run("denoiser_packed", tmp_path / "packed", "steps=1", "checkpoint.every=0", "evaluation.every=0") == 0
    assert not any("only of data.batching.kind" in message for message in caplog.messages)
