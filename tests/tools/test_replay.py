"""A step taken again equals the run's, in any layout; a planted fault is named; what cannot be done is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ltd.nn.attention
import train
from ltd import storage
from ltd.data import Batch, MicroBatch
from ltd.parallel.compilation import Compiled
from ltd.rng import DrawRandom
from ltd.training.denoiser import DenoiserStage
from ltd.training.latent_inputs import LatentInputs
from ltd.training.trace import Trace
from ltd.training.trace_compare import Comparison, compare
from tests import launched
from tools import replay

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "debug"
#: Right after a checkpoint: what is planted has not changed the weights yet.
STEP = 5
#: 27 tokens, 14 on each of two processes, as many as a text has: sizes alone say nothing there.
SIZES = (
    "toy_data={num_samples: 8, num_heldout: 1, num_frames: 9, size: 24}",
    "data.views=[{num_frames: 9, height: 24, width: 24}]",
    "text.max_length=14",
    "model.width=32",
)


def train_run(run_dir: Path, config: str, *overrides: str) -> Path:
    common = ["steps=8", "checkpoint.every=4", "checkpoint.keep_last=null", "evaluation.every=0", "optim.lr=0.02"]
    arguments = [str(CONFIGS / config), f"run_dir={run_dir}", "parallel.engine=torch", *common, *overrides]
    assert train.main(arguments) == 0
    return run_dir


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("replay") / "run", "denoiser.yaml", *SIZES)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy = "toy_data={num_samples: 8, num_heldout: 1, num_frames: 9, size: 32}"
    return train_run(tmp_path_factory.mktemp("replay") / "packed", "denoiser_packed.yaml", toy, "model.width=32")


@pytest.fixture(scope="module")
def reference(run: Path) -> Path:
    """Trace of the run's own layout."""
    out = run.parent / "reference"
    assert replay.main([str(run), "--step", str(STEP), "--trace", str(out)]) == 0
    return out


def between(a: Path, b: Path, tolerance: float = 1e-4) -> Comparison:
    return compare(Trace.read(a), Trace.read(b), tolerance=tolerance)


def traced(run: Path, out: Path, *overrides: str) -> Path:
    replay.main([str(run), "--step", str(STEP), "--trace", str(out), *overrides])
    return out


def test_step_is_equal_bit_for_bit_and_the_run_untouched(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    for step, start in ((5, "the checkpoint of step 4"), (2, "the beginning"), (7, "the checkpoint of step 4")):
        assert replay.main([str(run), "--step", str(step)]) == 0
        out = capsys.readouterr().out
        assert f"step {step} of {run}, from {start}" in out and "equal to the run's row bit for bit" in out
    assert contents(run) == before
    rows = [line.split() for line in out.splitlines() if "toy.tar" in line]
    assert len(rows) == 4 and len({row[0] for row in rows}) == 4
    loss = sum(float(row[1]) for row in rows) / 4
    recorded = json.loads((run / "metrics.jsonl").read_text().splitlines()[6])["loss/denoise"]
    assert loss == pytest.approx(recorded, rel=1e-5)


def test_a_row_that_differs_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(run), "--step", "4", "caption_dropout=1.0"]) == 1
    out = capsys.readouterr().out
    assert "the run's row is different (0.0001)" in out and "loss/denoise" in out and ", relative " in out
    assert replay.main([str(run), "--step", "4", "data.global_batch=2"]) == 1
    assert ", relative inf" in capsys.readouterr().out, "other samples"


def test_same_layout_gives_the_same_trace(run: Path, reference: Path, tmp_path: Path) -> None:
    found = between(reference, traced(run, tmp_path / "again"), 0.0)
    assert found.differences == [] and found.notes == []
    assert found.compared["sample"] == 4 and found.compared["output"] > 200 and found.compared["gradient"] > 50
    trace = Trace.read(reference)
    outputs = trace.names("output")
    assert outputs.index("blocks.0.attention.attend") < outputs.index("blocks.0.attention.out")
    assert outputs.index("blocks.0") < outputs.index("blocks.1.attention.attend") < outputs.index("model")
    gradients = trace.names("gradient")
    assert gradients[0].startswith("final.") and gradients[-1].startswith("t")
    assert gradients.index("blocks.1.attention.out.weight") < gradients.index("blocks.1.attention.qkv.weight")
    assert gradients.index("blocks.1.attention.qkv.weight") < gradients.index("blocks.0.mlp.out.weight")


def test_recomputation_is_not_noted_twice(run: Path, reference: Path, tmp_path: Path) -> None:
    other = traced(run, tmp_path / "full", "parallel.activation_checkpointing=full", "parallel.accumulation=2")
    found = between(reference, other, 1e-5)
    assert found.first is None
    assert Trace.read(reference).places.keys() == Trace.read(other).places.keys()


