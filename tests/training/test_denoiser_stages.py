"""Stages and trained parts of a denoiser's run: what moves, resuming at boundaries, refusals; one process and two."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import train
from ltd import config as config_io
from ltd import denoisers, storage
from ltd.config import ConfigError
from ltd.data.synthetic import make_toy_shards
from ltd.parallel import ParallelConfig
from ltd.parallel.frozen import FrozenWeights
from ltd.training.denoiser import DenoiserRun
from ltd.training.replay import load_run, replay
from ltd.training.stages import at_step
from tests import launched
from tests.training.test_autoencoder_run import equal, rows, state, worst
from tests.training.test_stages import go_back

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "debug" / "denoiser_stages.yaml"
#: After 2 steps attention and modulation of the blocks are trained alone, after 4 everything again.
BOUNDARIES = (2, 4)
STEPS = 6
PARTS = ("attention.", "modulation.")
ALIGNED = "alignment={teacher: {kind: efficientnet_lite0}, block: 1}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_toy_shards(folder, num_videos=16, num_images=8, num_frames=9, height=48, width=48, seed=0)
    return folder


def arguments(shards: Path, folder: Path, *overrides: str) -> list[str]:
    """The shipped stages, at other steps."""
    tree = config_io.to_dict(config_io.load(DenoiserRun, CONFIG))
    stages = [{**stage, "from_step": step} for stage, step in zip(tree["stages"], BOUNDARIES, strict=True)]
    tree |= {"steps": STEPS, "stages": stages, "toy_data": None}
    tree["optim"]["warmup_steps"] = 0
    tree["evaluation"] |= {"every": 0, "shards": None}
    tree["checkpoint"] |= {"every": 1, "keep_last": None}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    config_io.save(tree, path)
    return [str(path), f"run_dir={folder / 'run'}", f"data.shards={shards}", "parallel.engine=torch", *overrides]


def trained(name: str) -> bool:
    return name.startswith("blocks.") and name.split(".", 2)[2].startswith(PARTS)


def assert_only_parts_move(run_dir: Path) -> None:
    """All moves in the first stage and in the last; in the second what it names, and nothing else by one bit."""
    found = {step: state(run_dir, step) for step in range(1, STEPS + 1)}
    names = set(found[1]["master"])
    frozen = {name for name in names if not trained(name)}
    assert frozen and names - frozen
    for step in (3, 4):
        assert (
            set(found[step]["master"]) == set(found[step]["exp_avg"]) == set(found[step]["ema_0.95"]) == names - frozen
        )
        assert set(found[step]["buffer"]) == frozen
        for name in frozen:
            assert torch.equal(found[step]["buffer"][name], found[2]["master"][name]), name
    for before, after, moving in ((2, 4, names - frozen), (4, 6, names)):
        for name in moving:
            values = [{**found[step].get("buffer", {}), **found[step]["master"]}[name] for step in (before, after)]
            assert not torch.equal(*values), (after, name)
    # Its first moment is of one step, in which the gradient was clipped to a norm of 1.
    moments = torch.cat([found[5]["exp_avg"][name].flatten() for name in sorted(frozen)])
    assert 0 < float(moments.norm()) <= 0.1 + 1e-6


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train.main(arguments(shards, folder)) == 0
    return folder / "run"


def test_a_stage_trains_the_parts_it_names_and_freezes_the_rest(whole: Path) -> None:
    assert_only_parts_move(whole)
    found = rows(whole)
    assert [row["optim/lr"] for row in found] == [1e-3] * 4 + [5e-4] * 2
    assert len({row["data/keys_hash"] for row in found}) == STEPS
    # An average of a frozen weight is the weight.
    loaded = denoisers.load(storage.checkpoint_path(whole, 4)).state_dict()
    kept = state(whole, 4)
    assert equal({"": loaded}, {"": {**kept["buffer"], **kept["ema_0.95"]}})


@pytest.mark.parametrize("stopped", [2, 3, 4])
def test_resuming_is_going_on_bit_for_bit(whole: Path, shards: Path, tmp_path: Path, stopped: int) -> None:
    go_back(whole, tmp_path / "run", stopped)
    assert train.main(arguments(shards, tmp_path)) == 0
    assert all(equal(state(tmp_path / "run", step), state(whole, step)) for step in range(stopped, STEPS + 1))
    assert rows(tmp_path / "run") == rows(whole)


def test_a_step_with_frozen_parts_can_be_taken_again(whole: Path) -> None:
    assert set(replay(load_run(whole, []), whole, 4).differences().values()) == {0.0}


def test_bf16_keeps_frozen_weights_exact(shards: Path, tmp_path: Path) -> None:
    assert train.main(arguments(shards, tmp_path, "parallel.precision=bf16")) == 0
    assert_only_parts_move(tmp_path / "run")
    assert all(value.dtype == torch.float32 for value in denoisers.load(tmp_path / "run").parameters())
    assert denoisers.load(storage.checkpoint_path(tmp_path / "run", 4), weights="raw") is not None
    go_back(tmp_path / "run", tmp_path / "again" / "run", 3)
    assert train.main(arguments(shards, tmp_path / "again", "parallel.precision=bf16")) == 0
    assert equal(state(tmp_path / "run", STEPS), state(tmp_path / "again" / "run", STEPS))


def test_processes_share_exact_values() -> None:
    module = nn.Linear(5, 3)
    module.weight.requires_grad_(False)
    parts = [FrozenWeights(module, ParallelConfig(precision="bf16"), rank, 4) for rank in range(4)]
    slices = [item for part in parts for item in part.slices()]
    assert [(item.name, item.start, item.data.numel()) for item in slices] == [
        ("weight", 0, 3),
        ("weight", 3, 4),
        ("weight", 7, 4),
        ("weight", 11, 4),
    ]
    module.weight.data = module.weight.data.bfloat16()
    assert torch.equal(torch.cat([item.data for item in slices]).bfloat16(), module.weight.flatten())
    assert FrozenWeights(module, ParallelConfig(precision="fp32")).slices() == []


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_resume_at_a_boundary_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    zero2 = ("parallel.engine=deepspeed", "parallel.zero=2", "parallel.precision=bf16")
    for name in ("whole", "again"):
        if name == "again":
            go_back(tmp_path / "whole" / "run", tmp_path / "again" / "run", 4)
        launched.train(*arguments(shards, tmp_path / name, *zero2))
    assert_only_parts_move(tmp_path / "whole" / "run")
    assert equal(state(tmp_path / "whole" / "run", STEPS), state(tmp_path / "again" / "run", STEPS))


def test_new_parts_of_a_grown_model_are_trained_first(
    whole: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Image to video: the block that came with it alone, then, on resume with another value, everything."""
    grown = (f"init_from={{path: {whole}, weights: raw, grow_depth: true}}", "model.depth=3", "stages=[]")
    parts = ("trainable=[blocks.2]", "steps=2")
    with caplog.at_level(logging.INFO, logger="ltd"):
        assert train.main(arguments(shards, tmp_path, *grown, *parts)) == 0
    assert "parameters, 0.22M frozen" in caplog.text and "as they were drawn" not in caplog.text
    source, grew = state(whole, STEPS)["master"], state(tmp_path / "run", 2)
    assert equal({"": grew["buffer"]}, {"": source})
    assert all(name.startswith("blocks.2.") for name in grew["master"])
    assert worst(state(tmp_path / "run", 1)["master"], grew["master"]) > 0
    with caplog.at_level(logging.WARNING, logger="ltd"):
        assert train.main(arguments(shards, tmp_path, *grown, "steps=3")) == 0
    assert "parameters were frozen and are trained now" in caplog.text
    assert all(not torch.equal(state(tmp_path / "run", 3)["master"][name], value) for name, value in source.items())
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="ltd"):
        assert train.main(arguments(shards, tmp_path / "final", *grown, "trainable=[final]", "steps=1")) == 0
    assert "trainable: blocks.2." in caplog.text and "more are frozen as they were drawn" in caplog.text


