import hashlib
from pathlib import Path

import pytest
import torch

from ltd.config import ConfigError
from ltd.encoders.features import build_features
from ltd.encoders.frames import FramesConfig
from ltd.encoders.onnx_file import OnnxFeaturesConfig
from tests.isolation import run_without

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def _write(path: Path, batch: int | str) -> torch.Tensor:
    """Write a network that multiplies the mean colours of ``(n, 3, 8, 8)`` by a matrix; give the matrix."""
    from onnx import TensorProto, helper, numpy_helper

    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["colours"]),
        helper.make_node("Flatten", ["colours"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "matrix"], ["vectors"]),
        helper.make_node("Relu", ["vectors"], ["positive"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 5]) for name in ("vectors", "positive")],
        [numpy_helper.from_array(matrix.numpy(), "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
    onnx.save(model, str(path))
    return matrix


FRAMES = FramesConfig(size=8, resize="bilinear", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.mark.parametrize("batch", ["n", 1, 4])
def test_outputs_are_the_networks_whatever_batch_it_was_exported_for(tmp_path, batch):
    matrix = _write(tmp_path / "net.onnx", batch)
    clips = torch.arange(0, 210, 14).to(torch.uint8).view(5, 1, 1, 1, 3).expand(5, 3, 8, 8, 3).contiguous()
    colours = clips[:, 0, 0, 0].float() / 255  # (5, 3)
    want = (colours - torch.tensor(FRAMES.mean)) / torch.tensor(FRAMES.std) @ matrix
    config = OnnxFeaturesConfig(path=str(tmp_path / "net.onnx"), dim=5, frames=FRAMES)
    features = build_features(config)
    assert torch.allclose(features(clips), want, atol=1e-5)
    positive = OnnxFeaturesConfig(path=config.path, dim=5, frames=FRAMES, output="positive")
    assert torch.allclose(build_features(positive)(clips), want.relu(), atol=1e-5)
    digest = hashlib.sha256((tmp_path / "net.onnx").read_bytes()).hexdigest()
    assert features.name == f"net.onnx:vectors (ONNX, sha256 {digest[:12]})"
    assert "less (0.4, 0.5, 0.6), over (0.2, 0.3, 0.4)" in features.preprocessing


def test_mistakes_are_told(tmp_path):
    path = str(tmp_path / "net.onnx")
    _write(tmp_path / "net.onnx", "n")
    clips = torch.zeros(2, 1, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="path: no file"):
        build_features(OnnxFeaturesConfig(path="absent.onnx", dim=5))
    with pytest.raises(ConfigError, match="sha256: .* it is another file, or it is damaged"):
        build_features(OnnxFeaturesConfig(path=path, dim=5, sha256="0" * 64))
    with pytest.raises(ConfigError, match="output: .* has no 'pool', needed one of vectors, positive"):
        build_features(OnnxFeaturesConfig(path=path, dim=5, output="pool"))
    with pytest.raises(ConfigError, match=r"dim: net.onnx.* gives \(2, 5\) for 2 inputs, needed \(2, 7\)"):
        build_features(OnnxFeaturesConfig(path=path, dim=7, frames=FRAMES))(clips)
    with pytest.raises(ConfigError, match=r"frames: net.onnx.* fails on \(2, 3, 9, 9\)"):
        build_features(OnnxFeaturesConfig(path=path, dim=5, frames=FramesConfig(size=9)))(clips)
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(ConfigError, match="does not load as ONNX"):
        build_features(OnnxFeaturesConfig(path=str(tmp_path / "text.onnx"), dim=5))


def test_a_missing_package_is_told():
    code = (
        "from ltd.encoders.features import build_features\n"
        "from ltd.encoders.onnx_file import OnnxFeaturesConfig\n"
        "build_features(OnnxFeaturesConfig(path='a.onnx', dim=1))"
    )
    done = run_without(("onnxruntime",), code)
    assert "'onnx' needs the package onnxruntime; install the 'onnx' extra of ltd" in done.stderr
