"""What a model that starts from another's weights computes, what the report says, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from ltd import denoisers
from ltd.config import ConfigError
from ltd.denoisers import Conditioning, Dit, DitConfig, Frames, SurgeryConfig, Weights, open_weights, transplant
from ltd.denoisers.config import ExpertsConfig, HeadConfig
from ltd.denoisers.resize import regroup_heads, regroup_pairs, resample_matrix, resize_input, resize_output
from ltd.nn.patch import grid_positions, patchify
from ltd.nn.rope import apply_rope, rope_tables

VARIANTS = [
    {"patch": (1, 2, 2), "text_dim": 5},
    {"patch": (1, 2, 2), "text_dim": 5, "modulation": "shared", "pooled_text": True},
    {"patch": (1, 2, 2), "text_dim": 5, "qk_norm": False, "prediction": "data", "position_embedding": "none"},
]


def weights_of(model):
    return Weights.of(model.state_dict(), model.config)


def inflate(model, accept=(), redraw=(), drop=(), grow_depth=False, time_patch="average", **changes):
    torch.manual_seed(3)
    other = Dit(dataclasses.replace(model.config, **changes)).double()
    options = SurgeryConfig(accept=accept, redraw=redraw, drop=drop, grow_depth=grow_depth, time_patch=time_patch)
    return other, transplant(weights_of(model), other, options)


def assert_same(found, expected, limit=1e-12):
    assert expected.std() >= 0.1
    assert float((found - expected).abs().max().detach()) <= limit


@pytest.mark.parametrize("options", VARIANTS)
def test_with_one_frame_the_inflated_model_equals_the_image_model(options, build, inputs):
    image = build(**options)
    x_t, t, cond = inputs
    one = x_t[:, :, :1]
    video, _ = inflate(image, accept=("position_scale",), position_scale=(0.25, 1.0, 1.0))
    assert torch.equal(video(one, t, cond), image(one, t, cond))
    assert not torch.allclose(video(x_t, t, cond), image(x_t, t, cond), atol=1e-3), "two frames are told apart by t"
    deeper, _ = inflate(image, depth=4, grow_depth=True)
    assert_same(deeper(x_t, t, cond), image(x_t, t, cond), 0.0)
    wider, _ = inflate(image, latent_channels=7)
    more = torch.cat([one, torch.randn_like(one), torch.randn_like(one[:, :1])], dim=1)
    out = wider(more, t, cond)
    assert_same(out[:, :3], image(one, t, cond))
    scaled = more[:, 3:] / t.clamp(min=0.05).reshape(-1, 1, 1, 1, 1)
    assert torch.allclose(out[:, 3:], scaled if options.get("prediction") == "data" else torch.zeros_like(scaled))


@pytest.mark.parametrize("options", VARIANTS)
def test_new_blocks_get_gradients(options, build, inputs):
    deeper, _ = inflate(build(**options), depth=3, grow_depth=True)
    deeper(*inputs).square().sum().backward()
    assert any(p.grad.abs().max() > 0 for p in deeper.blocks[2].parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"experts": ExpertsConfig(num=2, every=2), "depth": 3},
        {"experts": ExpertsConfig(num=2, every=2), "depth": 3, "modulation": "shared"},
        {"text_dim": 5, "text_stream": "joint", "dual_depth": 2, "modulation": "shared"},
        {"share_attention": True, "share_mlp": True},
        {"head": HeadConfig(width=24, depth=1, num_heads=2)},
    ],
)
def test_new_blocks_of_every_kind_change_nothing(options, build, inputs):
    old = build(**options)
    x_t, t, cond = inputs
    cond = cond if old.config.text_dim else None
    dual = {"dual_depth": 5} if old.config.dual_depth else {}
    deeper, report = inflate(old, accept=tuple(dual), depth=5, grow_depth=True, **dual)
    assert_same(deeper(x_t, t, cond), old(x_t, t, cond), 0.0)
    assert report.count("drawn") > 0


@pytest.mark.parametrize("shared", ["share_attention", "share_mlp"])
def test_new_blocks_without_anything_of_their_own_to_zero_are_refused(shared, build):
    old = build(modulation="shared", **{shared: True})
    with pytest.raises(ConfigError, match=f"model.depth: got 3, .*with modulation: shared and {shared} a new block"):
        inflate(old, depth=3, grow_depth=True)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_variances_keep_apart_from_means(before, after, build, inputs):
    """Means of the old channels as they were, no row of an old variance among those of new channels."""
    old = build(learn_sigma=before, patch=(1, 2, 2))
    x_t, t, _ = inputs
    wider, report = inflate(old, latent_channels=6, learn_sigma=after)
    out = wider(torch.cat([x_t, torch.randn_like(x_t)], dim=1), t)
    assert_same(out[:, :3], old(x_t, t))
    assert not out[:, 3:].any()
    rows = wider.final.linear.weight.unflatten(0, (4, -1, 3))
    known = old.final.linear.weight.unflatten(0, (4, -1, 3))
    assert torch.equal(rows[:, 0], known[:, 0]) and not rows[:, 1].any()
    if after:
        assert torch.equal(rows[:, 2], known[:, 1] if before else torch.zeros_like(known[:, 0]))
        assert not rows[:, 3].any()
    said = {"learn_sigma": f"the variance, which nothing reads, is {'written as 0' if after else 'left out'}"}
    assert {c.field: c.effect for c in report.fields if c.field == "learn_sigma"} == (said if before != after else {})
    names = {c.name: c.how for c in report.tensors if c.action == "resized"}
    assert names["final.linear.bias"] == f"{'3 + 3' if before else '3'} -> {'6 + 6' if after else '6'} channels"


def test_the_wide_head_reads_another_patch_and_turns_by_another_split(build, inputs):
    head = HeadConfig(width=36, depth=1, num_heads=3)
    old = build(patch=(1, 2, 4), head=head)
    other, report = inflate(old, patch=(1, 4, 2))
    assert report.count("resized") == 4
    flat = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64).reshape(1, 3, 1, 1, 1)
    before, after = (
        model.head.patch_embedding(patchify(flat.expand(1, 3, 1, size[1], size[2]), size))
        for model, size in ((old, (1, 2, 4)), (other, (1, 4, 2)))
    )
    assert_same(after, before)
    image = build(patch=(1, 1, 1), head=head, rope_split=(0, 6, 6), rope_theta=1e9)
    accept = ("rope_split", "rope_theta")
    video, report = inflate(image, accept, rope_split=(4, 4, 4), rope_theta=1e6)
    x_t, t, _ = inputs
    one = x_t[:, :, :1, :2, :2]
    expected = image(one, t)
    assert float(((video(one, t) - expected).abs().max() / expected.std()).detach()) < 2e-5
    assert report.count("resized") == 3 * 4
    assert "prevents" not in next(c.effect for c in report.fields if c.field == "rope_split")


def test_a_wide_head_whose_split_alone_changes_is_asked_about(build):
    """The default of the blocks written out: theirs is as it was, the head's becomes the same in proportion."""
    head = HeadConfig(width=20, depth=1, num_heads=2)
    old = build(head=head, rope_split=None)
    named = dataclasses.replace(old.config, rope_split=old.config.head_split)
    assert named.wide_head_split != old.config.wide_head_split
    with pytest.raises(ConfigError, match=r"model\.rope_split: got .* it changes the function"):
        transplant(weights_of(old), Dit(named))
    _, report = inflate(old, ("rope_split",), rope_split=named.rope_split)
    assert {c.name for c in report.tensors if c.action == "resized"} == {
        f"head.blocks.0.attention.{name}" for name in ("qkv.weight", "qkv.bias", "q_norm.weight", "k_norm.weight")
    }


