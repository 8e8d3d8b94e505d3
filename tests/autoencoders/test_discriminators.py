"""Patch discriminators: shapes, views, independence of samples and frames, images as clips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltd.autoencoders.discriminators import DiscriminatorConfig, PatchDiscriminator, build_discriminator
from ltd.config import ConfigError
from ltd.nn.norm import ChannelRMSNorm

KINDS = ("patch2d", "patch3d")
NORMS = ("group", "rms", "none")


def _build(kind: str, **options: Any) -> PatchDiscriminator:
    settings = {"channels": 4, "num_layers": 2, "num_groups": 2, **options}
    model = build_discriminator(DiscriminatorConfig(kind=kind, **settings))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # every weight redrawn, so that none hides behind a one or a zero
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return model.double()


def _video(frames: int = 5, size: tuple[int, int] = (16, 20), batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, *size, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 17])
def test_sizes_of_logits(frames: int) -> None:
    video = _video(frames, (19, 24))
    assert _build("patch2d")(video).shape == (2, 1, frames, 19 // 4 - 2, 24 // 4 - 2)
    for strides in (0, 1, 2):
        expected = -(-frames // 2**strides)  # rounded up
        assert _build("patch3d", time_strides=strides)(video).shape == (2, 1, expected, 2, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_least_size(kind: str) -> None:
    model = _build(kind, num_layers=3)
    assert model(_video(1, (24, 24))).shape == (2, 1, 1, 1, 1)
    for size in ((23, 24), (24, 23)):
        with pytest.raises(ValueError, match=rf"got frames of {size[0]} x {size[1]} pixels.*at least 24 x 24"):
            model(_video(1, size))
    with pytest.raises(ValueError, match=r"video: got shape \(2, 1, 1, 24, 24\), needed \(b, 3, t, h, w\)"):
        model(_video(1, (24, 24))[:, :1])


@pytest.mark.parametrize(("num_layers", "view"), [(1, 16), (2, 34), (3, 70)])
def test_view_of_one_logit(num_layers: int, view: int) -> None:
    model = _build("patch2d", num_layers=num_layers, norm="rms")
    video = _video(1, (112, 112), batch=1).requires_grad_()
    logits = model(video)
    logits[0, 0, 0, logits.shape[3] // 2, logits.shape[4] // 2].backward()
    assert video.grad is not None
    seen = video.grad.abs().sum((0, 1, 2)) > 0
    assert (int(seen.any(0).sum()), int(seen.any(1).sum())) == (view, view)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_samples_do_not_know_each_other(kind: str, norm: str) -> None:
    model = _build(kind, norm=norm).train()
    video = _video(batch=3)
    torch.testing.assert_close(model(video)[1:2], model(video[1:2]), rtol=1e-12, atol=1e-12)
    assert not list(model.buffers())  # no running statistics


@pytest.mark.parametrize("norm", NORMS)
def test_frames_of_patch2d_do_not_know_each_other(norm: str) -> None:
    model, video = _build("patch2d", norm=norm), _video(3)
    logits = model(video)
    for frame in range(3):
        single = model(video[:, :, frame : frame + 1])
        torch.testing.assert_close(logits[:, :, frame : frame + 1], single, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("frames", [2, 5, 8])
def test_a_still_clip_is_judged_as_its_image(norm: str, frames: int) -> None:
    model, image = _build("patch3d", norm=norm), _video(1)
    still = model(image.expand(-1, -1, frames, -1, -1))
    torch.testing.assert_close(still, model(image).expand_as(still), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_patch3d_with_central_taps_only_is_patch2d(norm: str) -> None:
    flat, deep = _build("patch2d", norm=norm), _build("patch3d", norm=norm, time_strides=0)
    weights = dict(flat.named_parameters())
    with torch.no_grad():
        for name, parameter in deep.named_parameters():
            if parameter.ndim == 5:
                parameter.zero_()
                parameter[:, :, 1] = weights[name]
            else:
                parameter.copy_(weights[name])
    video = _video(3)
    torch.testing.assert_close(deep(video), flat(video), rtol=1e-12, atol=1e-12)


def test_patch3d_treats_both_ends_of_a_clip_alike() -> None:
    model = _build("patch3d", time_strides=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 5:
                parameter.copy_((parameter + parameter.flip(2)) / 2)
    video = _video(4)
    torch.testing.assert_close(model(video.flip(2)), model(video).flip(2), rtol=1e-11, atol=1e-12)


def test_patch3d_sees_motion_and_no_more_than_its_view() -> None:
    model, video = _build("patch3d", norm="rms"), _video(33, (12, 12))
    logits = model(video)
    assert (model(video.flip(2)) - logits.flip(2)).abs().max() > 1e-3  # the order of frames matters
    changed = video.clone()
    changed[:, :, 16] += 0.5
    moved = (model(changed) - logits).abs().amax((0, 1, 3, 4)) > 0
    # Kernels of 3 with strides 2, 2, 1, 1 see 1 + 2 + 4 + 8 + 8 = 23 frames, 4 apart: 11 to either side of 4 * i.
    assert [i for i, touched in enumerate(moved.tolist()) if touched] == [i for i in range(9) if abs(4 * i - 16) <= 11]


def test_parts_follow_the_recipe() -> None:
    model = build_discriminator(DiscriminatorConfig(kind="patch2d", channels=8, num_layers=5, num_groups=4))
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [8, 16, 32, 64, 64, 64, 1]
    assert [conv.stride[0] for conv in convs] == [2, 2, 2, 2, 2, 1, 1]
    assert sum(isinstance(module, nn.GroupNorm) for module in model.modules()) == 5
    assert all(module.negative_slope == 0.2 for module in model.modules() if isinstance(module, nn.LeakyReLU))
    assert convs[3].weight.std().item() == pytest.approx(0.02, rel=0.05)
    rms = build_discriminator(DiscriminatorConfig(kind="patch3d", channels=8, norm="rms"))
    assert sum(isinstance(module, ChannelRMSNorm) for module in rms.modules()) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_stands_in_one_decay_group(kind: str) -> None:
    model = _build(kind)
    model(_video()).square().sum().backward()
    groups = model.decay_groups()
    names = [name for name, _ in model.named_parameters()]
    assert sorted(groups["decay"] + groups["no_decay"]) == sorted(names)
    assert all(name.endswith("weight") for name in groups["decay"]) and len(groups["decay"]) == 4  # the convolutions
    for name, parameter in model.named_parameters():
        # A norm of groups takes away what a bias in front of it adds to a whole group, not what it adds to a channel.
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name


def test_half_precision_weights_take_fp32_video() -> None:
    model = _build("patch3d")
    logits = model.bfloat16()(_video().float())
    assert logits.dtype == torch.bfloat16
    reference = model.double()(_video())
    assert (logits.double() - reference).abs().max() < 0.05 * reference.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels: got 0, needed 1 or more"),
        ({"num_layers": 0}, "num_layers: got 0, needed 1 or more"),
        ({"channels": 20}, r"num_groups: got 32, needed a divisor of 2 \* channels = 40"),
        ({"time_kernel": 2}, "time_kernel: got 2, needed an odd number"),
        ({"kind": "patch3d", "time_strides": 4}, "time_strides: got 4, needed 0 to num_layers = 3"),
    ],
)
def test_wrong_settings_name_their_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiscriminatorConfig(**options)
