import numpy as np
import pytest
import torch
from PIL import Image

from ltd.config import ConfigError
from ltd.encoders.frames import FramesConfig, in_passes, prepare, spread


def _clips(b: int = 2, t: int = 3, h: int = 30, w: int = 41) -> torch.Tensor:
    return torch.randint(0, 256, (b, t, h, w, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize(("kind", "low", "high"), [("byte", 0, 255), ("unit", 0, 1), ("signed", -1, 1)])
def test_ranges(kind, low, high):
    clips = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2, 1).expand(1, 1, 1, 2, 3)
    plain = prepare(clips, FramesConfig(size=None, range=kind))
    assert plain[0, :, 0].tolist() == [[low, high]] * 3
    scaled = prepare(clips, FramesConfig(size=None, range=kind, mean=(1, 2, 3), std=(2, 4, 5)))
    assert scaled[0, :, 0].tolist() == [
        pytest.approx([(v - m) / s for v in (low, high)]) for m, s in ((1, 2), (2, 4), (3, 5))
    ]


def test_layouts():
    clips = _clips()
    for layout, back in (("nchw", (0, 2, 3, 1)), ("nhwc", (0, 1, 2, 3))):
        x = prepare(clips, FramesConfig(size=None, range="byte", layout=layout)).permute(back)
        assert torch.equal(x, clips.flatten(0, 1).float())
    for layout, back in (("ntchw", (0, 1, 3, 4, 2)), ("ncthw", (0, 2, 3, 4, 1))):
        x = prepare(clips, FramesConfig(size=None, range="byte", layout=layout)).permute(back)
        assert torch.equal(x, clips.float())


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_resizing_is_pillows(resize):
    clips = _clips(1, 1)
    picture = Image.fromarray(clips[0, 0].numpy())
    rule = getattr(Image.Resampling, resize.upper())
    whole = prepare(clips, FramesConfig(size=12, range="byte", resize=resize))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(whole, np.asarray(picture.resize((12, 12), rule)))
    config = FramesConfig(size=12, fit="crop", shorter=16, range="byte", resize=resize)
    crop = prepare(clips, config)[0].permute(1, 2, 0).numpy()
    wide = np.asarray(picture.resize((int(16 * 41 / 30), 16), rule))  # 21 x 16
    assert np.array_equal(crop, wide[2:14, 4:16])
    assert "shorter side to 16, middle 12x12, 0..255, mean over frames" in str(config)


def test_passes_are_bounded_and_change_nothing():
    clips, seen = _clips(5, 4), []

    def colours(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x.mean(dim=(2, 3))

    frames = FramesConfig(size=None, range="byte")
    found = in_passes(clips, frames, colours, batch=3)
    assert seen == [3] * 6 + [2]
    assert torch.allclose(found, clips.float().mean(dim=(1, 2, 3)), atol=1e-4)
    video = FramesConfig(size=None, range="byte", layout="ntchw", num_frames=2)
    found = in_passes(clips, video, lambda x: x.mean(dim=(3, 4)).flatten(1))
    assert torch.allclose(found, clips[:, [1, 3]].float().mean(dim=(2, 3)).flatten(1), atol=1e-4)
    with pytest.raises(ValueError, match="clips of 3 frames: this network needs 4 or more"):
        spread(3, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "size: got 0, needed 1 or more, or null"),
        ({"num_frames": 4}, "num_frames: got 4, needed null for a network of single frames"),
        ({"std": (1.0, 0.0, 1.0)}, "std: got \\[1.0, 0.0, 1.0\\], needed numbers above 0"),
        ({"shorter": 256}, "shorter: got 256, needed at least size, with fit: crop"),
        ({"shorter": 100, "fit": "crop"}, "shorter: got 100, needed at least size"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ConfigError, match=message):
        FramesConfig(**fields)
