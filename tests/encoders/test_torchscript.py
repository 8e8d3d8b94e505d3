import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from ltd.config import ConfigError
from ltd.encoders.features import ManyOutputs, build_features
from ltd.encoders.frames import FramesConfig
from ltd.encoders.torchscript import (
    I3dFeaturesConfig,
    InceptionFeaturesConfig,
    TorchScriptFeaturesConfig,
    load_torchscript,
)
from tests.encoders.standins import CLASSES, SIDE, WIDTH, I3d, Inception, save

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def _clips(b: int = 3, t: int = 2, h: int = 20, w: int = 31) -> torch.Tensor:
    return torch.randint(0, 256, (b, t, h, w, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The stand-ins' files, and the plain networks."""
    folder = tmp_path_factory.mktemp("torchscript")
    networks = {"inception": Inception(), "i3d": I3d()}
    return {name: (str(folder / f"{name}.pt"), save(net, folder / f"{name}.pt")) for name, net in networks.items()}


def test_inception_gives_what_its_own_forward_gives(files):
    path, network = files["inception"]
    features, clips = build_features(InceptionFeaturesConfig(path=path)), _clips()
    assert isinstance(features, ManyOutputs)
    assert dict(features.dims) == {"features": WIDTH, "logits": CLASSES, "spatial": 7 * SIDE**2}
    frames = clips.flatten(0, 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        want = network(frames, return_features=True).unflatten(0, (3, 2)).mean(dim=1)
        probabilities = network(frames, no_output_bias=True)
    assert want.std() > 0.1
    assert torch.allclose(features(clips), want, atol=1e-4)
    single = clips[:, :1]
    found = features.outputs(single, ("logits", "features", "spatial"))
    assert torch.equal(found["features"], features(single))
    # the classifier's bias is left out, as the Inception score has it
    assert torch.allclose(found["logits"].softmax(dim=1), probabilities.unflatten(0, (3, 2))[:, 0], atol=1e-5)
    biased = network(frames).unflatten(0, (3, 2))[:, 0]
    assert not torch.allclose(found["logits"].softmax(dim=1), biased, atol=1e-2)


def test_inception_spatial_map_is_seven_channels_of_the_first_branch(files):
    path, network = files["inception"]
    features = build_features(InceptionFeaturesConfig(path=path))
    clips = torch.full((1, 1, 299, 299, 3), 200, dtype=torch.uint8)
    clips[:, :, :100] = 30
    x = (clips[:, 0].permute(0, 3, 1, 2).float() - 128) / 128
    with torch.no_grad():
        want = network.layers.mixed_6.conv(network.layers.conv(x))[:, :7].flatten(1)
    assert torch.allclose(features.outputs(clips, ("spatial",))["spatial"], want, atol=1e-4)
    with pytest.raises(ValueError, match="has no output 'pool', needed one of features, logits, spatial"):
        features.outputs(clips, ("pool",))


def test_inception_of_another_normalisation_is_seen(tmp_path):
    network = save(Inception(middle=127.5), tmp_path / "a.pt")
    features, clips = build_features(InceptionFeaturesConfig(path=str(tmp_path / "a.pt"))), _clips(t=1)
    assert "(x-127.5)/127.5" in features.preprocessing
    with torch.no_grad():
        want = network(clips[:, 0].permute(0, 3, 1, 2), return_features=True)
    assert torch.allclose(features(clips), want, atol=1e-4)
    save(Inception(middle=100.0), tmp_path / "b.pt")
    with pytest.raises(ConfigError, match="is not the Inception of FID: its layers, fed with"):
        build_features(InceptionFeaturesConfig(path=str(tmp_path / "b.pt")))


def test_i3d_gets_floats_of_0_to_255_and_its_three_switches(files):
    path, network = files["i3d"]
    features, clips = build_features(I3dFeaturesConfig(path=path)), _clips(b=9, t=16)
    with torch.no_grad():
        want = network(clips.permute(0, 4, 1, 2, 3).float(), rescale=True, resize=True, return_features=True)
    assert features.dim == 400
    assert torch.allclose(features(clips), want, atol=1e-4)
    with pytest.raises(ValueError, match="I3D needs clips of 10 frames or more, got 9"):
        features(clips[:, :9])
    with pytest.raises(ConfigError, match="has no mixed_6|has no layers"):
        build_features(InceptionFeaturesConfig(path=path))
    with pytest.raises(ConfigError, match="is not the I3D of FVD: it fails on clips"):
        build_features(I3dFeaturesConfig(path=files["inception"][0]))(clips)


class _Clip(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x.mean(dim=[3, 4]).flatten(1) * scale  # (b, t, 3, h, w) -> (b, 3 t)


def test_any_network_of_clips_with_arguments(tmp_path):
    path = tmp_path / "net.pt"
    save(_Clip(), path)
    frames = FramesConfig(size=None, range="signed", layout="ntchw", num_frames=2)
    config = TorchScriptFeaturesConfig(path=str(path), dim=6, frames=frames, arguments={"scale": 3.0})
    clips, features = _clips(t=4), build_features(config)
    want = 3 * (clips[:, [1, 3]].float() / 127.5 - 1).mean(dim=(2, 3)).flatten(1)
    assert torch.allclose(features(clips), want, atol=1e-5)
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:12] in features.name
    with pytest.raises(ConfigError, match=r"gives \(3, 6\) for 3 inputs, needed \(3, 5\)"):
        build_features(TorchScriptFeaturesConfig(path=str(path), dim=5, frames=frames))(clips)
    with pytest.raises(ConfigError, match=r"frames: net.pt .* fails on \(3, 2, 3, 20, 31\)"):
        build_features(TorchScriptFeaturesConfig(path=str(path), dim=6, frames=frames, arguments={"no": 1}))(clips)


class _Reader(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_file("/etc/hostname", False, 1, dtype=torch.uint8)


def test_files_that_are_not_what_they_should_be_are_refused(files, tmp_path):
    path = files["i3d"][0]
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert load_torchscript(path, digest.upper())[1] == digest
    with pytest.raises(ConfigError, match="sha256: .* it is another file, or it is damaged"):
        load_torchscript(path, "0" * 64)
    with pytest.raises(ConfigError, match="path: no file"):
        load_torchscript(tmp_path / "absent.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="holds no program: it is a pickle"):
        load_torchscript(tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("no zip")
    with pytest.raises(ConfigError, match="is no TorchScript file; a pickle is not read"):
        load_torchscript(tmp_path / "text.pt")
    torch.jit.save(torch.jit.script(_Reader()), str(tmp_path / "reader.pt"))
    with pytest.raises(ConfigError, match="is refused: its program names 'torch.from_file'"):
        load_torchscript(tmp_path / "reader.pt")
