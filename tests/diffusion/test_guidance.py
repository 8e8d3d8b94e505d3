import pytest
import torch

from ltd.config import ConfigError
from ltd.diffusion import GuidanceConfig, SamplerConfig, guided, sample

X = torch.randn(3, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.2, 0.5, 0.9])
COND, NULL = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.0, 0.5])


class Denoiser:
    """A denoiser that is nonlinear in everything and counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, cond):
        self.calls.append(len(x_t))
        view = (-1, 1, 1, 1, 1)
        return torch.sin(x_t * cond.view(view)) + (t * cond).cos().view(view)


def run(**options):
    denoiser = Denoiser()
    v = guided(denoiser, NULL, GuidanceConfig(**options))(X, T, COND)
    return v, denoiser.calls


def plain(cond):
    return Denoiser()(X, T, cond)


def test_scale_one_is_the_denoiser_itself_and_skips_the_second_pass():
    denoiser = Denoiser()
    assert guided(denoiser, None, GuidanceConfig(scale=1.0)) is denoiser
    v, calls = run(scale=1.0)
    assert torch.equal(v, plain(COND)) and calls == [3]


def test_formula():
    v, calls = run(scale=2.5)
    assert torch.allclose(v, plain(NULL) + 2.5 * (plain(COND) - plain(NULL))) and calls == [3, 3]
    assert torch.equal(run(scale=0.0)[0], plain(NULL))


def test_whole_interval_is_plain_guidance_and_outside_is_conditional():
    assert torch.equal(run(scale=2.5, interval=(0.0, 1.0))[0], run(scale=2.5)[0])
    v, calls = run(scale=2.5, interval=(0.3, 0.6))
    assert torch.equal(v[1], run(scale=2.5)[0][1]) and torch.equal(v[[0, 2]], plain(COND)[[0, 2]])
    assert calls == [3, 3]
    v, calls = run(scale=2.5, interval=(0.95, 1.0))
    assert torch.equal(v, plain(COND)) and calls == [3]


def test_guided_channels():
    whole = run(scale=2.5)[0]
    assert torch.equal(run(scale=2.5, channels=4)[0], whole)
    v = run(scale=2.5, channels=3)[0]
    assert torch.equal(v[:, :3], whole[:, :3]) and torch.equal(v[:, 3:], plain(COND)[:, 3:])


def test_one_stacked_call_equals_two():
    denoiser = Denoiser()
    v = guided(denoiser, NULL, GuidanceConfig(scale=2.5), stack=torch.cat)(X, T, COND)
    assert torch.allclose(v, run(scale=2.5)[0], atol=1e-6) and denoiser.calls == [6]


def test_the_sampler_guides():
    config = SamplerConfig(steps=3, guidance=GuidanceConfig(scale=2.5))
    by_hand = sample(guided(Denoiser(), NULL, config.guidance), X, COND, SamplerConfig(steps=3))
    assert torch.equal(sample(Denoiser(), X, COND, config, null_cond=NULL), by_hand)
    assert not torch.allclose(by_hand, sample(Denoiser(), X, COND, SamplerConfig(steps=3)))


def test_a_weaker_denoiser_takes_the_place_of_no_condition():
    denoiser, weaker = Denoiser(), Denoiser()

    def guide(x_t, t, cond):
        return 0.5 * weaker(x_t, t, cond)

    v = guided(denoiser, None, GuidanceConfig(scale=2.5), guide=guide)(X, T, COND)
    assert torch.allclose(v, 0.5 * plain(COND) + 2.5 * 0.5 * plain(COND))
    assert denoiser.calls == weaker.calls == [3]
    assert guided(denoiser, None, GuidanceConfig(), guide=guide) is denoiser


def test_rescaling_brings_back_the_deviation_of_the_condition():
    plainly, conditional = run(scale=2.5)[0], plain(COND)
    dims = (1, 2, 3, 4)
    whole = run(scale=2.5, rescale=1.0)[0]
    assert torch.allclose(whole.std(dims), conditional.std(dims), rtol=1e-5)
    assert not torch.allclose(plainly.std(dims), conditional.std(dims), rtol=0.05)
    half = run(scale=2.5, rescale=0.5)[0]
    assert torch.allclose(half, (whole + plainly) / 2, atol=1e-6)
    assert torch.equal(run(scale=2.5, rescale=0.0)[0], plainly)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale": 1.5}, r"rescale: got 1.5, needed within \[0, 1\]"),
        ({"interval": (0.8, 0.2)}, "interval: got"),
        ({"interval": (0.0, 1.5)}, "interval"),
        ({"channels": 0}, "channels"),
    ],
)
def test_bad_values_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        GuidanceConfig(**options)


def test_conditions_are_joined_and_prepared_once_and_again_for_others():
    calls = []

    def prepare(cond):
        calls.append(cond)
        return ("ready", cond)

    def denoiser(x_t, t, cond):
        ready, values = cond
        assert ready == "ready"
        return x_t * torch.tensor(values).view(-1, 1)

    config = GuidanceConfig(scale=3.0, interval=(0.0, 0.5))
    model = guided(denoiser, [2.0], config, stack=lambda pair: pair[0] + pair[1], prepare=prepare)
    x, inside, outside = torch.ones(1, 2), torch.tensor([0.2]), torch.tensor([0.9])
    first, second = [5.0], [7.0]
    assert [float(model(x, t, first)[0, 0]) for t in (outside, inside, inside, outside)] == [5.0, 11.0, 11.0, 5.0]
    assert calls == [[5.0], [5.0, 2.0]]
    assert float(model(x, inside, second)[0, 0]) == 17.0 and calls[2:] == [[7.0, 2.0]]
    alone = guided(denoiser, None, GuidanceConfig(), prepare=prepare)
    assert float(alone(x, inside, first)[0, 0]) == 5.0 and calls[3:] == [[5.0]]
    led = guided(denoiser, None, config, guide=lambda x_t, t, cond: x_t * cond[0], prepare=prepare)
    assert float(led(x, inside, first)[0, 0]) == 5.0  # the guide is given the conditions as they are