@pytest.mark.parametrize("time_patch", ["average", "central"])
@pytest.mark.parametrize("frames", [2, 3, 4])
def test_equal_frames_in_a_patch_give_the_image(time_patch, frames, build, inputs):
    image = build(patch=(1, 2, 2), text_dim=5)
    x_t, t, cond = inputs
    one = x_t[:, :, :1]
    video, report = inflate(image, time_patch=time_patch, patch=(frames, 2, 2))
    assert_same(video(one.expand(-1, -1, frames, -1, -1), t, cond), image(one, t, cond).expand(-1, -1, frames, -1, -1))
    assert "each frame of a patch is the image's" in report.fields[0].effect
    other = torch.cat([one] * frames, dim=2)
    other[:, :, 0] += 1.0  # the first frame is not the middle one
    same = torch.allclose(video(other, t, cond)[:, :, :1], image(one, t, cond), atol=1e-9)
    assert same == (time_patch == "central")


@pytest.mark.parametrize(("before", "after"), [((2, 2), (4, 4)), ((1, 1), (2, 3)), ((2, 4), (3, 5))])
def test_a_larger_patch_sees_an_enlarged_image_as_the_smaller_saw_the_image(before, after, build, inputs):
    image = build(patch=(1, *before), text_dim=5)
    _, t, cond = inputs
    torch.manual_seed(1)
    patches = torch.randn(2, 3, 1, 3, 2, *before, dtype=torch.float64)  # b c t h w ph pw
    matrix = resample_matrix(before, after)
    large = (patches.flatten(-2) @ matrix.T).unflatten(-1, after)
    other, _ = inflate(image, patch=(1, *after))

    def assemble(cells):
        return cells.transpose(-3, -2).reshape(2, 3, 1, 3 * cells.shape[-2], 2 * cells.shape[-1])

    def enlarge(x):
        cells = x.reshape(2, 3, 1, 3, before[0], 2, before[1]).transpose(-3, -2)
        return assemble((cells.flatten(-2) @ matrix.T).unflatten(-1, after))

    small = assemble(patches)
    token = image.patch_embedding(patchify(small, image.config.patch))
    assert torch.allclose(other.patch_embedding(patchify(assemble(large), other.config.patch)), token, atol=1e-12)
    assert_same(other(assemble(large), t, cond), enlarge(image(small, t, cond)), 1e-11)


