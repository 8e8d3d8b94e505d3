"""Training with known latents: off is off, the same on any batch, and one held-out figure per task."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import train
from ltd import config
from ltd.denoisers import FrameTasksConfig, build_denoiser
from ltd.parallel.layout import Layout
from ltd.rng import DrawRandom
from ltd.training.denoiser import DenoiserRun, DenoiserStage
from ltd.training.denoiser_heldout import task_sums
from ltd.training.latent_inputs import pack

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "debug" / "denoiser_frames.yaml"
TASKS = ("image_to_video", "first_last", "interpolation", "extension", "retrodiction", "inpainting")
SMALL = ("toy_data.num_samples=8", "toy_data.num_heldout=4", "parallel.engine=torch")


@pytest.fixture(scope="module", params=["times", "channels"])
def stage(request: pytest.FixtureRequest) -> Iterator[DenoiserStage]:
    """A stage whose weights are redrawn, so that what is given changes what it predicts."""
    options = [
        f"model.frames={request.param}",
        f"model.frame_mask_channels={3 if request.param == 'channels' else 1}",
        "data.shards=nowhere",
    ]
    run = config.load(DenoiserRun, CONFIG, [*options, "parallel.engine=torch", "evaluation.every=0"])
    model = build_denoiser(run.model)
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=random)
    layout = Layout.from_environment(run.parallel)
    yield DenoiserStage(run, model, layout, _Inputs(run))  # type: ignore[arg-type]
    layout.close()


class _Inputs:
    """What the stage asks of ``LatentInputs``, for latents that are there already."""

    aligner = None

    def __init__(self, run: DenoiserRun) -> None:
        from ltd.denoisers import Conditioning

        self.null = Conditioning(text=torch.zeros(1, 3, 32), text_mask=torch.zeros(1, 3, dtype=torch.bool))

    def conditioning(self, tensors: dict[str, Tensor]) -> Any:
        from ltd.denoisers import Conditioning

        return Conditioning(text=tensors["text"], text_mask=tensors["text_mask"])


def tensors(draws: list[int], frames: int = 5) -> dict[str, Tensor]:
    latents = [torch.randn(8, frames, 4, 4, generator=torch.Generator().manual_seed(d)) for d in draws]
    texts = [torch.randn(3, 32, generator=torch.Generator().manual_seed(1000 + d)) for d in draws]
    return {
        "latents": torch.stack(latents),
        "text": torch.stack(texts),
        "text_mask": torch.ones(len(draws), 3, dtype=torch.bool),
        "draws": torch.tensor(draws),
        "weight": torch.ones(len(draws)),
    }


@torch.no_grad()
def losses(stage: DenoiserStage, draws: list[int], tasks: FrameTasksConfig | None, frames: int = 5) -> Tensor:
    run = dataclasses.replace(stage.run, frame_tasks=tasks)
    return DenoiserStage(run, stage.engine, stage.layout, stage.inputs).terms(tensors(draws, frames))["loss"]


def test_rates_of_zero_are_off_bit_for_bit(stage: DenoiserStage) -> None:
    off = losses(stage, [3, 4, 5], None)
    assert torch.equal(losses(stage, [3, 4, 5], FrameTasksConfig()), off)
    on = losses(stage, [3, 4, 5], FrameTasksConfig(extension=1.0))
    assert (on - off).abs().min() > 1e-3


def test_the_loss_of_a_sample_is_its_own_whatever_is_beside_it(stage: DenoiserStage) -> None:
    draws, tasks = list(range(40, 52)), stage.run.frame_tasks
    together = losses(stage, draws, tasks)
    apart = torch.cat([losses(stage, [draw], tasks) for draw in draws])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    turned = losses(stage, draws[::-1], tasks)
    torch.testing.assert_close(together, turned.flip(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_in_a_pack_a_sample_has_the_loss_and_gradient_it_has_alone(stage: DenoiserStage, name: str) -> None:
    tasks = FrameTasksConfig(**{name: 0.8})
    made = DenoiserStage(dataclasses.replace(stage.run, frame_tasks=tasks), *vars_of(stage))
    groups = [tensors([40, 41, 42], frames=5), tensors([50, 51], frames=1), tensors([60, 61, 62], frames=3)]
    model: nn.Module = stage.engine  # type: ignore[assignment]
    results = []
    for batches in (groups, [pack(groups)]):
        found = torch.cat([made.terms(group)["loss"] for group in batches])
        found.sum().backward()  # type: ignore[no-untyped-call]
        results.append(
            (found.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        )
        model.zero_grad()
    (losses_alone, alone), (losses_packed, packed) = results
    torch.testing.assert_close(losses_packed, losses_alone, rtol=1e-5, atol=0)
    assert (packed - alone).norm() < 1e-5 * alone.norm()
    off = DenoiserStage(dataclasses.replace(stage.run, frame_tasks=None), *vars_of(stage))
    assert not torch.equal(off.terms(pack(groups))["loss"], losses_packed)
    zero = DenoiserStage(dataclasses.replace(made.run, frame_tasks=FrameTasksConfig()), *vars_of(made))
    assert torch.equal(zero.terms(pack(groups))["loss"], off.terms(pack(groups))["loss"])


def vars_of(stage: DenoiserStage) -> tuple[Any, Layout, Any]:
    """What a stage like this one is made of, besides its run."""
    return stage.engine, stage.layout, stage.inputs


def test_a_sample_that_is_given_nothing_has_the_loss_of_a_run_without_tasks(stage: DenoiserStage) -> None:
    """Images, of which only a hole can be made: the other tasks leave them as they are."""
    tasks = FrameTasksConfig(image_to_video=0.5, retrodiction=0.5)
    torch.testing.assert_close(losses(stage, [1, 2, 3], tasks, frames=1), losses(stage, [1, 2, 3], None, frames=1))


def test_predictions_of_known_cells_change_no_loss(stage: DenoiserStage) -> None:
    run = dataclasses.replace(stage.run, frame_tasks=FrameTasksConfig(retrodiction=1.0))

    def loss(known_error: float, other_error: float) -> Tensor:
        def engine(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            return torch.where(cond.frames.mask[:, :1], known_error, other_error).expand_as(x_t)

        made = DenoiserStage(run, engine, stage.layout, stage.inputs)  # type: ignore[arg-type]
        return made.terms(tensors([1, 2, 3]))["loss"]

    assert torch.equal(loss(0.0, 0.0), loss(9.0, 0.0))
    assert (loss(0.0, 9.0) - loss(0.0, 0.0)).min() > 1


def test_nothing_behind_the_mask_reaches_the_model(stage: DenoiserStage) -> None:
    """What is told of unknown latents is zero, beside the input as in its place."""
    told: list[Tensor] = []

    def engine(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        told.append(cond.frames.latents * (1.0 if stage.run.model.frames == "channels" else cond.frames.mask))
        assert cond.frames.mask.shape[1] == (3 if stage.run.model.frames == "channels" else 1)
        assert torch.equal(cond.frames.mask, cond.frames.mask[:, :1].expand_as(cond.frames.mask))
        masks.append(cond.frames.mask[:, :1])
        return torch.zeros_like(x_t)

    masks: list[Tensor] = []
    run = dataclasses.replace(stage.run, frame_tasks=FrameTasksConfig(inpainting=1.0))
    given = tensors([7, 8])
    made = DenoiserStage(run, engine, stage.layout, stage.inputs)  # type: ignore[arg-type]
    made.terms(given)
    unknown = ~masks[0].expand_as(told[0])
    assert unknown.any() and not told[0][unknown].any()
    assert torch.equal(told[0][~unknown], given["latents"][~unknown])


def test_the_held_out_figure_of_a_task_is_its_loss(stage: DenoiserStage) -> None:
    seen: list[Any] = []

    def engine(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append((cond.frames, t))
        return torch.where(cond.frames.mask[:, :1], 9.0, error).expand_as(x_t)

    given, random = tensors([1, 2, 3]), DrawRandom(0, [1, 2, 3])
    made = DenoiserStage(stage.run, engine, stage.layout, stage.inputs)  # type: ignore[arg-type]
    latents, weight = given["latents"], torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    error = 0.0

    def sums(latents: Tensor) -> Tensor:
        batch = (latents, weight, stage.inputs.conditioning(given), random)
        return task_sums("first_last", stage.run.model, made.objective, made.denoiser, batch)

    total, count = sums(latents)
    frames, time = seen[0]
    assert frames.mask[0, 0, :, 0, 0].tolist() == [True, False, False, False, True]
    assert torch.equal(frames.latents[:, :, 0], latents[:, :, 0]) and time.tolist() == [0.5] * 3
    truth = random.normal(latents.shape[1:], "noise") - latents
    expected = truth[:, :, 1:4].square().flatten(1).mean(1)
    assert float(count) == 2 and float(total) == pytest.approx(float(expected[0] + expected[2]), rel=1e-5)
    assert sums(latents[:, :, :1]).tolist() == [0.0, 0.0]


def test_a_run_reports_each_task_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def start(name: str, steps: int) -> list[dict[str, Any]]:
        words = [f"run_dir={tmp_path / name}", f"steps={steps}", "checkpoint.every=2", "evaluation.every=2", *SMALL]
        assert train.main([str(CONFIG), *words]) == 0
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    start("stopped", 2)
    rows, whole = start("stopped", 4), start("whole", 4)
    names = ["train/loss", "eval/denoise", *(f"eval/denoise_{task}" for task in TASKS)]
    found = [[row[name] for row in rows if name in row] for name in names]
    assert [len(values) for values in found[1:]] == [3] * 7, "at steps 0, 2 and 4"
    assert found == [[row[name] for row in whole if name in row] for name in names]
    assert len({values[-1] for values in found[1:]}) == 7, "each task is a loss of its own"
