"""Members of the family: identities that their papers imply, and what their options must and must not change."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ltd.config import ConfigError, from_dict, to_dict
from ltd.denoisers import Conditioning, Dit, DitConfig, ExpertsConfig, Frames, HeadConfig, Parametrized, stack
from ltd.denoisers.alignment import DenoiserAlignmentConfig, TokenProjector
from ltd.denoisers.blocks import DualBlock
from ltd.diffusion import EdmPredictionConfig, ParametrizationConfig
from ltd.nn.moe import ExpertChoice
from ltd.nn.patch import grid_positions, patchify, unpatchify
from ltd.nn.rope import apply_rope, rope_tables
from tests.parallel.family_check import FAMILY, SIZE, conditions, inputs, member, packs

F64 = torch.float64


@pytest.mark.parametrize("name", FAMILY)
def test_the_output_is_zero_at_the_start_and_every_parameter_learns(name: str) -> None:
    x_t, t, cond = inputs(name, False, F64)
    fresh = Dit(DitConfig(**{**SIZE, **FAMILY[name]})).double()
    assert torch.equal(fresh(x_t, t, cond), torch.zeros_like(x_t))
    model = member(name)
    out = model(x_t, t, cond)
    assert out.shape == x_t.shape and out.std() > 0.1
    out.square().mean().backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    if FAMILY[name].get("dual_depth") == 3:  # text of the last block leads nowhere
        silent = [key for key in silent if not key.startswith("blocks.2.text")]
    assert silent == []


@pytest.mark.parametrize("name", [name for name in FAMILY if packs(name)])
def test_a_pack_equals_its_samples_one_by_one(name: str) -> None:
    model = member(name)
    x_t, t, cond = inputs(name, True, F64)
    outs = model(x_t, t, cond)
    for i, x in enumerate(x_t):
        row = slice(i, i + 1)
        alone = model(x[None], t[row], cond.select(row))[0]
        assert torch.allclose(outs[i], alone, rtol=0, atol=1e-10 * alone.std().item()), i


@pytest.mark.parametrize("name", FAMILY)
def test_rows_of_a_batch_do_not_see_each_other(name: str) -> None:
    model = member(name)
    x_t, t, cond = inputs(name, False, F64)
    both = model(x_t, t, cond)
    row = slice(1, 2)
    alone = model(x_t[row], t[row], cond.select(row))
    assert torch.allclose(both[1:], alone, rtol=0, atol=1e-12 * alone.std().item())


@pytest.mark.parametrize("name", FAMILY)
def test_configurations_survive_plain_values(name: str) -> None:
    config = member(name).config
    assert from_dict(DitConfig, to_dict(config)) == config


JOINT = [name for name in FAMILY if FAMILY[name].get("text_stream") == "joint" and "text_parts" not in FAMILY[name]]


@pytest.mark.parametrize("name", JOINT)
def test_padding_of_joint_text_changes_nothing(name: str) -> None:
    model = member(name)
    x_t, t, cond = inputs(name, False, F64)
    assert cond.text is not None and cond.text_mask is not None
    filled = torch.where(cond.text_mask[..., None], cond.text, 100.0)
    longer = dataclasses.replace(
        cond, text=F.pad(filled, (0, 0, 0, 2), value=-3.0), text_mask=F.pad(cond.text_mask, (0, 2))
    )
    expected = model(x_t, t, cond)
    assert torch.allclose(model(x_t, t, longer), expected, rtol=0, atol=1e-10)
    changed = dataclasses.replace(cond, text=torch.where(cond.text_mask[..., None], cond.text + 1, cond.text))
    assert (model(x_t, t, changed) - expected)[0].abs().max() > 1e-3


def test_two_streams_with_the_same_weights_are_one_stream() -> None:
    """Esser et al. (2024), Sec. 4: a block of two sets of weights is one of one set where both are equal."""
    options: dict[str, Any] = {**SIZE, "text_dim": 5, "text_stream": "joint"}
    single, dual = member("joint"), Dit(DitConfig(**options, dual_depth=3)).double()
    state = {key: value for key, value in single.state_dict().items() if not key.startswith("blocks.")}
    for key, value in single.state_dict().items():
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            state |= {f"blocks.{index}.{side}.{rest}": value for side in ("text", "other")}
    dual.load_state_dict(state)
    args = inputs("joint", False, F64)
    assert torch.allclose(dual(*args), single(*args), rtol=0, atol=1e-12)
    assert all(isinstance(block, DualBlock) for block in dual.blocks)


def test_gradients_of_shared_parts_are_the_sums_over_layers_of_copies() -> None:
    shared = member("all shared")
    options = {key: value for key, value in FAMILY["all shared"].items() if not key.startswith("share_")}
    copied = Dit(DitConfig(**{**SIZE, **options})).double()
    state = {key: value for key, value in shared.state_dict().items() if not key.startswith("shared.")}
    parts = {key: value for key, value in shared.state_dict().items() if key.startswith("shared.")}
    for index in range(3):
        state |= {key.replace("shared", f"blocks.{index}"): value for key, value in parts.items()}
    copied.load_state_dict(state)
    args = inputs("all shared", False, F64)
    outs = [model(*args) for model in (shared, copied)]
    assert torch.allclose(*outs, rtol=0, atol=1e-12)
    for out in outs:
        out.square().sum().backward()
    untied = dict(copied.named_parameters())
    for key, parameter in shared.named_parameters():
        if key.startswith("shared."):
            total = sum(untied[key.replace("shared", f"blocks.{i}")].grad for i in range(3))  # type: ignore[misc]
            assert torch.allclose(parameter.grad, total, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]
    saved = sum(value.numel() for value in parts.values())
    counts = [sum(p.numel() for p in model.parameters()) for model in (shared, copied)]
    assert counts[1] - counts[0] == 2 * saved


def test_experts_that_take_all_tokens_are_a_dense_mixture() -> None:
    module = ExpertChoice(6, 8, num=3, capacity=3.0).double()
    x = torch.randn(2, 5, 6, dtype=F64)
    gates = module.router(x).softmax(-1)
    parts = [F.gelu(x @ module.input[e], approximate="tanh") @ module.out[e] for e in range(3)]
    dense = sum(gates[..., e : e + 1] * parts[e] for e in range(3))
    assert torch.allclose(module(x), dense, rtol=0, atol=1e-6)  # gates are made in float32


def test_experts_take_their_share_of_each_sample_and_follow_the_tokens() -> None:
    module = ExpertChoice(6, 8, num=4, capacity=2.0).double()
    x = torch.randn(2, 8, 6, dtype=F64)
    assert module.tokens_per_expert(8) == 4
    order = torch.randperm(8)
    assert torch.allclose(module(x)[:, order], module(x[:, order]), atol=1e-12)
    assert torch.allclose(module(x)[1:], module(x[1:]), atol=1e-12)  # routed sample by sample
    few = ExpertChoice(6, 8, num=4, capacity=0.5).double()  # one token each: some meet none, and get zeros
    assert (few(x) == 0).all(-1).sum() >= 8


def test_all_tokens_kept_is_the_model_without_dropping() -> None:
    model = member("dropped tokens")
    x_t, t, cond = inputs("dropped tokens", False, F64)
    everything = dataclasses.replace(cond, kept=torch.arange(9).expand(2, -1))
    dense = dataclasses.replace(cond, kept=None)
    assert torch.allclose(model(x_t, t, everything), model(x_t, t, dense), rtol=0, atol=1e-12)
    out = model(x_t, t, cond)
    assert cond.kept is not None
    patches = out.reshape(2, 3, 3, 1, 2, 3, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(2, 9, 12)
    for row in range(2):
        kept = set(cond.kept[row].tolist())
        silent = {i for i in range(9) if (patches[row, i] == 0).all()}
        assert silent == set(range(9)) - kept and len(kept) == 4


def test_times_of_frames_that_are_alike_are_one_time() -> None:
    model = member("joint")
    x_t, t, cond = inputs("joint", False, F64)
    assert torch.allclose(model(x_t, t[:, None].expand(-1, 3), cond), model(x_t, t, cond), rtol=0, atol=1e-12)
    other = model(x_t, torch.stack((t, t, t + 0.1), 1), cond)
    assert (other - model(x_t, t, cond)).abs().max() > 1e-3


def test_known_frames_take_the_place_of_noisy_ones_at_time_zero() -> None:
    model = member("frames in place")
    x_t, t, cond = inputs("frames in place", False, F64)
    assert cond.frames is not None
    expected = model(x_t, t, cond)
    noisy = torch.where(cond.frames.mask, torch.randn_like(x_t), x_t)
    assert torch.equal(model(noisy, t, cond), expected)  # what lies under the mask does not matter
    times = torch.stack((torch.zeros_like(t), t, t), 1)
    clean = torch.where(cond.frames.mask, cond.frames.latents, x_t)
    without = dataclasses.replace(cond, frames=None)
    assert torch.allclose(model(clean, times, without), expected, rtol=0, atol=1e-12)
    nothing = dataclasses.replace(cond, frames=Frames(x_t, torch.zeros_like(cond.frames.mask)))
    assert torch.allclose(model(x_t, t, nothing), model(x_t, t, without), rtol=0, atol=1e-12)


def test_a_partly_known_patch_keeps_its_time() -> None:
    model = member("frames in place")
    x_t, t, cond = inputs("frames in place", False, F64)
    mask = torch.zeros(2, 1, 3, 2, 6, dtype=torch.bool)
    mask[:, :, 0, 0] = True  # the upper row of patches of two
    got = model(x_t, t, dataclasses.replace(cond, frames=Frames(torch.ones_like(x_t), mask)))
    mixed = torch.where(mask, 1.0, x_t)
    assert torch.allclose(got, model(mixed, t, dataclasses.replace(cond, frames=None)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in FAMILY if FAMILY[name].get("text_dim")])
def test_prepared_conditions_give_the_same_bits(name: str) -> None:
    model = member(name).eval()
    x_t, t, cond = inputs(name, False, F64)
    expected = model(x_t, t, cond)
    prepared = model.prepare(cond)
    joint = FAMILY[name].get("text_stream") == "joint"
    assert (prepared.prepared is None) == joint
    assert torch.equal(model(x_t, t, prepared), expected)
    if not joint:
        calls: list[int] = []
        for block in model.blocks:
            block.cross_attention.kv.register_forward_hook(lambda *_: calls.append(1))
        model(x_t, t, prepared)
        assert calls == []
        assert stack([prepared, cond]).prepared is None  # what was made for one batch is not another's
        assert prepared.where(torch.tensor([True, False]), cond).prepared is None


def test_a_wide_head_is_modulated_token_by_token_by_time_and_what_the_blocks_made() -> None:
    model = member("wide head")
    x_t, t, cond = inputs("wide head", False, F64)
    seen: list[torch.Tensor] = []
    model.blocks[-1].register_forward_hook(lambda block, given, tokens: seen.append(tokens))
    out = model(x_t, t, cond)
    head, heads = model.head, 2
    assert head is not None and model.time_embedding is not None
    patches = patchify(x_t, model.config.patch)
    cos, sin = rope_tables(grid_positions((3, 1, 3)), (6, 6, 6), dtype=F64)
    condition = head.projection(F.silu(seen[-1] + model.time_embedding(t)[:, None]))
    x = head.patch_embedding(patches)

    def norm(value: torch.Tensor) -> torch.Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    for block in head.blocks:
        s1, a1, g1, s2, a2, g2 = block.modulation.linear(condition).chunk(6, -1)
        layer = block.attention
        q, k, v = layer.qkv(norm(x) * (1 + a1) + s1).unflatten(-1, (3, heads, 18)).unbind(2)
        q, k = (apply_rope(norm(y) * part.weight, cos, sin) for y, part in ((q, layer.q_norm), (k, layer.k_norm)))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 18**0.5
        x = x + g1 * layer.out(torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2))
        x = x + g2 * block.mlp(norm(x) * (1 + a2) + s2)
    shift, scale = model.final.modulation.linear(condition).chunk(2, -1)
    expected = unpatchify(model.final.linear(norm(x) * (1 + scale) + shift), (3, 1, 3), model.config.patch)
    assert torch.allclose(out, expected, rtol=0, atol=1e-10 * expected.std().item())


def test_a_patch_over_frames_has_the_time_of_its_first_frame() -> None:
    model = Dit(DitConfig(**{**SIZE, "patch": (2, 1, 2)})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    x_t, times = torch.randn(1, 3, 4, 2, 4, dtype=F64), torch.tensor([[0.1, 0.9, 0.7, 0.2]], dtype=F64)
    expected = model(x_t, torch.tensor([[0.1, 0.1, 0.7, 0.7]], dtype=F64))
    assert torch.equal(model(x_t, times), expected)
    assert not torch.allclose(model(x_t, times.flip(1)), expected, atol=1e-3)


def test_numbers_join_the_time_embedding() -> None:
    model = member("numbers")
    x_t, t, cond = inputs("numbers", False, F64)
    assert cond.scalars is not None and model.scalar_embedding is not None and model.time_embedding is not None
    inner = model.time_embedding.forward
    expected = model(x_t, t, cond)
    fps, height = (layer(cond.scalars[:, i].nan_to_num()) for i, layer in enumerate(model.scalar_embedding.embeddings))
    height = height * torch.tensor([[0.0], [1.0]])  # the first row's is unknown
    model.time_embedding.forward = lambda times: inner(times) + fps + height  # type: ignore[method-assign]
    without = dataclasses.replace(cond, scalars=None)
    assert torch.allclose(model(x_t, t, without), expected, rtol=0, atol=1e-9)


def test_unknown_numbers_add_nothing_and_known_ones_count() -> None:
    model = member("numbers")
    x_t, t, cond = inputs("numbers", False, F64)
    unknown = dataclasses.replace(cond, scalars=torch.full((2, 2), torch.nan))
    without = dataclasses.replace(cond, scalars=None)
    assert torch.equal(model(x_t, t, unknown), model(x_t, t, without))
    assert (model(x_t, t, cond) - model(x_t, t, without)).abs().max() > 1e-3


def test_registers_are_dropped_and_none_of_them_is_the_plain_model() -> None:
    plain, model = member("an embedding per block"), member("registers")
    assert plain.registers is None and model(*inputs("registers", False, F64)).shape == (2, 3, 3, 2, 6)
    with torch.no_grad():
        before = model(*inputs("registers", False, F64))
        model.registers += 1.0  # type: ignore[operator]
        assert (model(*inputs("registers", False, F64)) - before).abs().max() > 1e-3


def test_a_tap_is_given_the_projected_tokens_of_the_patches_alone() -> None:
    model = member("registers and joint text")
    args = inputs("registers and joint text", False, F64)
    out = model(*args)
    model.alignment = TokenProjector(24, 5, DenoiserAlignmentConfig(block=2, hidden=6)).double()
    seen: list[torch.Tensor] = []
    inner: list[torch.Tensor] = []
    model.blocks[1].register_forward_hook(lambda block, given, tokens: inner.append(tokens))
    assert torch.equal(out, model(*args, tap=seen.append))
    assert len(seen) == 1 and torch.equal(seen[0], model.alignment(inner[0][:, 4 + 2 :]))  # text, registers, patches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_stream": "joint"}, "text_stream: got joint without text_dim"),
        ({"dual_depth": 1}, "dual_depth: got 1, needed text_stream: joint"),
        ({"text_dim": 5, "text_stream": "joint", "dual_depth": 4}, "at most depth = 3"),
        ({"image_dim": 5}, "image_dim: is read beside text"),
        ({"image_positions": 5}, "image_positions: got a length without"),
        ({"embed_per_block": True, "modulation": "shared"}, "embed_per_block: needs modulation"),
        ({"mixer_depth": 3}, "mixer_depth: got 3, needed fewer"),
        ({"position_base": 4}, "position_base: only of"),
        ({"text_length": 4}, "text_length: got 4 without text_dim"),
        ({"time_features": 5}, "time_features, time_feature_shift: got 5"),
        ({"latent_channels": 30}, "width: got 24 for latent_channels = 30"),
        ({"head": HeadConfig(width=2, depth=1, num_heads=1)}, "head.width: got 2 for latent_channels = 3"),
        ({"head": HeadConfig(width=30, depth=1, num_heads=2), "registers": 1}, "head: cannot be combined"),
        ({"experts": ExpertsConfig(), "share_mlp": True}, "experts: cannot be combined"),
        ({"experts": ExpertsConfig(every=3)}, "experts.every: got 3 for depth = 3, which leaves no block with experts"),
        ({"frame_mask_channels": 4}, "frame_mask_channels: got 4 for frames: none, needed frames: channels, or 1"),
        ({"frames": "times", "frame_mask_channels": 4}, "frame_mask_channels: got 4 for frames: times"),
        ({"scalars": ("fps", "height", "fps")}, "scalars: got fps, height, fps, needed each at most once"),
    ],
)
def test_bad_options_name_the_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DitConfig(**{**SIZE, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadConfig(num_heads=3), "head.num_heads: got 3"),
        (lambda: ExpertsConfig(capacity=9.0), "experts.capacity: got 9.0"),
        (lambda: ExpertsConfig(every=0), "experts.num, experts.every"),
    ],
)
def test_bad_parts_name_the_field(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_labels_and_times_out_of_range_are_refused() -> None:
    model = member("registers")
    x_t, t, cond = inputs("registers", False, F64)
    classes = model.config.num_classes
    with pytest.raises(ValueError, match=rf"label: got {classes}, needed less than model.num_classes = {classes}; the"):
        model(x_t, t, dataclasses.replace(cond, label=torch.tensor([classes, 0])))
    for outside in (500.0, math.nan):
        with pytest.raises(ValueError, match=rf"t: got \[{outside}, 0.5\], needed times in \[0, 1\]"):
            model(x_t, torch.tensor([outside, 0.5]), cond)
    assert torch.isfinite(model(x_t, torch.tensor([-3.4, 3.4], dtype=F64), cond)).all(), "EDM's c_noise"
    wrapped = Parametrized(model, ParametrizationConfig(prediction=EdmPredictionConfig()))
    for outside in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"t: got \[{outside}, 0.5\], needed times in \[0, 1\]"):
            wrapped(x_t, torch.tensor([outside, 0.5], dtype=F64), cond)


def test_conditions_that_do_not_fit_are_refused() -> None:
    model = member("frames in place")
    x_t, t, cond = inputs("frames in place", False, F64)
    assert cond.frames is not None
    wrong = Frames(x_t[:, :2], cond.frames.mask)
    with pytest.raises(ValueError, match="frames: got latents"):
        model(x_t, t, dataclasses.replace(cond, frames=wrong))
    with pytest.raises(ValueError, match="frames: got a mask of 2 channels, needed 1"):
        model(x_t, t, dataclasses.replace(cond, frames=Frames(x_t, cond.frames.mask.repeat(1, 2, 1, 1, 1))))
    with pytest.raises(ValueError, match="built without known latents"):
        member("joint")(x_t, t, Conditioning(frames=cond.frames))
    with pytest.raises(ValueError, match=r"frames: got latents .* and mask"):
        Frames(x_t, x_t[:1])
    with pytest.raises(
        ValueError, match="frames: needed one for a batch of latents, and a tuple of one per sample of several sizes"
    ):
        model(list(x_t), t, cond)
    with pytest.raises(ValueError, match=r"text: got 9 tokens, the model reads at most model.text_length = 6"):
        text = Conditioning(text=torch.zeros(2, 9, 5), text_mask=torch.ones(2, 9, dtype=torch.bool))
        member("dual only")(x_t, t, text)
    with pytest.raises(ValueError, match="scalars: got 1 columns"):
        member("numbers")(x_t, t, Conditioning(scalars=torch.zeros(2, 1)))
    with pytest.raises(ValueError, match="kept: the model drops no tokens"):
        member("joint")(x_t, t, Conditioning(kept=torch.zeros(2, 1, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"t: got \(2, 2\), needed \(2,\) or \(2, 3\)"):
        member("joint")(x_t, torch.rand(2, 2))
    with pytest.raises(ValueError, match="image: got 3 tokens, needed image_positions = 4"):
        member("image")(x_t, t, Conditioning(image=torch.zeros(2, 3, 7)))
    with pytest.raises(ValueError, match="only one of two has"):
        stack([cond, dataclasses.replace(cond, frames=None)])


def test_null_conditions_stand_for_missing_ones() -> None:
    model = member("image")
    x_t, t, _ = inputs("image", False, F64)
    empty = conditions("image", 2, None, F64)
    assert empty.text is not None and empty.text_mask is not None
    masked = Conditioning(text=empty.text, text_mask=torch.zeros_like(empty.text_mask))
    assert torch.allclose(model(x_t, t, masked), model(x_t, t), rtol=0, atol=1e-12)