def test_a_patch_of_another_form_and_as_many_cells_is_resized(build, inputs):
    """No shape tells: latents that are constant everywhere have the same tokens before and after."""
    image = build(patch=(1, 2, 4))
    other, report = inflate(image, patch=(1, 4, 2))
    assert report.count("resized") == 3
    assert report.fields[0].effect.endswith("nearly (least squares), and the output resampled")
    flat = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64).reshape(1, 3, 1, 1, 1)
    before, after = (
        model.patch_embedding(patchify(flat.expand(1, 3, 1, size[1], size[2]), size))
        for model, size in ((image, (1, 2, 4)), (other, (1, 4, 2)))
    )
    assert_same(after, before)


def test_a_smaller_patch_is_the_nearest_and_exact_on_what_it_can_tell(build):
    """Token of the reduced patch: exact for patches out of the reduction's row space, close for smooth ones."""
    torch.manual_seed(0)
    weight = torch.randn(8, 16, dtype=torch.float64)
    matrix = resample_matrix((4, 4), (2, 2))
    resized = resize_input(weight, (1, 4, 4), (1, 2, 2), 1)
    told = torch.randn(5, 4, dtype=torch.float64) @ torch.linalg.pinv(matrix).T  # reduced, it is the 4 numbers
    assert torch.allclose(told @ matrix.T @ resized.T, told @ weight.T, atol=1e-12)
    white = torch.randn(20_000, 16, dtype=torch.float64)

    def miss(w):
        return float((white @ weight.T - white @ matrix.T @ w.T).square().mean())

    best = torch.linalg.lstsq(white @ matrix.T, white @ weight.T).solution.T
    assert miss(resized) <= 1.001 * miss(best)
    assert miss(resized) < 0.9 * miss(weight @ matrix.T)  # simply resampling the weights
    steps = torch.linspace(0, 1, 4, dtype=torch.float64)
    ramp = (1 + 0.5 * steps[:, None] + 0.3 * steps).reshape(1, 16)
    flat = torch.full((1, 16), 3.0, dtype=torch.float64)
    assert torch.allclose(flat @ matrix.T @ resized.T, flat @ weight.T, atol=1e-12)
    small, exact = ramp @ matrix.T @ resized.T, ramp @ weight.T
    assert (small - exact).norm() < 0.15 * exact.norm()


