"""FSQ against its levels; VQ against cluster means, one process against two, one batch against micro-batches."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from ltd.autoencoders.quantizers import Fsq, FsqConfig, Vq, VqConfig
from ltd.config import ConfigError
from ltd.rng import DrawRandom

LEVELS = [(8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5), (8, 8, 8, 5, 5, 5)]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- FSQ


@pytest.mark.parametrize("levels", [*LEVELS, (2,) * 9, (2, 3, 4), (4096,)])
def test_fsq_indices_and_latents_are_a_bijection(levels: tuple[int, ...]) -> None:
    fsq = Fsq(FsqConfig(levels=levels))
    assert (fsq.num_codes, fsq.channels) == (math.prod(levels), len(levels))
    indices = torch.arange(fsq.num_codes).reshape(1, 1, 1, -1)
    latents = fsq.indices_to_latents(indices)
    rows = latents.movedim(1, -1).reshape(fsq.num_codes, -1)
    assert len(rows.unique(dim=0)) == fsq.num_codes
    assert latents.abs().max() == 1
    for channel, size in enumerate(levels):
        assert len(rows[:, channel].unique()) == size
    # back: undo the bound of each channel in float64
    size = torch.tensor(levels, dtype=torch.float64).reshape(1, -1, 1, 1, 1)
    half = torch.where(size == 2, 1.0, (size - 1) * 1.001 / 2)
    offset = torch.where((size % 2 == 0) & (size > 2), 0.5, 0.0)
    inside = latents.double() * torch.where(size == 2, 0.5, size.div(2, rounding_mode="floor"))
    z = torch.atanh((inside + offset) / half) - torch.atanh(offset / half)
    again = fsq(z)
    assert torch.equal(again.indices, indices)
    assert torch.equal(again.latents, latents)


def test_fsq_index_counts_the_first_channel_fastest() -> None:
    fsq = Fsq(FsqConfig(levels=(8, 6, 5)))
    z = torch.tensor([-9.0, -9.0, -9.0, 9.0, -9.0, -9.0, -9.0, 9.0, -9.0, -9.0, -9.0, 9.0]).reshape(4, 3, 1, 1, 1)
    assert fsq(z).indices.flatten().tolist() == [0, 7, 5 * 8, 4 * 48]
    assert fsq(torch.zeros(1, 3, 1, 1, 1)).latents.abs().max() == 0
    assert fsq.indices_to_latents(torch.zeros(1, 1, 1, 1, dtype=torch.int64)).flatten().tolist() == [-1, -1, -1]


@pytest.mark.parametrize("size", [2, 3, 8, 1003, 4096])
def test_fsq_stays_at_its_outermost_levels(size: int) -> None:
    fsq = Fsq(FsqConfig(levels=(size,)))
    z = torch.tensor([-100.0, -20.0, 20.0, 100.0]).reshape(4, 1, 1, 1, 1)
    assert fsq(z).indices.flatten().tolist() == [0, 0, size - 1, size - 1]


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3, 2)])
def test_fsq_reaches_its_levels_from_random_inputs(levels: tuple[int, ...]) -> None:
    fsq = Fsq(FsqConfig(levels=levels))
    found = fsq(1.5 * _randn(1, len(levels), 1, 1, 100_000))
    assert torch.equal(fsq.indices_to_latents(found.indices), found.latents)
    for channel, size in enumerate(levels):
        assert len(found.latents[:, channel].unique()) == size
    assert len(found.indices.unique()) >= 0.995 * fsq.num_codes
    assert found.losses.tolist() == [0.0]


def test_fsq_of_two_levels_is_the_sign() -> None:
    fsq, z = Fsq(FsqConfig(levels=(2, 2))), _randn(3, 2, 2, 4, 4).requires_grad_()
    found = fsq(z)
    assert torch.equal(found.latents, z.sign())
    found.latents.sum().backward()
    torch.testing.assert_close(z.grad, 1 - z.detach().tanh().square())


def test_fsq_passes_the_gradient_of_its_bound() -> None:
    fsq, z = Fsq(FsqConfig(levels=(8, 5))), _randn(2, 2, 1, 3, 3).requires_grad_()
    fsq(z).latents.sum().backward()
    wide = z.detach().double().requires_grad_()
    shift, half = math.atanh(0.5 / 3.5035), torch.tensor([3.5035, 2.002]).double()
    even, odd = torch.tanh(wide[:, 0] + shift) * half[0] / 4, torch.tanh(wide[:, 1]) * half[1] / 2
    (even.sum() + odd.sum()).backward()
    torch.testing.assert_close(z.grad, wide.grad.float(), rtol=1e-4, atol=1e-6)


def test_fsq_computes_in_fp32_whatever_comes_in() -> None:
    fsq, z = Fsq(FsqConfig(levels=(8, 5, 5, 5))), _randn(1, 4, 1, 40, 40).bfloat16()
    found = fsq.bfloat16()(z)
    assert found.latents.dtype == torch.float32
    expected = Fsq(FsqConfig(levels=(8, 5, 5, 5)))(z.float())
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.latents, expected.latents)


@pytest.mark.parametrize("levels", [(), (8, 1), (2,) * 63])
def test_fsq_refuses_impossible_levels(levels: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="^levels: "):
        FsqConfig(levels=levels)


# ---- VQ


def _vq(num_codes: int = 8, channels: int = 3, **options: Any) -> Vq:
    return Vq(VqConfig(num_codes=num_codes, **options), channels)


def _started(num_codes: int = 8, channels: int = 3, **options: Any) -> Vq:
    vq = _vq(num_codes, channels, **options)
    vq(_randn(4, channels, 2, 3, 3), draws=torch.arange(4))
    vq.update()
    return vq


def _buffers_equal(a: Vq, b: Vq) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class _Pair:
    """Two copies of a quantiser in two threads, joined at their seams."""

    def __init__(self, vq: Vq) -> None:
        self.copies = [copy.deepcopy(vq), copy.deepcopy(vq)]
        self.barrier, self.slots = Barrier(2, timeout=20), [torch.zeros(0)] * 2
        for rank, each in enumerate(self.copies):
            each.reduce_sum = lambda x, rank=rank: sum(self._exchange(rank, x))
            each.gather_rows = lambda x, rank=rank: torch.cat(self._exchange(rank, x, same_shape=True))

    def step(self, parts: list[list[tuple[Tensor, Tensor]]], seed: int = 0) -> None:
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(self._step, rank, parts[rank], seed) for rank in (0, 1)]:
                future.result()

    def _step(self, rank: int, batches: list[tuple[Tensor, Tensor]], seed: int) -> None:
        for z, draws in batches:
            self.copies[rank](z, draws=draws, seed=seed)
        self.copies[rank].update()

    def _exchange(self, rank: int, x: Tensor, same_shape: bool = False) -> list[Tensor]:
        self.slots[rank] = x
        self.barrier.wait()
        both = list(self.slots)
        self.barrier.wait()
        assert not same_shape or both[0].shape == both[1].shape
        return both


@pytest.mark.parametrize("options", [{}, {"restart_below": 3.0}, {"restart_below": 0.0}, {"decay": 0.0}])
@pytest.mark.parametrize("num_codes", [6, 100])
def test_two_processes_equal_one_on_their_joint_batch(options: dict[str, float], num_codes: int) -> None:
    one = _vq(num_codes, **options)
    pair = _Pair(one)
    for step in range(4):
        z, draws = _randn(5, 3, 2, 2, 3, seed=step) * (1 + step), torch.arange(5) + 5 * step
        one(z, draws=draws, seed=3)
        one.update()
        # uneven, out of order; in step 2 the second process has nothing
        cut = 5 if step == 2 else 3
        order = torch.tensor([4, 0, 2, 1, 3])
        parts = [[(z[i], draws[i])] if len(i) else [] for i in (order[:cut], order[cut:])]
        pair.step(parts, seed=3)
        assert _buffers_equal(pair.copies[0], pair.copies[1])
        torch.testing.assert_close(pair.copies[0].state_dict(), one.state_dict(), rtol=1e-6, atol=1e-7)
    assert one.initialized and not one.codebook.isnan().any()


def test_micro_batches_equal_one_batch() -> None:
    whole, parts = _started(30, decay=0.5), _started(30, decay=0.5)
    for step in range(3):
        z, draws = _randn(6, 3, 2, 2, 2, seed=step) * 2, torch.arange(6) + 6 * step
        whole(z, draws=draws)
        for i in (slice(2, 6), slice(0, 2)):
            parts(z[i], draws=draws[i])
        whole.update()
        parts.update()
        torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-6, atol=1e-7)


def test_first_update_takes_the_latents_of_least_priority_and_shares_the_uses() -> None:
    vq, z = _vq(4, 2), _randn(2, 2, 1, 3, 3)
    before = vq(z, draws=torch.tensor([11, 12]), seed=7)
    assert torch.equal(before.latents, z) and not before.indices.any() and not before.losses.any()
    vq.update()
    priority = DrawRandom(7, [11, 12]).uniform((1, 3, 3), "restart").flatten()
    expected = z.movedim(1, -1).reshape(-1, 2)[priority.argsort()[:4]]
    assert torch.equal(vq.codebook, expected)
    assert vq.counts.tolist() == [18 / 4] * 4
    torch.testing.assert_close(vq.sums, expected * 18 / 4)


def test_fewer_latents_than_codes_are_repeated_and_then_restart() -> None:
    vq, z = _vq(20, 2), _randn(1, 2, 1, 2, 3)
    vq(z, draws=torch.arange(1))
    vq.update()
    rows = z.movedim(1, -1).reshape(-1, 2)
    assert torch.cdist(vq.codebook, rows).min(1).values.max() < 0.1
    assert len(vq.codebook.unique(dim=0)) == 20
    assert vq.counts.tolist() == [1.0] * 6 + [0.0] * 14
    more = _randn(4, 2, 1, 4, 4, seed=1) + 50
    vq(more, draws=torch.arange(4) + 1)
    vq.update()
    fresh = (torch.cdist(vq.codebook, more.movedim(1, -1).reshape(-1, 2)).min(1).values == 0).sum()
    assert fresh >= 13  # one repeat may have been used by the far batch


def test_decay_zero_puts_codes_at_the_means_of_their_clusters() -> None:
    vq = _started(4, 3, decay=0.0, epsilon=0.0, restart_below=0.0)
    before = vq.codebook.clone()
    z = _randn(3, 3, 2, 4, 4, seed=5)
    found = vq(z, draws=torch.arange(3))
    vq.update()
    rows, index = z.movedim(1, -1).reshape(-1, 3).double(), found.indices.flatten()
    for code in range(4):
        mean = rows[index == code].mean(0) if (index == code).any() else before[code].double()
        torch.testing.assert_close(vq.codebook[code].double(), mean, rtol=1e-6, atol=1e-6)
        assert vq.counts[code] == (index == code).sum()


def test_moving_averages_follow_their_formula() -> None:
    vq = _started(4, 2, decay=0.9, epsilon=0.5, restart_below=0.0)
    counts, sums = vq.counts.double(), vq.sums.double()
    z = _randn(3, 2, 1, 4, 4, seed=5)
    one_hot = torch.nn.functional.one_hot(vq(z, draws=torch.arange(3)).indices.flatten(), 4).double()
    vq.update()
    counts = 0.9 * counts + 0.1 * one_hot.sum(0)
    sums = 0.9 * sums + 0.1 * one_hot.T @ z.movedim(1, -1).reshape(-1, 2).double()
    smoothed = (counts + 0.5) / (counts.sum() + 4 * 0.5) * counts.sum()
    assert (one_hot.sum(0) > 0).all()
    torch.testing.assert_close(vq.counts.double(), counts, rtol=1e-6, atol=0)
    torch.testing.assert_close(vq.codebook.double(), sums / smoothed[:, None], rtol=1e-5, atol=1e-6)


def test_a_code_without_use_stays_where_it_is() -> None:
    vq = _started(4, 2, decay=0.5, epsilon=1.0, restart_below=0.0)
    vq.codebook[3] = 1e3
    for step in range(200):
        vq(_randn(2, 2, 1, 2, 2, seed=step), draws=torch.arange(2) + 2 * step)
        vq.update()
    assert vq.codebook[3].tolist() == [1e3, 1e3]
    assert vq.codebook.isfinite().all()


def test_dead_codes_restart_at_the_first_candidates_and_get_time_to_be_used() -> None:
    vq = _started(4, 2, decay=0.99, restart_below=1.0)
    vq.codebook[1], vq.codebook[3] = 1e3, 1e3
    vq.counts.copy_(torch.tensor([20.0, 0.9, 20.0, 1.1]))
    kept = vq.codebook[3].clone()
    z = _randn(2, 2, 1, 4, 4, seed=9)
    vq(z, draws=torch.tensor([5, 6]), seed=1)
    vq.update()
    first = DrawRandom(1, [5, 6]).uniform((1, 4, 4), "restart").flatten().argmin()
    assert torch.equal(vq.codebook[1], z.movedim(1, -1).reshape(-1, 2)[first])
    assert torch.equal(vq.sums[1], 2 * vq.codebook[1])
    assert vq.counts[1] == 2.0
    assert torch.equal(vq.codebook[3], kept)  # 1.1 * 0.99 is above the limit


def test_small_updates_do_not_restart_evenly_used_codes() -> None:
    vq = _vq(64, 2, restart_below=1.0)
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")).reshape(1, 2, 1, 8, 8)
    vq(grid, draws=torch.arange(1))
    vq.update()
    codes = vq.codebook.clone()
    for step in range(1, 65):  # 16 of 64 codes are used at each update
        part = codes[16 * (step % 4) : 16 * (step % 4) + 16].T.reshape(1, 2, 1, 4, 4)
        vq(part, draws=torch.tensor([step]))
        vq.update()
    torch.testing.assert_close(vq.codebook, codes, rtol=1e-3, atol=1e-3)
    assert vq.usage()["dead"] == 0.0


def test_restarts_recover_a_codebook_that_the_latents_left() -> None:
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    usage, losses = [], []
    for restart_below in (0.0, 1.0):
        vq = _vq(8, 2, decay=0.8, restart_below=restart_below)
        for step in range(40):
            which = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(step))
            where = centers[which] if step else torch.full((64, 2), -30.0)
            z = (where + 0.1 * _randn(64, 2, seed=step)).T.reshape(1, 2, 1, 8, 8)
            found = vq(z, draws=torch.tensor([step]))
            vq.update()
        usage.append(vq.usage()["perplexity"])
        losses.append(float(found.losses))
    assert usage[0] < 4 < usage[1]
    assert losses[0] > 1
    assert losses[1] < 0.25 * 0.02


@pytest.mark.parametrize("case", ["no draws", "eval", "discarded", "no weight", "no forward"])
def test_nothing_is_collected(case: str) -> None:
    for vq in (_started(), _vq()):
        before = copy.deepcopy(vq.state_dict())
        z, draws = _randn(2, 3, 1, 2, 2, seed=3), torch.arange(2)
        match case:
            case "no draws":
                vq(z)
            case "eval":
                vq.eval()(z, draws=draws)
            case "discarded":
                vq(z, draws=draws)
                vq.discard()
            case "no weight":
                vq(z, draws=draws, weight=torch.zeros(2))
        vq.update()
        assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())


def test_samples_without_weight_are_left_out() -> None:
    with_failed, without = _started(20, decay=0.0), _started(20, decay=0.0)
    z, draws = _randn(3, 3, 1, 2, 2, seed=3), torch.arange(3)
    with_failed(z * torch.tensor([1.0, 0.0, 1.0]).reshape(3, 1, 1, 1, 1), draws=draws, weight=torch.tensor([1.0, 0, 1]))
    without(z[[0, 2]], draws=draws[[0, 2]])
    with_failed.update()
    without.update()
    assert _buffers_equal(with_failed, without)


def test_a_forward_changes_no_buffer() -> None:
    vq = _started()
    before = copy.deepcopy(vq.state_dict())
    vq(_randn(2, 3, 1, 2, 2), draws=torch.arange(2))
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    vq, resumed = _started(20), _vq(20)
    resumed.load_state_dict(copy.deepcopy(vq.state_dict()))
    assert set(vq.state_dict()) == {"codebook", "counts", "sums", "initialized"}
    for step in range(3):
        z, draws = _randn(4, 3, 2, 2, 2, seed=step) * 2, torch.arange(4) + 4 * step
        a, b = (each(z, draws=draws) for each in (vq, resumed))
        assert torch.equal(a.indices, b.indices) and torch.equal(a.latents, b.latents)
        vq.update()
        resumed.update()
        assert _buffers_equal(vq, resumed)


def test_commitment_is_the_weighted_mean_per_sample_and_pulls_to_the_code() -> None:
    vq = _started(8, 3, commitment=0.5)
    z = _randn(3, 3, 2, 2, 2, seed=4).requires_grad_()
    found = vq(z)
    codes = vq.indices_to_latents(found.indices)
    expected = 0.5 * (z.detach() - codes).square().flatten(1).mean(1)
    torch.testing.assert_close(found.losses, expected)
    gradient = torch.autograd.grad(found.losses.sum(), z)[0]
    torch.testing.assert_close(gradient, (z.detach() - codes) / 24)
    assert not _started(8, 3, commitment=0.0)(z).losses.any()


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_latents_are_the_codes_and_carry_the_chosen_gradient(gradient: str) -> None:
    vq = _started(8, 3, gradient=gradient)
    z, upstream = _randn(2, 3, 2, 3, 3, seed=4).requires_grad_(), _randn(2, 3, 2, 3, 3, seed=5)
    found = vq(z)
    assert torch.equal(found.latents, vq.indices_to_latents(found.indices))
    pulled = torch.autograd.grad((found.latents * upstream).sum(), z)[0]
    if gradient == "straight_through":
        assert torch.equal(pulled, upstream)
    else:
        scale = found.latents.detach().norm(dim=1) / z.detach().norm(dim=1)
        torch.testing.assert_close(pulled.norm(dim=1), upstream.norm(dim=1) * scale, rtol=1e-3, atol=0)


def test_indices_are_the_nearest_codes_at_their_place() -> None:
    vq, z = _started(8, 3), _randn(2, 3, 2, 3, 4, seed=4)
    distance = (z[:, None] - vq.codebook.reshape(1, 8, 3, 1, 1, 1)).square().sum(2)
    found = vq(z)
    assert torch.equal(found.indices, distance.argmin(1))
    assert found.indices.dtype == torch.int64 and found.losses.dtype == torch.float32


def test_bf16_input_is_quantised_in_fp32() -> None:
    for gradient in ("straight_through", "rotation"):
        vq, other = _started(8, 3, gradient=gradient), _started(8, 3, gradient=gradient)
        z, draws = _randn(2, 3, 2, 3, 3, seed=4).bfloat16().requires_grad_(), torch.arange(2)
        copied = z.detach().float().requires_grad_()
        narrow, wide = vq(z, draws=draws), other(copied, draws=draws)
        assert narrow.latents.dtype == narrow.losses.dtype == torch.float32
        assert torch.equal(narrow.latents, wide.latents) and torch.equal(narrow.losses, wide.losses)
        for found in (narrow, wide):
            (found.latents.sum() + found.losses.sum()).backward()
        assert torch.equal(z.grad, copied.grad.bfloat16())
        vq.update()
        other.update()
        assert _buffers_equal(vq, other)


def test_usage_of_even_uneven_and_dead_codes() -> None:
    vq = _started(8, 3)
    vq.counts.fill_(7.0)
    assert vq.usage() == pytest.approx({"perplexity": 8.0, "used": 1.0, "dead": 0.0})
    vq.counts.copy_(torch.tensor([30.0, 30.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0]))
    share = [30 / 60.9, 30 / 60.9, 0.9 / 60.9]
    perplexity = math.exp(-sum(p * math.log(p) for p in share))
    assert vq.usage() == pytest.approx({"perplexity": perplexity, "used": 3 / 8, "dead": 6 / 8})
    assert _vq().usage() == {"perplexity": 0.0, "used": 0.0, "dead": 0.0}


def test_codes_used_evenly_have_the_perplexity_of_their_number() -> None:
    vq = _started(8, 3, decay=0.0, restart_below=0.0)
    vq(vq.codebook.T.reshape(1, 3, 1, 2, 4).repeat(1, 1, 5, 1, 1), draws=torch.arange(1))
    vq.update()
    assert vq.usage()["perplexity"] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_codes", 1), ("decay", 1.0), ("decay", -0.1), ("commitment", -1.0), ("restart_below", -1.0), ("epsilon", -1)],
)
def test_vq_refuses_impossible_numbers(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: got {value}, needed"):
        VqConfig(**{"num_codes": 8, field: value})  # type: ignore[arg-type]


def test_mistakes_of_shape_are_named() -> None:
    fsq, vq = Fsq(FsqConfig(levels=(4, 4))), _started(8, 3)
    with pytest.raises(ConfigError, match="gradient: rotation needs 2 or more latent channels, got 1"):
        _vq(8, 1, gradient="rotation")
    for quantizer, channels in ((fsq, 2), (vq, 3)):
        with pytest.raises(
            ValueError, match=rf"latents: got shape \(1, 4, 1, 1, 1\), needed \(b, {channels}, t, h, w\)"
        ):
            quantizer(torch.zeros(1, 4, 1, 1, 1))
    with pytest.raises(ValueError, match=r"draws: got shape \(3,\), needed \(2,\)"):
        vq(torch.zeros(2, 3, 1, 1, 1), draws=torch.arange(3))
    with pytest.raises(ValueError, match="indices: got 0 to 16, needed 0 to 15"):
        fsq.indices_to_latents(torch.tensor([0, 16]).reshape(1, 1, 1, 2))
    with pytest.raises(ValueError, match="indices: got -1 to 8, needed 0 to 7"):
        vq.indices_to_latents(torch.tensor([-1, 8]).reshape(1, 1, 1, 2))
    with pytest.raises(ValueError, match="no codes before its first update"):
        _vq().indices_to_latents(torch.zeros(1, 1, 1, 1, dtype=torch.int64))
