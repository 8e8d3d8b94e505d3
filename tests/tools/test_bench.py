"""Every kind of bench runs, says its shapes and layout, and is refused on a busy machine."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch

from tools import bench
from tools.benches import _sequence_worker, checkpoint, mfu, train
from tools.benches._diffusers import TEXT_TOKENS, check_equal, prompts
from tools.benches.table import Row, bench_table

KINDS = bench.bench_modules()
#: Kinds that start processes of their own.
SLOW = {"train", "checkpoint", "sequence"}


@pytest.fixture(autouse=True)
def _threads():
    kept = torch.get_num_threads()
    yield
    torch.set_num_threads(kept)


def run(capsys, *arguments):
    code = bench.main(list(arguments))
    return code, capsys.readouterr().out


def test_the_kinds_are_there_and_say_what_they_measure():
    assert set(KINDS) == {"data", "autoencoder", "denoiser", "sampler", "checkpoint", "train", "sequence", "mfu"}
    for modules in KINDS.values():
        for module in modules.values():
            assert (len(module.SHAPES) > 10 and "process" in module.LAYOUT) or "GPU" in module.LAYOUT


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS])
def test_every_kind_runs_at_a_tiny_size_and_writes_its_page(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "busy_percent", lambda: 0.0)
    code, out = run(capsys, kind, "--repeats", "1", "--tiny", "--out", str(tmp_path))
    assert code == 0
    (page,) = tmp_path.glob(f"{kind}_*.md")
    text = page.read_text()
    assert text.strip() == out.strip()
    for module in KINDS[kind].values():
        assert f"- Shapes ({module.NAME}): {module.TINY_SHAPES}" in text and module.SHAPES not in text
        assert f"- Parallel layout ({module.NAME}): {module.LAYOUT}" in text
    for said in ("Machine:", "Versions:", "Commit:", "--tiny", "Median (smallest-largest)"):
        assert said in text
    figures = [line for line in text.splitlines() if line.startswith("| ") and "(ours)" in line]
    assert figures and all("(tiny: no figure)" in line and "busy" not in line for line in figures)
    below = text.partition("\n| ---")[2]
    assert all(line.endswith("(tiny: no figure)") for line in below.splitlines() if line.startswith("- "))


def test_a_busy_machine_is_refused_and_forced_rows_are_marked(tmp_path, capsys, monkeypatch):
    made = Row(work="w", system="ltd", cpu_s=[1.0], wall_s=[2.0], ours=True)
    monkeypatch.setattr(KINDS["sampler"]["sampler"], "measure", lambda repeats, *, tiny: [made])
    monkeypatch.setattr(KINDS["sampler"]["sampler"], "summary", lambda rows: ["- w: holds."])
    arguments = ["sampler", "--repeats", "1", "--out", str(tmp_path)]
    for busy, code in ((bench.BUSY_LIMIT_PERCENT, 0), (bench.BUSY_LIMIT_PERCENT + 1, 3)):
        monkeypatch.setattr(bench, "busy_percent", lambda busy=busy: busy)
        found, out = run(capsys, *arguments)
        assert found == code and ("busy machine" not in out)
        assert ("other processes use 16 % of the cores, needed at most 15 %" in out) == (code == 3)
    found, out = run(capsys, *arguments, "--force")
    assert found == 0 and "ltd (ours) (busy machine)" in out and "- w: holds. (busy machine)\n" in out
    assert "Command: `python tools/bench.py sampler --repeats 1 --force`\n" in out
    _, out = run(capsys, *arguments, "--tiny", "--force", "--only", "sampler")
    assert "Command: `python tools/bench.py sampler --only sampler --repeats 1 --force --tiny`\n" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_bench_says_so_before_anything(tmp_path, capsys):
    code, out = run(capsys, "mfu", "--out", str(tmp_path))
    assert code == 2 and "bench: mfu needs a CUDA GPU" in out and not list(tmp_path.iterdir())


def test_an_unknown_kind_is_answered_with_those_there_are(capsys):
    code, out = run(capsys, "speed")
    assert code == 2 and "denoiser: denoiser" in out and "data: decode, latents" in out


def test_share_of_the_peak_by_hand():
    row = mfu.with_share(Row(work="w", system="s", cpu_s=[1.0, 1.0], wall_s=[500.0, 250.0]), 2e12, 1000, 16e12)
    assert row.figures == {"tokens/s": [2000.0, 4000.0], "MFU %": [25.0, 50.0]}
    for name, blocks in mfu.STACKS.items():
        config = mfu.stack(name, blocks)
        assert config.depth == blocks and config.width == {"wan_1.3b": 1536, "wan_14b": 5120}[name]
    for name, cells in mfu.LATENTS.items():
        assert cells[0] * cells[1] * cells[2] // 4 == int(name[:-1]) * 1024


def test_columns_of_what_only_some_benches_measure():
    rows = [
        Row(work="w", system="ltd", wall_s=[2.0, 4.0], ours=True, figures={"MFU %": [40.0, 20.0]}),
        Row(work="w", system="peer", wall_s=[4.0, 4.0]),
        Row(work="w", system="absent", missing="is not installed"),
    ]
    lines = bench_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][-1] == "MFU %" and "PSNR dB" not in cells[0]
    assert cells[2][-1] == "30 (20-40)" and cells[2][2] == "-"
    assert cells[3][-2:] == ["1.50 (1.00-2.00)", "-"] and {len(line) for line in cells} == {len(cells[0])}
    with pytest.raises(ValueError, match="bench row 'x'"):
        Row(work="w", system="x")


def test_prompts_are_padded_with_zeros_and_unequal_results_are_refused():
    padded, cond = prompts(2, 6, torch.Generator().manual_seed(0))
    assert padded.shape[1] == TEXT_TOKENS and cond.text_mask.sum(1).tolist() == [3, 6]
    assert torch.equal(padded[:, :6], cond.text) and not padded[0, 3:].any() and padded[0, :3].all()
    check_equal("same", padded, padded)
    with pytest.raises(AssertionError, match="loss: ours differs from diffusers by"):
        check_equal("loss", padded + 1e-3, padded)


def test_the_sequence_bench_never_compiles_the_kernel_of_inference(monkeypatch):
    backend = importlib.import_module("deepspeed.comm.torch")
    compiled = []
    monkeypatch.setattr(backend, "build_shm_op", lambda: compiled.append(1))
    _sequence_worker.skip_kernel()
    assert backend.build_shm_op() is None and not compiled


def test_the_shares_of_a_table_are_of_one_peak():
    row = {"perf/tokens_per_s": 7.0, "perf/model_tflops": 2.0, "perf/total_tflops": 3.0, "perf/data_wait_share": 0.25}
    found = train.columns_of(row | {"perf/mfu": 0.9, "perf/mfu_with_encoders": 0.9}, 8e12)
    assert found == {"tokens/s": 7.0, "MFU %": 25.0, "MFU with encoders %": 37.5, "data wait %": 25.0}


def test_the_checkpoint_bench_removes_what_killed_runs_left(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FOLDER", tmp_path)
    gone, running = tmp_path / "checkpoint-4194999", tmp_path / f"checkpoint-{os.getppid()}"
    for folder in (gone, running):
        (folder / "state").mkdir(parents=True)
    with checkpoint._scratch() as folder:
        assert list(Path(folder).iterdir()) == [] and not gone.exists() and running.exists()
        (Path(folder) / "big").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == [running]
