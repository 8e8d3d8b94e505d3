"""What is computed once for many calls: modulations of all steps, tables of a grid, the padding of texts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ltd import denoisers
from ltd.denoisers import Conditioning, Parametrized, stack, steps
from ltd.denoisers.blocks import DualBlock
from ltd.diffusion import (
    DataPredictionConfig,
    EdmPredictionConfig,
    GuidanceConfig,
    GvpPathConfig,
    LinearPathConfig,
    NoisePredictionConfig,
    ParametrizationConfig,
    SamplerConfig,
    ShiftConfig,
    VelocityPredictionConfig,
    VpPathConfig,
    guided,
    network_times,
    sample,
)
from tests.parallel.family_check import FAMILY, inputs, member

F64 = torch.float64
TIMES = torch.tensor([1.0, 0.7, 0.2], dtype=F64)
PATHS = [LinearPathConfig(), GvpPathConfig(), VpPathConfig()]
PREDICTIONS = [
    VelocityPredictionConfig(),
    DataPredictionConfig(),
    NoisePredictionConfig(),
    EdmPredictionConfig(),
    EdmPredictionConfig(min_time=1e-6),
]


@pytest.mark.parametrize("name", FAMILY)
def test_conditions_prepared_for_steps_give_what_the_model_gives(name):
    model = member(name).eval()
    x_t, _, cond = inputs(name, False, F64)
    cond = dataclasses.replace(cond, kept=None)
    for time, ready in zip(TIMES, model.prepare_steps(cond, TIMES), strict=True):
        t = time.expand(len(x_t))
        assert ready.prepared.step is not None
        expected = model(x_t, t, cond)
        assert torch.allclose(model(x_t, t, ready), expected, rtol=0, atol=1e-12 * expected.std().item())


@pytest.mark.parametrize("name", ["numbers", "layer norms", "joint", "dual, then single", "frames in place"])
def test_no_step_embeds_a_time_or_projects_a_modulation(name):
    model = member(name).eval()
    x_t, _, cond = inputs(name, False, F64)
    ready = model.prepare_steps(cond, TIMES)
    calls = []
    modulations = [
        m.modulation
        for block in model.blocks
        for m in (block.modules() if isinstance(block, DualBlock) else [block])
        if hasattr(m, "modulation")
    ]
    modulations = [m for m in modulations if model.modulation is None] + [model.modulation]
    watched = [
        m for m in (*modulations, model.time_embedding, model.text_embedding, model.final.modulation) if m is not None
    ]
    for module in watched:
        module.register_forward_hook(lambda *_: calls.append(1))
    model(x_t, TIMES[1].expand(len(x_t)), ready[1])
    assert len(watched) >= 3 and calls == []
    model(x_t, TIMES[1].expand(len(x_t)), cond)
    assert len(calls) == len(watched)


def test_rows_that_are_modulated_alike_are_computed_once():
    model = member("layer norms")
    x_t, _, cond = inputs("layer norms", False, F64)
    step = model.prepare_steps(cond, TIMES)[0].prepared.step
    assert len(step.blocks) == 1 and len(step.blocks[0]) == 1 < len(x_t)
    labelled = member("registers")
    x_t, _, cond = inputs("registers", False, F64)
    assert cond.label is not None
    step = labelled.prepare_steps(cond, TIMES)[0].prepared.step
    assert len(step.blocks) == len(labelled.blocks) and len(step.blocks[0][0]) == len(x_t)


def test_what_would_be_too_large_is_left_to_the_steps(monkeypatch):
    model = member("registers")
    x_t, t, cond = inputs("registers", False, F64)
    monkeypatch.setattr(steps, "MAX_STEP_ELEMENTS", 1000)
    ready = model.prepare_steps(cond, TIMES)
    assert len(ready) == 3 and ready[0].prepared.step is None and ready[0].prepared.keys
    assert torch.equal(model(x_t, t, ready[0]), model(x_t, t, cond))


def test_another_time_than_the_steps_is_refused():
    model = member("numbers")
    x_t, _, cond = inputs("numbers", False, F64)
    ready = model.prepare_steps(cond, TIMES)
    with pytest.raises(ValueError, match=r"t: got 0.7 with conditions prepared for the step at 1"):
        model(x_t, TIMES[1].expand(len(x_t)), ready[0])
    with pytest.raises(ValueError, match="t: got a time for every latent frame with conditions prepared for a step"):
        model(x_t, torch.ones(len(x_t), x_t.shape[2]), ready[0])


@pytest.mark.parametrize("kind", ["euler", "heun", "unipc"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
def test_a_sampler_gives_what_it_gives_step_by_step(kind, interval):
    network = member("numbers").eval()
    model = Parametrized(network, ParametrizationConfig(prediction=EdmPredictionConfig(time_input="log_sigma")))
    x_t, _, cond = inputs("numbers", False, F64)
    null = dataclasses.replace(cond, text=torch.zeros_like(cond.text), text_mask=torch.zeros_like(cond.text_mask))
    config = SamplerConfig(kind=kind, steps=5)
    guidance = GuidanceConfig(scale=2.5, interval=interval)
    calls = []
    network.time_embedding.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for joined in (stack, None):
        for prepare in (None, model.prepare_steps):
            calls.clear()
            led = guided(model, null, guidance, stack=joined, prepare_steps=prepare)
            results.append(sample(led, x_t, cond, config))
            assert prepare is None or len(calls) <= 2
        whole = sample(
            model, x_t, cond, dataclasses.replace(config, guidance=guidance), null_cond=null, stack=joined,
            prepare_steps=model.prepare_steps,
        )  # fmt: skip
        assert torch.equal(whole, results[-1])
    for found in results[1:]:
        assert torch.allclose(found, results[0], rtol=0, atol=1e-10)
    assert (results[0] - x_t).abs().max() > 0.1


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda prediction: prediction.kind)
def test_prepared_steps_of_a_single_precision_sampler_are_its_steps(prediction, path):
    """The sampler's grid is fp64, what the network sees is fp32: next to 1 the two are different noise levels."""
    network = member("numbers", torch.float32).eval()
    model = Parametrized(network, ParametrizationConfig(prediction=prediction, path=path))
    x_t, _, cond = inputs("numbers", False, torch.float32)
    config = SamplerConfig(kind="euler", steps=3, shift=ShiftConfig(factor=30.0))
    plain, prepared = (sample(model, x_t, cond, config, prepare_steps=ready) for ready in (None, model.prepare_steps))
    assert torch.isfinite(plain).all()
    assert (prepared - plain).abs().max() < 1e-5 * plain.std()