def test_another_kernel_is_named(
    run: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = ltd.nn.attention._sdpa

    def wrong_scale(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return original(q * 1.05 if key_mask is None else q, k, v, key_mask)

    monkeypatch.setattr(ltd.nn.attention, "_sdpa", wrong_scale)
    found = between(reference, traced(run, tmp_path / "kernel"))
    assert str(found.first).startswith("output of blocks.0.attention.attend (sample toy")
    for number in (1, 2):
        assert replay.main([str(run), "--step", "7", "--trace", str(tmp_path / f"later{number}")]) in (0, 1)
        monkeypatch.undo()
    assert replay.main([str(tmp_path / "later1"), str(tmp_path / "later2")]) == 1
    *_, first, hint = capsys.readouterr().out.splitlines()
    assert first.startswith("first difference: weight ") and "trace the step right after the checkpoint" in hint


def test_an_input_that_differs_is_named(
    run: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LatentInputs.prepare
    wrong = list(Trace.read(reference).samples.values())[2]

    def prepare(self: LatentInputs, batch: Batch, random: DrawRandom) -> dict[str, Tensor]:
        tensors = original(self, batch, random)
        at = torch.tensor([key == wrong.key for key in batch.keys]).view(-1, 1, 1, 1, 1)
        return {**tensors, "latents": tensors["latents"] * torch.where(at, 1.01, 1.0)}

    monkeypatch.setattr(LatentInputs, "prepare", prepare)
    first = between(reference, traced(run, tmp_path / "input")).first
    assert first is not None and str(first).startswith(f"input latents (sample {wrong.key}, draw {wrong.draw})")
    assert first.error == pytest.approx(0.01, rel=0.3)


def plant_nan(patch: pytest.MonkeyPatch, key: str) -> None:
    """Give the loss of one sample as nan, while it has weight."""
    prepare, terms, bad = DenoiserStage.prepare, DenoiserStage.terms, set()

    def marked(self: DenoiserStage, batch: MicroBatch) -> dict[str, Tensor]:
        rows = zip(batch.draws, batch.keys, batch.weight.tolist(), strict=True)
        bad.clear()
        bad.update(draw for draw, k, weight in rows if k == key and weight)
        return prepare(self, batch)

    def changed(self: DenoiserStage, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        at = torch.tensor([draw in bad for draw in tensors["draws"].tolist()])
        return {"loss": torch.where(at, torch.nan, terms(self, tensors)["loss"])}

    patch.setattr(DenoiserStage, "prepare", marked)
    patch.setattr(DenoiserStage, "terms", changed)


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
def test_a_step_that_must_not_be_taken_is_traced(
    run: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    policy: str,
) -> None:
    """A sample of step 5 is not finite; ``rewind`` goes on from step 4 without it, and so does the replay."""
    key = list(Trace.read(reference).samples.values())[1].key
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(storage.checkpoint_path(copy, 8))
    (copy / "latest").unlink()
    plant_nan(monkeypatch, key)
    command = [str(run / "config.yaml"), f"run_dir={copy}", f"guards.non_finite={policy}", "checkpoint.every=20"]
    if policy == "stop":
        with pytest.raises(SystemExit):
            train.main(command)
    else:
        assert train.main(command) == 0
        capsys.readouterr()
        found = []
        for step in ("7", "8"):  # one epoch: the sample comes again, and weighs nothing
            assert replay.main([str(copy), "--step", step]) == 0, "through the step that was left out"
            out = capsys.readouterr().out
            assert "equal to the run's row bit for bit" in out
            found += [line.split()[2] for line in out.splitlines() if f" {key} " in line]
        assert found == ["0"]
    assert replay.main([str(copy), "--step", "5", "--trace", str(tmp_path / "t")]) == 0
    out = capsys.readouterr().out
    assert "not taken: " in out and "loss term 'loss' is nan" in out
    assert ("bit for bit" in out) == (policy == "skip"), "the row of a rewound run is of the second time"
    trace = Trace.read(tmp_path / "t")
    assert [sample.key for sample in trace.samples.values() if sample.loss != sample.loss] == [key]
    assert trace.names("gradient") == Trace.read(reference).names("gradient")
    first = between(reference, tmp_path / "t").first
    assert first is not None and first.category == "loss" and first.key == key


def test_autoencoder_and_packs_from_the_beginning(packed: Path, tmp_path: Path) -> None:
    toy = "toy_data={num_samples: 8, num_heldout: 1, num_frames: 9, size: 32}"
    autoencoder = train_run(tmp_path / "autoencoder", "autoencoder.yaml", toy, "statistics_from=1")
    for run_dir in (packed, autoencoder):
        out = [tmp_path / f"{run_dir.name}{number}" for number in (1, 2)]
        assert replay.main([str(run_dir), "--step", "3", "--trace", str(out[0])]) == 0
        assert replay.main([str(run_dir), "--step", "3", "--trace", str(out[1]), "parallel.accumulation=2"]) == 0
        found = between(*out)  # a bias of the autoencoder sums up what almost cancels
        assert found.first is None and found.compared["output"] > 50 and found.compared["input"] > 1


def test_compiled_blocks_are_compared_from_outside(
    run: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced as ever, run as traced: the compiler itself takes minutes here and changes nothing for the hooks.
    monkeypatch.setattr(Compiled, "compile_graph", lambda self, graph, inputs, **options: graph)
    found = between(reference, traced(run, tmp_path / "compiled", "parallel.compile=blocks"))
    assert found.first is None and "blocks.0" in Trace.read(tmp_path / "compiled").names("output")
    assert any("outputs that only A has: blocks.0.modulation" in note for note in found.notes)


def test_command_compares_and_says_so_by_its_exit_code(
    run: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay.main([str(reference), str(reference)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal bit for bit"
    other = traced(run, tmp_path / "other", "parallel.accumulation=4")
    assert replay.main([str(reference), str(other)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "equal within 0.0001, not bit for bit"
    assert "layout accumulation: 1 in A, 4 in B" in out
    assert replay.main([str(reference), str(other), "--tolerance", "0"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("first difference: ")


def test_what_cannot_be_done_is_refused(
    run: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        (str(run), "--step", "9"): "--step: got 9, the run has steps 1 to 8",
        (str(run), "--step", "0"): "--step: got 0",
        (str(tmp_path), "--step", "1"): "is no run directory",
        (str(run), "--step", "1", "no.such=1"): "no.such: unknown field",
        (str(run), "--step", "1", "--trace", str(run)): "exists and is no trace",
        (str(run), str(reference)): "is no trace",
        (str(run),): "needed RUN --step N, or two traces",
        (str(reference), str(reference), "--tolerance", "-1"): "--tolerance: got -1",
    }
    for command, message in cases.items():
        with pytest.raises(SystemExit) as stop:
            replay.main(list(command))
        assert stop.value.code == 2 and message in capsys.readouterr().err, command


@pytest.fixture(scope="module")
def layouts(run: Path, packed: Path, reference: Path) -> Path:
    """Traces of two processes, each case of ``replay_worker.py``."""
    out = run.parent / "layouts"
    out.mkdir()
    said = launched.launch("tests.tools.replay_worker", str(run), str(packed), str(out))
    (out / "stdout.txt").write_text(said)
    return out


@pytest.mark.dist
@pytest.mark.slow
class TestTwoProcesses:
    @pytest.mark.parametrize("name", ["sequence", "zero", "data"])
    def test_layouts_are_equal(self, layouts: Path, reference: Path, name: str) -> None:
        found = between(reference, layouts / name, 1e-5)
        assert found.first is None, str(found.first)
        assert not found.notes or all(note.startswith("layout ") for note in found.notes)
        assert Trace.read(layouts / name).places.keys() == Trace.read(reference).places.keys()

    def test_two_layouts_of_two_processes_are_equal(self, layouts: Path) -> None:
        assert between(layouts / "sequence", layouts / "zero", 1e-5).first is None

    def test_packs_are_equal(self, layouts: Path, packed: Path, tmp_path: Path) -> None:
        found = between(traced(packed, tmp_path / "packed"), layouts / "packed", 1e-5)
        assert found.first is None, str(found.first)

    @pytest.mark.parametrize("name", ["forward", "last"])
    def test_wrong_factor_in_the_forward_pass_is_named(self, layouts: Path, reference: Path, name: str) -> None:
        found = between(reference, layouts / name)
        first = found.first
        assert first is not None and first.category == "output"
        assert first.what == "output of blocks.0.attention.attend" and first.key in str(first)
        assert 0.2 < first.error < 0.7

    def test_wrong_factor_in_the_backward_pass_is_named(self, layouts: Path, reference: Path) -> None:
        found = between(reference, layouts / "backward", 1e-5)
        first = found.first
        assert first is not None and first.category == "gradient"
        assert first.what == "gradient of blocks.1.attention.k_norm.weight", first
        assert not any("mlp" in d.what and "blocks.1" in d.what for d in found.beyond())

    def test_samples_are_listed_once_and_in_order(self, layouts: Path) -> None:
        rows = [line.split() for line in (layouts / "stdout.txt").read_text().splitlines() if "toy.tar)" in line]
        assert [int(row[0]) for row in rows[:12]] == [16, 17, 18, 19] * 3

    def test_the_command_says_which_rows_are_the_run_s(self, layouts: Path) -> None:
        codes = dict(line.split() for line in (layouts / "codes.txt").read_text().splitlines())
        wrong = {name for name, code in codes.items() if code != "0"}
        assert wrong - {"backward"} == {"forward", "last"}, "a wrong gradient need not show in the row"