def test_resampling_is_bilinear_and_keeps_constants():
    for before, after in (((2, 2), (4, 4)), ((4, 4), (2, 2)), ((1, 1), (2, 2)), ((2, 3), (3, 2))):
        matrix = resample_matrix(before, after)
        assert torch.allclose(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64))
    assert torch.equal(resample_matrix((2, 2), (1, 2)), torch.tensor([[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]).double())
    ramp = F.interpolate(torch.arange(4.0, dtype=torch.float64).view(1, 1, 2, 2), size=(4, 4), mode="bilinear")
    assert torch.allclose(resample_matrix((2, 2), (4, 4)) @ torch.arange(4.0, dtype=torch.float64), ramp.flatten())


def test_features_keep_their_order_and_new_channels_are_last():
    cells = torch.arange(2 * 1 * 2 * 3, dtype=torch.float64).reshape(2, 1, 2, 3)  # c t h w
    features = patchify(cells[None], (1, 2, 3))[0, 0]
    read = resize_input(features, (1, 2, 3), (2, 2, 3), 3, "central").reshape(2, 2, 3, 3)  # t h w c
    assert torch.equal(read[1, :, :, :2].movedim(-1, 0), cells[:, 0])
    assert not read[0].any() and not read[..., 2].any()
    written = resize_output(features, (1, 2, 3), (2, 2, 3), 3).reshape(2, 2, 3, 3)
    assert torch.equal(written[0], written[1]) and torch.equal(written[0, :, :, :2].movedim(-1, 0), cells[:, 0])


def test_another_split_gives_time_the_lowest_frequencies_and_keeps_the_others():
    before, after, theta = (0, 6, 6), (4, 4, 4), 1000.0
    order = regroup_pairs(before, after)
    assert order == [2, 5, 0, 1, 3, 4]
    assert regroup_pairs(after, after) == list(range(6))
    assert regroup_pairs(after, (8, 2, 2)) == [0, 1, 3, 5, 2, 4]  # its own pairs stay first
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 12, 2, 12, dtype=torch.float64)
    positions = grid_positions((1, 3, 4))
    cos, sin = rope_tables(positions, before, theta=theta, dtype=torch.float64)
    cos[..., [2, 5]], sin[..., [2, 5]] = 1.0, 0.0  # what one frame makes of pairs that belong to time
    tables = rope_tables(positions, after, theta=theta ** (4 / 6), dtype=torch.float64)
    moved = [torch.stack([regroup_heads(v, order, 1) for v in x.reshape(-1, 12)]).view_as(x) for x in (q, k)]

    def scores(a, b, c, s):
        return torch.einsum("bnhd,bmhd->bhnm", apply_rope(a, c, s), apply_rope(b, c, s))

    assert torch.allclose(scores(*moved, *tables), scores(q, k, cos, sin), atol=1e-12)


def test_regrouped_heads_move_in_the_model(build, inputs):
    """A split whose lost pairs turn by nothing: rotations along w start at so low a frequency that only one matters."""
    x_t, t, cond = inputs
    one = x_t[:, :, :1, :2, :2]
    image = build(patch=(1, 1, 1), text_dim=5, rope_split=(0, 6, 6), rope_theta=1e9)
    accept = ("rope_split", "rope_theta")
    video, report = inflate(image, accept, rope_split=(4, 4, 4), rope_theta=1e6)
    assert_same(video(one, t, cond), image(one, t, cond), 2e-5)
    assert {c.effect for c in report.fields if c.field == "rope_split"} == {
        "the lowest frequencies of axes that shrink go to those that grow; with one frame all others are as before"
    }
    assert report.count("resized") == 2 * 4
    _, other = inflate(image, accept, rope_split=(4, 4, 4), rope_theta=1e5)
    assert "rope_theta 1000000 prevents" in next(c.effect for c in other.fields if c.field == "rope_split")


