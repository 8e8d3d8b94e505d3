"""The vision teacher on a tiny random network: right tokens, each frame by itself, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from ltd.config import ConfigError
from ltd.encoders.vision import VisionTeacher, VisionTeacherConfig


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
