import pytest
import torch

from ltd.config import ConfigError, from_dict
from ltd.encoders.features import CaptionFeatures, FeaturesConfig, ManyOutputs, build_features, parse_features
from ltd.encoders.onnx_file import OnnxFeaturesConfig
from ltd.encoders.packaged import PackagedFeaturesConfig
from ltd.encoders.pretrained import TransformersFeaturesConfig
from ltd.encoders.torchscript import I3dFeaturesConfig, InceptionFeaturesConfig


def test_command_lines_name_networks(tmp_path):
    assert parse_features("pixels") == PackagedFeaturesConfig(name="pixels")
    assert parse_features("inception:a/b.pt") == InceptionFeaturesConfig(path="a/b.pt")
    assert parse_features("i3d:/c.pt") == I3dFeaturesConfig(path="/c.pt")
    assert parse_features("transformers:package:x") == TransformersFeaturesConfig(path="package:x")
    (tmp_path / "net.yaml").write_text("kind: onnx\npath: a.onnx\ndim: 7\nframes: {size: 32, mean: [1, 2, 3]}\n")
    found = parse_features(str(tmp_path / "net.yaml"))
    assert isinstance(found, OnnxFeaturesConfig) and found.frames.mean == (1, 2, 3)
    for text in ("fid", "inception:", "inception", "onnx:a.onnx"):
        with pytest.raises(ConfigError, match=f"features: got '{text}', needed efficientnet_lite0, transnetv2"):
            parse_features(text)


def test_kinds_are_told_apart_and_built():
    config = from_dict(FeaturesConfig, {"kind": "packaged", "name": "pixels"})
    features = build_features(config)
    assert features(torch.zeros(2, 3, 16, 16, 3, dtype=torch.uint8)).shape == (2, features.dim)
    assert not isinstance(features, ManyOutputs | CaptionFeatures)
    with pytest.raises(ConfigError, match="kind"):
        from_dict(FeaturesConfig, {"kind": "hub", "path": "x"})
    with pytest.raises(ConfigError, match="path: no file absent.pt; needed a network saved by torch.jit.save"):
        build_features(InceptionFeaturesConfig(path="absent.pt"))
