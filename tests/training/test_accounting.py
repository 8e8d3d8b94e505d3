"""Accounting and the loss ledger of the debug denoiser: the same weights with and without, and sums that add up."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from ltd import storage
from ltd.config import ConfigError
from ltd.data import Batch, PackedBatch
from ltd.data.synthetic import make_toy_shards
from ltd.parallel import Layout, ParallelConfig
from ltd.planning import Workload, find_peak
from ltd.training.accounting import Accounting, AccountingConfig, Hardware, bucket_of, covered, is_watched, memory_peak
from ltd.training.ledger import Ledger
from ltd.training.work import Counts, Work, count_real
from tools.proofs._runs import start

ROOT = Path(__file__).resolve().parents[2]
OFF = ("accounting.enabled=false", "accounting.ledger_every=0")
#: What the ledger keeps of a cell.
Sums = dict[tuple[Any, ...], list[float]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    for split, seed in (("one", 0), ("two", 1)):
        make_toy_shards(folder / split, num_videos=12, num_images=12, num_frames=9, height=32, width=32, seed=seed)
    return folder


def arguments(shards: Path, run_dir: Path, *overrides: str, config: str = "denoiser", steps: int = 6) -> list[str]:
    sets = f"[{{shards: {shards / 'one'}, name: one}}, {{shards: {shards / 'two'}, name: two}}]"
    common = [f"run_dir={run_dir}", f"data.datasets={sets}", "evaluation.every=0", f"steps={steps}"]
    # A seed whose first steps are of both sizes.
    common += ["seed=2", "checkpoint.every=3", "accounting.ledger_every=2", "parallel.engine=torch", *overrides]
    return [str(ROOT / "configs" / "debug" / f"{config}.yaml"), *common]


def run(shards: Path, run_dir: Path, *overrides: str, config: str = "denoiser", steps: int = 6) -> Path:
    assert train.main(arguments(shards, run_dir, *overrides, config=config, steps=steps)) == 0
    return run_dir


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return lines(run_dir / "metrics.jsonl")


def ledger(run_dir: Path) -> Sums:
    found: Sums = {}
    for row in lines(run_dir / "ledger.jsonl"):
        for *cell, count, total, squares, bad in row["cells"]:
            sums = found.setdefault(tuple(cell), [0, 0.0, 0.0, 0])
            found[tuple(cell)] = [a + b for a, b in zip(sums, (count, total, squares, bad), strict=True)]
    return found


def assert_same(first: Sums, second: Sums, tolerance: float = 1e-12) -> None:
    assert first.keys() == second.keys()
    for cell, sums in first.items():
        assert sums == pytest.approx(second[cell], rel=tolerance), cell


def weights(run_dir: Path) -> dict[str, Tensor]:
    checkpoint = storage.latest_checkpoint(run_dir)
    assert checkpoint is not None
    reader = storage.Reader(checkpoint)
    return reader.read_full(storage.weights_group(reader, "raw"))


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(shards, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("config", ["denoiser", "denoiser_packed"])
def test_weights_are_the_same_bit_for_bit_with_and_without(
    shards: Path, whole: Path, tmp_path: Path, config: str
) -> None:
    on = whole if config == "denoiser" else run(shards, tmp_path / "on", config=config)
    off = run(shards, tmp_path / "off", *OFF, config=config)
    first, second = weights(on), weights(off)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (off / "ledger.jsonl").exists() and not (off / "hardware.json").exists()
    assert not any(key.startswith("perf/mfu") for row in rows(off) for key in row)
    assert [row["loss/denoise"] for row in rows(on)] == [row["loss/denoise"] for row in rows(off)]


def test_rows_have_the_promised_names(whole: Path) -> None:
    needed = {"samples_per_s", "tokens_per_s", "model_tflops", "total_tflops", "mfu", "mfu_with_encoders", "hfu"}
    needed |= {"padding_waste", "memory_peak_gb", "data_wait_share"}
    for row in rows(whole):
        assert {f"perf/{name}" for name in needed} <= row.keys()
        assert 0 < row["perf/mfu"] < row["perf/mfu_with_encoders"] <= row["perf/hfu"] < 1.5
        assert 0 < row["perf/padding_waste"] < 1, "captions are shorter than 48 bytes"
        buckets = {key.split("/")[2] for key in row if key.startswith("perf/bucket/")}
        assert len(buckets) == 1 and buckets <= {"9x32x32", "1x32x32"}
    hardware = json.loads((whole / "hardware.json").read_text())
    assert hardware["measured_flops"] > 0 and hardware["table_flops"] is None and hardware["devices"] == 1


def test_interval_is_the_sum_of_its_steps(shards: Path, whole: Path, tmp_path: Path) -> None:
    (row,) = rows(run(shards, tmp_path, "log_every=6"))
    seconds = row["perf/samples_per_s"] ** -1 * 6 * 4
    each = [r["perf/padding_waste"] for r in rows(whole)]
    assert min(each) <= row["perf/padding_waste"] <= max(each)
    parts = [key for key in row if key.endswith("/step_s") and key.startswith("perf/bucket/")]
    assert len(parts) == 2 and max(row[key] for key in parts) < seconds


def test_ledger_adds_up_to_the_loss(whole: Path) -> None:
    found = ledger(whole)
    assert sum(sums[0] for sums in found.values()) == 6 * 4
    assert sum(sums[1] for sums in found.values()) / 24 == pytest.approx(
        sum(row["loss/denoise"] for row in rows(whole)) / 6, rel=1e-6
    )
    sources, sizes, times, captions = (set(part) for part in zip(*found, strict=True))
    assert {source.split("/")[0] for source in sources} == {"one", "two"} and all(".tar" in s for s in sources)
    assert sizes == {"9x32x32", "1x32x32"} and times <= set(range(8)) and len(times) > 3
    assert captions <= {"caption", "dropped"} and "caption" in captions
    assert [(row["from"], row["step"]) for row in lines(whole / "ledger.jsonl")] == [(1, 2), (3, 3), (4, 4), (5, 6)]


def test_ledger_continues_with_the_run(shards: Path, whole: Path, tmp_path: Path) -> None:
    short = run(shards, tmp_path, steps=5)
    # A run that was killed behind its last checkpoint: what it noted since must not count twice.
    for step in (4, 5):
        folder = storage.checkpoint_path(short, step)
        if folder.is_dir():
            folder.rename(tmp_path / f"gone{step}")
    assert storage.latest_checkpoint(short) == storage.checkpoint_path(short, 3)
    run(shards, tmp_path)
    assert_same(ledger(tmp_path), ledger(whole))


def test_accumulation_changes_neither(shards: Path, whole: Path, tmp_path: Path) -> None:
    split = run(shards, tmp_path, "parallel.accumulation=2")
    assert_same(ledger(split), ledger(whole), 1e-5)
    for ours, theirs in zip(rows(split), rows(whole), strict=True):
        assert ours["perf/padding_waste"] == pytest.approx(theirs["perf/padding_waste"], rel=1e-12)


def test_packs(shards: Path, tmp_path: Path) -> None:
    found = ledger(run(shards, tmp_path, config="denoiser_packed"))
    samples = sum(row["data/samples"] for row in rows(tmp_path))
    assert sum(sums[0] for sums in found.values()) == samples
    assert len({size for _, size, *_ in found}) > 1
    # Nothing is padded in a pack; what is left is one token for a sample whose caption has none.
    assert all(0 <= row["perf/padding_waste"] < 0.02 for row in rows(tmp_path))


def test_autoencoder_has_neither_times_nor_captions(shards: Path, tmp_path: Path) -> None:
    found = ledger(run(shards, tmp_path, "initialize_from=0", config="autoencoder", steps=3))
    assert {time for _, _, time, _ in found} == {0} and {caption for *_, caption in found} == {"caption"}
    assert all(row["perf/mfu"] == row["perf/mfu_with_encoders"] > 0 for row in rows(tmp_path))


def test_many_shards_are_one_source(shards: Path, tmp_path: Path) -> None:
    found = ledger(run(shards, tmp_path, "accounting.max_shards=0", steps=3))
    assert {source for source, *_ in found} == {"one", "two"}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("sequence", [1, 2])
def test_two_processes_give_the_same_sums(shards: Path, whole: Path, tmp_path: Path, sequence: int) -> None:
    overrides = ["parallel.engine=deepspeed", f"parallel.sequence={sequence}", "parallel.preflight=false"]
    overrides.append("accounting.communication_every=3")
    start(2, arguments(shards, tmp_path, *overrides), tmp_path / "log").wait()
    assert_same(ledger(tmp_path), ledger(whole), 1e-4)
    for ours, theirs in zip(rows(tmp_path), rows(whole), strict=True):
        if ours["step"] not in (3, 5):  # the rows of watched steps have no rates
            assert ours["perf/padding_waste"] == pytest.approx(theirs["perf/padding_waste"], rel=1e-9)
            for name in ("hfu", "mfu_with_encoders"):
                relation = [row[f"perf/{name}"] / row["perf/mfu"] for row in (ours, theirs)]
                assert relation[0] == pytest.approx(relation[1], rel=1e-9), "encoders run once, whatever the degree"
        else:
            assert "perf/mfu" not in ours
    shares = {
        row["step"]: row["perf/communication_share"] for row in rows(tmp_path) if "perf/communication_share" in row
    }
    assert list(shares) == [4, 6], "of step 3, and of 5 in the place of the last"
    assert all(0 < share < 1 for share in shares.values())


def test_union_of_intervals() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4
    assert covered([]) == 0


def test_names_of_buckets() -> None:
    batch = Batch(
        keys=("a",),
        draws=(0,),
        weight=torch.ones(1),
        captions=("",),
        fps=torch.zeros(1),
        pixels=torch.zeros(1, 5, 8, 16, 3, dtype=torch.uint8),
    )
    assert bucket_of(batch) == "5x8x16" and bucket_of(PackedBatch((batch,))) == "packed"


def test_peak_comes_from_the_table_first() -> None:
    table = find_peak("NVIDIA H100 80GB HBM3")
    known = Hardware("NVIDIA H100 80GB HBM3", "bf16", table, 700e12)
    assert known.peak == 989.4e12 and "700 measured" in known.describe() and "989.4 by the table" in known.describe()
    lacking = Hardware("Tesla V100", "bf16", find_peak("Tesla V100-SXM2-16GB"), 20e12)
    assert lacking.peak == 20e12 and "not in the table" in lacking.describe()


@pytest.mark.parametrize("measure", [None, False])
def test_measured_peak_stands_beside_the_table_unless_turned_off(
    measure: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("ltd.training.accounting._measured_once", lambda device, dtype: 700e12)
    layout: Any = types.SimpleNamespace(device=torch.device("cuda"), is_main=True, world_size=1, global_rank=0)
    config = AccountingConfig() if measure is None else AccountingConfig(measure_peak=measure)
    with caplog.at_level("INFO"):
        made = Accounting(config, layout, ParallelConfig(precision="bf16"), str(tmp_path), several=False)
    made.add("x", Workload(samples=1, model_flops=70e12, computed=1, real=1), 1.0, [0.0, 0.0, 1e9, 1e9], wait_s=0.0)
    row, hardware = made.row(), json.loads((tmp_path / "hardware.json").read_text())
    assert "989.4 by the table (" in caplog.text and hardware["table_flops"] == 989.4e12
    assert row["perf/mfu"] == pytest.approx(70 / 989.4), "of the table's in either case"
    assert ("700 measured" in caplog.text) == (measure is None)
    assert hardware["measured_flops"] == (700e12 if measure is None else None)
    assert row.get("perf/mfu_of_measured") == (pytest.approx(0.1) if measure is None else None)


def test_memory_and_communication_go_over_processes(tmp_path: Path) -> None:
    config = ParallelConfig(engine="torch", precision="fp32")
    layout = Layout(config, global_rank=0, world_size=1, local_rank=0)
    made = Accounting(AccountingConfig(), layout, config, str(tmp_path), several=False)
    assert made.flags() == [0.0, 0.0, *[pytest.approx(memory_peak(layout.device), rel=0.5)] * 2]
    work = Workload(samples=2, model_flops=1e9, computed=4, real=3)
    made.add("x", work, 0.5, [0.2, 0.8, 3e9, 5e9, 1e9, 2e9], wait_s=0.1)
    made.add("x", dataclasses.replace(work, real=4), 0.5, [0.0, 0.0, 3e9, 6e9, 1e9, 2e9], wait_s=0.0)
    row = made.row()
    assert row["perf/communication_share"] == 0.25 and row["perf/memory_peak_gb"] == 6.0
    assert row["perf/samples_per_s"] == 4.0 and row["perf/model_tflops"] == 2e-3 and row["perf/padding_waste"] == 1 / 8
    assert not any(name.startswith("perf/bucket/") for name in row), "steps of one size"
    assert made.row() == {}


def test_steps_of_each_size_have_their_own_waits_memory_and_communication(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ParallelConfig(engine="torch", precision="fp32")
    layout = Layout(config, global_rank=0, world_size=1, local_rank=0)
    made = Accounting(AccountingConfig(communication_every=2), layout, config, str(tmp_path), several=True)
    layout.world_size = 2  # as if there were another process: nothing is sent here
    monkeypatch.setattr(torch.profiler.profile, "events", lambda self: [])
    steps = [  # bucket, seconds, of those waited, seconds of collectives and of the timed step before, memory of each
        ("9x8x8", 2.0, 0.5, (0.0, 0.0), (5e9, 5e9, 4e9, 5e9)),
        ("1x8x8", 9.0, 9.0, (0.0, 0.0), (5e9, 5e9, 9e9, 9e9)),  # watched: left out of its size's means
        ("9x8x8", 2.0, 0.0, (0.2, 0.8), (5e9, 7e9, 3e9, 7e9)),
        ("9x8x8", 9.0, 9.0, (0.0, 0.0), (5e9, 7e9, 9e9, 9e9)),
        ("1x8x8", 1.0, 0.75, (0.3, 0.4), (5e9, 7e9, 1e9, 2e9)),
    ]
    for step, (bucket, step_s, wait_s, communication, memory) in enumerate(steps, start=1):
        with made.watching(step, 9):
            pass
        made.add(bucket, Workload(samples=1), step_s, [*communication, *memory], wait_s=wait_s)
    row = made.row()
    names = ("step_s", "data_wait_share", "memory_peak_gb", "communication_share")
    found = {size: [row[f"perf/bucket/{size}/{name}"] for name in names] for size in ("9x8x8", "1x8x8")}
    assert found == {"9x8x8": [2.0, 0.125, 7.0, 0.3 / 0.4], "1x8x8": [1.0, 0.75, 2.0, 0.25]}
    assert row["perf/memory_peak_gb"] == 7.0 and row["perf/communication_share"] == 0.3 / 0.4
    made.add("9x8x8", Workload(samples=1), 1.0, [0.0, 0.0, 1e9, 1e9, 1e9, 1e9], wait_s=0.0)
    assert "perf/bucket/9x8x8/communication_share" not in made.row(), "no step was timed"


@pytest.mark.parametrize("several", [True, False])
def test_memory_of_a_gpu_is_of_the_step_and_of_the_run(
    several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [0.0]
    monkeypatch.setattr("ltd.training.accounting.memory_peak", lambda device: held[0])
    monkeypatch.setattr("ltd.training.accounting._measured_once", lambda device, dtype: 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.__setitem__(0, 1e9))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("a step waits for the device"))
    monkeypatch.setattr(Accounting, "_held", 0.0)
    layout: Any = types.SimpleNamespace(device=torch.device("cuda"), is_main=True, world_size=1, global_rank=0)
    made = Accounting(AccountingConfig(), layout, ParallelConfig(), str(tmp_path), several=several)
    found = []
    for before, within in ((2e9, 6e9), (8e9, 3e9)):  # an evaluation between the steps holds 8 GB
        held[0] = max(held[0], before)
        with made.watching(1, 9):
            held[0] = max(held[0], within)
            found.append(made.flags()[2:])
    assert found == ([[6e9, 6e9], [8e9, 3e9]] if several else [[6e9, 6e9], [8e9, 8e9]])


def test_bucket_rows_of_a_run(whole: Path) -> None:
    for row in rows(whole):
        (size,) = {key.split("/")[2] for key in row if key.startswith("perf/bucket/")}
        part = {name: row[f"perf/bucket/{size}/{name}"] for name in ("data_wait_share", "memory_peak_gb", "step_s")}
        assert part["step_s"] == pytest.approx(row["time/step_s"])
        assert 0 <= part["data_wait_share"] <= 1 and part["memory_peak_gb"] == row["perf/memory_peak_gb"]
        assert f"perf/bucket/{size}/communication_share" not in row, "one process"


def test_counts_of_devices_and_of_hosts_make_one_sum() -> None:
    counts = Counts()
    counts.add(Work(tokens=3, computed=torch.tensor(7.0), real=5, model_flops=2.0**60, repeated_flops=1.0))
    counts.add(Work(tokens=1, computed=2, real=torch.tensor(2.0), model_flops=1.0))
    counts.add_encoders(4.0)
    packed = counts.packed(torch.zeros(1, dtype=torch.float64))
    assert packed.tolist() == [4.0, 9.0, 7.0, 2.0**60, 1.0, 4.0]
    work = counts.workload((packed / 2).tolist(), 3.0, 2)
    assert work.encoder_flops == 4.0 and work.tokens == 2.0 and work.samples == 3.0
    assert counts.workload(packed.tolist(), 0.0, 1) == Workload(), "a step whose samples all failed"
    assert float(count_real(torch.tensor([1.0, 0.0, 0.5]), [2, 4, 8])) == 10.0


def test_losses_that_are_not_finite_are_counted_apart(shards: Path, tmp_path: Path) -> None:
    from ltd.data import DataConfig, build_loader
    from ltd.training.ledger import Ledger

    data = DataConfig(shards=str(shards / "one"), global_batch=4, num_workers=0, views=_views())
    layout = Layout(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)
    with build_loader(data, seed=0, global_rank=0, world_size=1) as loader:
        (batch,), _ = next(iter(loader))
        made = Ledger(AccountingConfig(), layout, loader, data, run_dir=str(tmp_path), start_step=1)
        batch.weight[3] = 0.0
        work = Work(tokens=0, computed=0, real=0, model_flops=0, quantiles=[0.99] * 4, dropped=[True] + [False] * 3)
        made.note(batch, work, torch.tensor([1.0, math.nan, 3.0, 9.0]))
        made.commit()
        made.note(batch, work, torch.ones(4))  # of a step that was not taken
        made.write(1)
        made.write(1)
        made.close()
    assert len(lines(tmp_path / "ledger.jsonl")) == 1
    found = ledger(tmp_path)
    assert {cell[2] for cell in found} == {7}
    assert [sum(sums[i] for sums in found.values()) for i in range(4)] == [2, 4.0, 10.0, 1]
    assert next(sums for cell, sums in found.items() if cell[3] == "dropped")[:2] == [1, 1.0]


def _views() -> Any:
    from ltd.data import ViewConfig

    return (ViewConfig(num_frames=1, height=32, width=32),)


@pytest.mark.parametrize("field", ["communication_every", "ledger_every", "time_quantiles", "max_shards"])
def test_bad_fields(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        AccountingConfig(**{field: -1})


def test_watched_step_has_no_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = ParallelConfig(engine="torch", precision="fp32")
    layout = Layout(config, global_rank=0, world_size=1, local_rank=0)
    made = Accounting(AccountingConfig(communication_every=2), layout, config, str(tmp_path), several=False)
    layout.world_size = 2  # as if there were another process: nothing is sent here
    events = [types.SimpleNamespace(name="gloo:all_reduce", time_range=types.SimpleNamespace(start=0, end=1e3))]
    events.append(types.SimpleNamespace(name="aten::mm", time_range=types.SimpleNamespace(start=0, end=9e9)))
    monkeypatch.setattr(torch.profiler.profile, "events", lambda self: events)
    with made.watching(1, 9):
        pass
    assert made.flags()[:2] == [0.0, 0.0]
    with made.watching(2, 9):
        torch.ones(64, 64) @ torch.ones(64, 64)
    made.add("x", Workload(samples=1), 1.0, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0], wait_s=0.0)
    assert made.row() == {}
    seconds, step_s = made.flags()[:2]
    assert 0 < seconds <= min(step_s, 1e-3 + 1e-9)


@pytest.mark.parametrize(
    ("interval", "last", "watched"),
    [(0, 6, []), (3, 6, [3, 5]), (3, 7, [3, 6]), (6, 6, [5]), (7, 6, []), (1, 3, [1, 2]), (1, 1, [])],
)
def test_no_watched_step_is_the_last(interval: int, last: int, watched: list[int]) -> None:
    assert [step for step in range(1, last + 1) if is_watched(step, last, interval)] == watched


def test_noting_losses_waits_for_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device a value that the host asks for is an error, as it would be a wait on a GPU."""
    layout: Any = types.SimpleNamespace(device=torch.device("meta"), is_main=False, gather_objects=lambda mine: [mine])
    monkeypatch.setattr("ltd.training.ledger.Sources", lambda *rest: None)
    nothing: Any = None
    ledger = Ledger(AccountingConfig(), layout, nothing, nothing, run_dir=str(tmp_path), start_step=1)
    cells = iter([("a", "1x2x2", number % 8, "caption") for number in range(4000)])
    monkeypatch.setattr(ledger, "_cells", lambda batch, work: [next(cells) for _ in range(4)])
    batch: Any = types.SimpleNamespace(weight=torch.ones(4))
    for _ in range(3):
        ledger.note(batch, nothing, torch.ones(4, device="meta"))
        ledger.commit()
    with pytest.raises((NotImplementedError, RuntimeError)):
        ledger.write(3)  # here, and only here, the sums come to the host


def test_cells_of_a_step_that_is_not_taken_do_not_break_the_row_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout: Any = types.SimpleNamespace(device=torch.device("cpu"), is_main=True, gather_objects=lambda mine: [mine])
    monkeypatch.setattr("ltd.training.ledger.Sources", lambda *rest: None)
    nothing: Any = None
    made = Ledger(AccountingConfig(), layout, nothing, nothing, run_dir=str(tmp_path), start_step=1)
    sizes = iter([1020, 10])  # the second step brings the cells past the table's first 1024 lines
    cells = iter([(f"source{number:04d}", "1x2x2", 0, "caption") for number in range(1030)])
    monkeypatch.setattr(made, "_cells", lambda batch, work: [next(cells) for _ in range(next(sizes))])
    for size, commits in ((1020, True), (10, False)):
        made.note(types.SimpleNamespace(weight=torch.ones(size)), nothing, torch.full((size,), 2.0))  # type: ignore[arg-type]
        if commits:
            made.commit()
    made.write(1)
    made.close()
    (row,) = lines(tmp_path / "ledger.jsonl")
    assert len(row["cells"]) == 1020 and row["cells"][-1] == ["source1019", "1x2x2", 0, "caption", 1, 2.0, 4.0, 0]