def test_the_report_has_every_tensor_once(build):
    image = build(patch=(1, 2, 2), num_classes=4)
    video, report = inflate(
        image,
        redraw=("text_embedding", "blocks.*.cross_attention", "blocks.*.cross_norm"),
        drop=("label_embedding",),
        grow_depth=True,
        depth=3,
        latent_channels=4,
        patch=(2, 2, 2),
        num_classes=None,
        text_dim=5,
    )
    names = [change.name for change in report.tensors]
    assert Counter(names) == Counter([*video.state_dict(), "label_embedding.table.weight"])
    counts = {action: report.count(action) for action in ("copied", "resized", "drawn", "dropped")}
    old_blocks = sum(name.startswith("blocks.") for name in image.state_dict())
    new_blocks = sum(name.startswith("blocks.") for name in video.state_dict()) - old_blocks
    # copied: time embedding (4), patch bias, final modulation (2) and the old blocks; drawn: text embedding (5).
    assert counts == {"copied": 7 + old_blocks, "resized": 3, "drawn": 5 + new_blocks, "dropped": 1}
    assert report.to_plain()["counts"] == counts
    assert [change.field for change in report.fields] == [
        "latent_channels",
        "patch",
        "depth",
        "text_dim",
        "num_classes",
    ]
    assert report.lines()[0] == "{copied} copied, {resized} resized, {drawn} drawn, {dropped} dropped tensors".format(
        **counts
    )
    for change in report.tensors:
        if change.action == "copied":
            assert torch.equal(video.state_dict()[change.name], image.state_dict()[change.name])


REFUSED = [
    ({"width": 48}, {}, "model.width: got 48, the weights have 24; no rule makes a model wider or narrower"),
    ({"num_heads": 4}, {}, "model.num_heads: got 4, the weights have 2; no rule"),
    ({"mlp_ratio": 8.0}, {}, "model.mlp_ratio: got 8.0, the weights have 4.0; no rule"),
    ({"latent_channels": 2}, {}, "model.latent_channels: got 2, the weights have 3; no rule takes channels away"),
    ({"depth": 1}, {}, "model.depth: got 1, the weights have 2; no rule takes blocks away"),
    ({"depth": 3}, {}, "model.depth: got 3, the weights have 2; set grow_depth"),
    ({"patch": (4, 2, 2)}, {}, "model.patch: got (4, 2, 2), the weights have (2, 2, 2); a patch of several frames"),
    ({"time_scale": 1.0}, {}, "model.time_scale: got 1.0, the weights have 1000.0; it changes the function"),
    ({"prediction": "data"}, {}, "model.prediction: got data, the weights have velocity; it changes the function"),
    ({"rope_theta": 5e4}, {"accept": ("time_scale",)}, "model.rope_theta: got 50000.0"),
    ({"rope_split": (6, 2, 4)}, {}, "model.rope_split: got (6, 2, 4), the weights have (4, 4, 4)"),
    ({"qk_norm": False}, {"accept": ("qk_norm",)}, "blocks.0.attention.q_norm.weight has no place in the model"),
    ({"modulation": "shared"}, {"accept": ("modulation",)}, "modulation.weight is missing in the weights"),
    ({"text_dim": 7}, {}, "text_embedding.norm.weight is (5,) in the weights and (7,) in the model"),
    ({"text_dim": 7}, {"redraw": ("text_embedding.input",)}, "1 tensors without a rule (model.text_dim differs)"),
    ({"text_dim": None}, {}, "has no place in the model (list it in drop"),
    ({"num_classes": 3}, {}, "label_embedding.table.weight is missing in the weights"),
    ({}, {"redraw": ("text_embeding",)}, "redraw: 'text_embeding' names no tensor"),
    ({}, {"drop": ("text_embedding",)}, "drop: 'text_embedding' names no tensor"),
]