def test_times_of_a_network_are_those_that_its_denoiser_gives():
    seen = []

    def network(x, time, cond):
        seen.append(time)
        return x

    for prediction in (EdmPredictionConfig(time_input="log_sigma"), EdmPredictionConfig(time_input="time")):
        config = ParametrizationConfig(prediction=prediction)
        denoisers.parametrized.as_denoiser(network, config)(torch.zeros(3, 1, 1, 1, 1, dtype=F64), TIMES, None)
        assert torch.equal(network_times(config, TIMES), seen.pop())


def test_tables_of_a_grid_are_made_once_and_the_oldest_goes(monkeypatch):
    made = []
    tables = steps.Tables()
    monkeypatch.setattr(steps, "MAX_TABLES", 2)
    for key in ("a", "b", "a", "c", "a", "b", None, None):
        tables(key, lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "b", None, None]


def test_tables_made_while_sampling_serve_training():
    model = member("numbers")
    x_t, t, cond = inputs("numbers", False, F64)
    with torch.inference_mode():
        before = model(x_t, t, cond)
    out = model(x_t, t, cond)
    out.square().mean().backward()
    assert torch.equal(out, before)
    other = model(x_t[:, :, :, :, :4], t, cond)
    assert torch.equal(other, member("numbers")(x_t[:, :, :, :, :4], t, cond))


@pytest.mark.parametrize("packed", [False, True])
def test_padding_that_is_read_counts_as_often_as_there_is_padding(packed):
    """One zero token that stands for many against all of them written out."""
    model = member("layer norms")
    length = model.config.text_length
    x_t, t, cond = inputs("layer norms", packed, F64)
    assert model.config.folds_text and cond.text.shape[1] < length
    embedded = []
    model.text_embedding.register_forward_hook(lambda module, given, out: embedded.append(out.shape[1]))
    folded = model(x_t, t, cond)
    real = int(cond.text_mask.sum())
    assert embedded.pop() == (real + len(t) if packed else cond.text.shape[1] + 1)
    missing = length - cond.text.shape[1]
    text = F.pad(torch.where(cond.text_mask[..., None], cond.text, 0), (0, 0, 0, missing))
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    written = model(x_t, t, dataclasses.replace(cond, text=text, text_mask=mask))
    for ours, theirs in zip(folded, written, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12 * theirs.std().item())
    none = model(x_t, t, dataclasses.replace(cond, text=None, text_mask=None))
    zeros = Conditioning(text=torch.zeros_like(text), text_mask=mask)
    for ours, theirs in zip(none, model(x_t, t, dataclasses.replace(cond, **vars(zeros))), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12 * theirs.std().item())