def test_frozen_first_parts_get_the_gradients_of_the_whole(shards: Path, tmp_path: Path, whole: Path) -> None:
    """Recomputed blocks without a gradient at their input do what plain ones do."""
    common = (f"init_from={{path: {whole}, weights: raw}}", "stages=[]", "steps=2", "trainable=[blocks.1]")
    found: list[dict[str, Tensor]] = []
    for kind in ("none", "full"):
        more = (*common, f"parallel.activation_checkpointing={kind}")
        assert train.main(arguments(shards, tmp_path / kind, *more)) == 0
        found.append(state(tmp_path / kind / "run", 2)["master"])
    assert worst(*found) == 0


def test_weights_that_were_never_trained_are_not_frozen(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(arguments(shards, tmp_path, "trainable=[final]"))
    assert "error: trainable: freezes weights that were never trained; set init_from" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainable=['']"], "trainable: got an empty name, needed names of parameters or modules"),
        (
            ["trainable=[final, blocks.7.atention]"],
            "trainable: 'blocks.7.atention' matches no parameter of the model; the nearest are blocks.*.attention, ",
        ),
        (["trainable=[final]", "parallel.zero=3"], "trainable: holds frozen weights, which parallel.zero=3 does not"),
        (["trainable=[final]", ALIGNED], "trainable: leaves the projector of alignment as it was drawn; add alignment"),
        (
            ["trainable=[alignment, blocks.1, final]", ALIGNED],
            "trainable: nothing before the end of block 1 (alignment.block), so the term of alignment would train its",
        ),
    ],
)
def test_parts_that_cannot_be_trained_alone_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_io.load(DenoiserRun, CONFIG, [*overrides, "stages=[]"])
    assert str(error.value).startswith(message)
    parts, *others = overrides
    stage = f"stages=[{{from_step: 7, set: {{trainable: {parts.partition('=')[2]}}}}}]"
    with pytest.raises(ConfigError) as error:
        config_io.load(DenoiserRun, CONFIG, [*others, stage])
    assert str(error.value).startswith(f"stages[0].set.{message}")


@pytest.mark.parametrize(
    "overrides", [["trainable=['*']", "parallel.zero=3"], ["trainable=[alignment, blocks.0]", ALIGNED]]
)
def test_parts_that_can_be_trained(overrides: list[str]) -> None:
    assert config_io.load(DenoiserRun, CONFIG, [*overrides, "stages=[]"]).trainable


def test_what_the_shipped_stages_set() -> None:
    run = config_io.load(DenoiserRun, CONFIG)
    held = [at_step(run, step)[0] for step in (0, 24, 36)]
    assert [bool(found.trainable) for found in held] == [False, True, False]
    assert [(v.num_frames, v.width) for found in held for v in found.data.views[:1]] == [(1, 32), (5, 32), (9, 48)]
    assert [found.objective.shift.factor for found in held] == [1.0, 2.0, 3.0]
    assert [found.optim.lr for found in held] == [1e-3, 1e-3, 5e-4]