@pytest.mark.parametrize(("changes", "options", "message"), REFUSED)
def test_what_has_no_rule_is_refused_and_changes_nothing(changes, options, message, build):
    model = build(patch=(2, 2, 2), text_dim=5)
    other = Dit(dataclasses.replace(model.config, **changes))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ConfigError, match=re.escape(message)):
        transplant(weights_of(model), other, SurgeryConfig(**options))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accept": ("rope_base",)}, "accept: got 'rope_base', needed names out of "),
        ({"accept": ("width",)}, "accept: got 'width', needed names out of "),
        ({"redraw": ("",)}, "redraw: got an empty name"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        SurgeryConfig(**options)


def test_what_is_redrawn_keeps_its_drawn_values_and_accepted_fields_keep_the_weights(build):
    model = build(patch=(1, 2, 2), text_dim=5)
    torch.manual_seed(3)
    drawn = Dit(dataclasses.replace(model.config, text_dim=7)).double().state_dict()
    other, report = inflate(model, accept=("time_scale",), redraw=("text_embedding",), text_dim=7, time_scale=10.0)
    for name, value in other.state_dict().items():
        expected = drawn if name.startswith("text_embedding.") else model.state_dict()
        assert torch.equal(value, expected[name]), name
    assert [change.field for change in report.fields] == ["text_dim", "time_scale"]


@pytest.mark.parametrize("frames", ["channels", "times"])
def test_a_model_that_takes_known_frames_is_the_old_one_without_any(build, frames):
    model = build(text_dim=5)
    other, report = inflate(model, frames=frames, frame_mask_channels=2 if frames == "channels" else 1)
    torch.manual_seed(0)
    x, t = torch.randn(1, 3, 3, 2, 2, dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    assert torch.allclose(other(x, t), model(x, t), rtol=0, atol=1e-12)
    if frames == "channels":
        known = Frames(torch.randn_like(x), torch.ones(1, 2, 3, 2, 2))
        assert torch.allclose(other(x, t, Conditioning(frames=known)), model(x, t), rtol=0, atol=1e-12)
        assert report.count("resized") == 1
        with pytest.raises(ConfigError, match="latent_channels: got 5"):
            inflate(other, latent_channels=5)


def test_half_the_scale_of_positions_is_the_model_at_half_the_positions(build):
    model = build(patch=(1, 1, 1))
    other, _ = inflate(model, accept=("position_scale",), position_scale=(0.5, 0.5, 0.5))
    torch.manual_seed(0)
    x, t = torch.randn(1, 3, 3, 2, 2, dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    found = other(x, t)
    model.shard_tokens = lambda y: y / 2 if y.dtype == torch.float32 else y  # positions, among float64
    assert torch.equal(found, model(x, t))
    with pytest.raises(ConfigError, match="position_scale: got"):
        DitConfig(position_scale=(1.0, 0.0, 1.0))


def test_weights_of_an_exported_folder_are_those_that_load_gives(build, tmp_path):
    model = build(text_dim=5)
    denoisers.save(model.bfloat16(), tmp_path / "export")
    opened = open_weights(tmp_path / "export")
    loaded = denoisers.load(tmp_path / "export")
    assert opened.config == model.config
    assert opened.shapes == {name: tuple(value.shape) for name, value in loaded.state_dict().items()}
    other = Dit(model.config)
    transplant(opened, other)
    assert all(
        p.dtype == torch.float32 and torch.equal(p, loaded.state_dict()[n].float()) for n, p in other.named_parameters()
    )
    assert len(opened.fingerprint) == 64


def test_weights_with_an_image_encoders_tokens_become_those_of_a_model_without(build, inputs):
    """As the header of configs/denoiser/wan_14b_i2v.yaml says: the same function of everything else."""
    x_t, t, cond = inputs
    options = {"text_dim": 5, "cross_norm": "layer", "qk_norm_over": "width"}
    model = build(**options, image_dim=6)
    drop = ("image_embedding", "blocks.*.image_kv", "blocks.*.image_k_norm")
    with pytest.raises(ConfigError, match="image_embedding.* has no place in the model"):
        inflate(model, accept=("image_dim",), image_dim=None)
    other, _ = inflate(model, accept=("image_dim",), drop=drop, image_dim=None)
    assert_same(other(x_t, t, cond), model(x_t, t, cond), 0.0)
