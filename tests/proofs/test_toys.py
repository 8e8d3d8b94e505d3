"""A short part of docs/proofs/toys.md, and that each of its tables can miss."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ltd.diffusion import FlowMatching, FlowMatchingConfig, LinearPath, SamplerConfig
from ltd.rng import generator
from tools.proofs import _identities, _mixture, toys
from tools.proofs._mixture import MIXTURE, Case, sliced_distance

NUM = 2048


def misses() -> list[str]:
    return _identities.misses_of(_identities.options_off(), _identities.limits())


#: Drawn once for all tests.
draw_reference = functools.cache(toys.draw_reference)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toys, "draw_reference", draw_reference)
    monkeypatch.setattr(_mixture, "SAMPLER", SamplerConfig(kind="heun", steps=40))


def test_options_that_are_off_are_the_baseline_and_the_recipes_limits_hold() -> None:
    assert misses() == []


@pytest.mark.parametrize(
    ("owner", "name", "change", "expected"),
    [
        ("ltd.diffusion.objectives.FlowMatching", "_squeeze", lambda old: lambda self, t: t * (1 - 2**-20), "loss"),
        ("ltd.diffusion.objectives", "_weighted_mean", lambda old: lambda *a: old(*a) * 1.00001, "cell weights"),
        ("ltd.diffusion.guidance", "_rescaled", lambda old: lambda v, *a: v, "guidance.rescale 0.7: changes nothing"),
        ("ltd.diffusion.paths.LinearPath", "noise_per_velocity", lambda old: lambda self, t: 1 + t, "score"),
        ("ltd.diffusion.prediction._Edm", "inputs", lambda old: lambda self, x, t: (x, old(self, x, t)[1]), "unit"),
    ],
)
def test_a_small_change_of_the_library_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: str, name: str, change: Callable[..., object], expected: str
) -> None:
    changed = pkgutil.resolve_name(owner)
    monkeypatch.setattr(changed, name, change(getattr(changed, name)))
    assert any(expected in miss for miss in misses())


def test_the_distance_of_a_shift_is_known_and_the_mixture_has_unit_scale() -> None:
    points = MIXTURE.draw(200_000, generator(0, "test"))
    assert points.mean(0).abs().max() < 0.01 and (points.std(0) - 1).abs().max() < 0.01
    shift = torch.tensor([0.3, -0.4])
    assert sliced_distance(points[:1000], points[:1000] + shift) == pytest.approx(0.5 / 2**0.5, rel=1e-4)


@pytest.mark.usefixtures("short")
def test_a_short_training_learns_the_mixture_and_wrong_conversions_do_not() -> None:
    default = toys.cases()[0]
    found = toys.measure_objectives([default], steps=800, num=NUM)
    needed = {row[0]: row[-1] for row in found.rows}
    assert needed[default.name] == "within" and needed["time runs backwards"] == needed["noise"] == "beyond"
    assert found.misses == []


@pytest.mark.usefixtures("short")
def test_a_velocity_of_the_wrong_sign_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    default = toys.cases()[0]
    monkeypatch.setattr(LinearPath, "velocity", lambda self, x0, eps, t=None: x0 - eps)
    broken = toys.measure_objectives([default], steps=20, num=NUM)
    assert {miss.split(":")[0] for miss in broken.misses} >= {default.name, "exact network, linear, velocity"}


@pytest.mark.usefixtures("short")
def test_a_measure_that_takes_wrong_samples_for_right_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        toys, "wrong_denoisers", lambda trained: {"not wrong": _mixture.exact_network(LinearPath(), "velocity")}
    )
    (miss,) = toys.measure_objectives([], num=NUM).misses
    assert miss.startswith("not wrong: ") and miss.endswith("sees nothing")


def test_a_cell_that_does_not_count_leaves_its_parameters_alone() -> None:
    masked, whole = (
        _mixture.train(Case("mask", FlowMatchingConfig(), counts=counts), 3) for counts in ((True, False), (True, True))
    )
    assert toys.moved(masked) == []
    assert all(".1." in miss and miss.endswith(" moved") for miss in toys.moved(whole))
    assert len(toys.moved(whole)) == 10


def test_samples_of_a_case_follow_its_shift() -> None:
    seen: list[Tensor] = []

    def spy(x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        seen.append(t[0])
        return x_t

    shifted = next(case for case in toys.cases() if case.name == "shift 2")
    _mixture.generate(spy, shifted, 2)
    assert seen[1].item() == pytest.approx(2 * 0.99 / 1.99)
    assert FlowMatching(shifted.config).evaluation_times(1, 1).item() == pytest.approx(2 / 3)
