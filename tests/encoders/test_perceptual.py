from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ltd.config import ConfigError
from ltd.encoders import package_files
from ltd.encoders.perceptual import StLpipsConfig, VggLpipsConfig, _unit_length, build_perceptual


@pytest.fixture(scope="module")
def network():
    return build_perceptual()


@pytest.fixture(scope="module")
def clip():
    image = pytest.importorskip("skimage.data").astronaut()[100:164, 150:262]
    frame = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1
    return torch.stack((frame, frame.roll(2, dims=2)), dim=1)[None]  # (1, 3, 2, 64, 112)


def test_equals_the_published_implementation(network):
    # Values of stlpips-pytorch 0.0.2, LPIPS(net="alex", variant="shift_tolerant"), on these inputs.
    random = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 40, 56, generator=random) * 2 - 1
    y = torch.rand(2, 3, 40, 56, generator=random) * 2 - 1
    want = torch.tensor([0.04858732, 0.04239907])
    assert torch.allclose(network(x[:, :, None], y[:, :, None]), want, rtol=1e-4)


def test_equal_clips_are_at_zero_and_frames_are_averaged(network, clip):
    assert network(clip, clip).abs().max() == 0
    noisy = clip + 0.2 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    each = torch.stack([network(clip[:, :, k : k + 1], noisy[:, :, k : k + 1]) for k in range(2)])
    assert torch.allclose(network(clip, noisy), each.mean(dim=0), rtol=1e-4)
    assert torch.allclose(network(clip, noisy), network(noisy, clip), rtol=1e-5)
    assert torch.allclose(build_perceptual(StLpipsConfig(max_frames=1))(clip, noisy), each[0], rtol=1e-4)


def test_grows_with_noise_and_blur(network, clip):
    def blurred(sigma: float) -> torch.Tensor:
        taps = torch.exp(-0.5 * (torch.arange(-9, 10) / sigma) ** 2)
        taps = taps / taps.sum()
        frames = F.pad(clip[0].transpose(0, 1), (9, 9, 9, 9), mode="reflect").flatten(0, 1)[:, None]
        frames = F.conv2d(F.conv2d(frames, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
        return frames.view(2, 3, 64, 112).transpose(0, 1)[None]

    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    by_noise = [float(network(clip, clip + sigma * noise)) for sigma in (0.02, 0.05, 0.1, 0.2, 0.4)]
    by_blur = [float(network(clip, blurred(sigma))) for sigma in (0.5, 1.0, 2.0, 3.0)]
    assert by_noise == sorted(by_noise) and by_noise[-1] > 10 * by_noise[0] > 0
    assert by_blur == sorted(by_blur) and by_blur[-1] > 5 * by_blur[0] > 0


def test_gradient_flows_to_the_inputs_only_and_is_right(network, clip):
    x = (clip + 0.1).requires_grad_(True)
    network(x, clip).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    step = 1e-3 * x.grad / x.grad.norm()
    with torch.no_grad():
        change = float(network(x + step, clip) - network(x - step, clip)) / 2
    assert change == pytest.approx(1e-3 * float(x.grad.norm()), rel=0.02)
    dead = torch.zeros(1, 4, 2, 2, requires_grad=True)  # features that ReLU has all cut
    _unit_length(dead).sum().backward()
    assert torch.isfinite(dead.grad).all()


def test_refusals(network, clip, monkeypatch):
    with pytest.raises(ValueError, match="needs two"):
        network(clip, clip[:, :, :1])
    with pytest.raises(ValueError, match="32 x 32 or more, got 16 x 112"):
        network(clip[:, :, :, :16], clip[:, :, :, :16])
    with pytest.raises(ValueError, match="max_frames: got 0"):
        StLpipsConfig(max_frames=0)
    monkeypatch.setattr(package_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="perceptual: needs .*stlpips-pytorch==0.0.2, or the 'eval' extra"):
        build_perceptual()


def _vgg_files(folder: Path) -> tuple[Path, Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Write random weights in torchvision's and lpips' layouts."""
    random = torch.Generator().manual_seed(0)
    plan = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
    weights, place, before = {}, 0, 3
    for width in plan:
        if width == "M":
            place += 1
            continue
        std = (2 / (9 * before)) ** 0.5
        weights[f"features.{place}.weight"] = torch.randn(width, before, 3, 3, generator=random) * std
        weights[f"features.{place}.bias"] = torch.randn(width, generator=random) * 0.1
        place, before = place + 2, width
    weights["classifier.0.weight"] = torch.zeros(2, 2)
    widths = (64, 128, 256, 512, 512)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1, generator=random) for i, w in enumerate(widths)}
    torch.save(weights, folder / "vgg.pth")
    torch.save(heads, folder / "heads.pth")
    return folder / "vgg.pth", folder / "heads.pth", weights, heads


def test_lpips_on_given_vgg_weights_equals_the_formula(tmp_path: Path) -> None:
    backbone, heads_file, weights, heads = _vgg_files(tmp_path)
    network = build_perceptual(VggLpipsConfig(backbone=str(backbone), heads=str(heads_file)))
    assert "vgg16" in network.name
    random = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, 1, 48, 32, generator=random) * 2 - 1 for _ in range(2))

    def features(frames: torch.Tensor) -> list[torch.Tensor]:
        h = (frames - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        found = []
        for layer in range(30):
            if f"features.{layer}.weight" in weights:
                h = F.conv2d(h, weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"], padding=1)
            elif layer in (4, 9, 16, 23):
                h = F.max_pool2d(h, 2, 2)
            else:
                h = F.relu(h)
                if layer in (3, 8, 15, 22, 29):
                    found.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    expected = torch.zeros(2)
    for i, (a, b) in enumerate(zip(features(x[:, :, 0]), features(y[:, :, 0]), strict=True)):
        expected += F.conv2d((a - b).square(), heads[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    torch.testing.assert_close(network(x, y), expected, rtol=1e-4, atol=0)


def test_vgg_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    backbone, heads_file, weights, _ = _vgg_files(tmp_path)
    with pytest.raises(ConfigError, match=r"perceptual\.backbone: no file .*absent\.pth"):
        build_perceptual(VggLpipsConfig(backbone=str(tmp_path / "absent.pth"), heads=str(heads_file)))
    torch.save({**weights, "features.5.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"has \(2,\) for features\.5\.weight, needed \(128, 64, 3, 3\)"):
        build_perceptual(VggLpipsConfig(backbone=str(tmp_path / "other.pth"), heads=str(heads_file)))
    with pytest.raises(ConfigError, match=r"perceptual\.heads: .* has nothing for lin0\.model\.1\.weight"):
        build_perceptual(VggLpipsConfig(backbone=str(backbone), heads=str(backbone)))
    (tmp_path / "text.pth").write_text("no weights")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    for name, why in (("text", r"cannot be read as weights \(UnpicklingError\)"), ("tensor", "holds something else")):
        with pytest.raises(ConfigError, match=rf"perceptual\.backbone: .* {why}.*; needed tensors by name") as caught:
            build_perceptual(VggLpipsConfig(backbone=str(tmp_path / f"{name}.pth"), heads=str(heads_file)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "backbone_field", "heads_field"),
    [("lpips", "lpips.backbone", "lpips.heads"), ("--perceptual", "--perceptual", "--perceptual")],
)
def test_errors_name_the_field_that_asked(
    field: str, backbone_field: str, heads_field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, heads_file, _, _ = _vgg_files(tmp_path)
    absent = str(tmp_path / "absent.pth")
    with pytest.raises(ConfigError, match=f"^{backbone_field}: no file"):
        build_perceptual(VggLpipsConfig(backbone=absent, heads=str(heads_file)), field=field)
    with pytest.raises(ConfigError, match=f"^{backbone_field}: .* has nothing for"):
        build_perceptual(VggLpipsConfig(backbone=str(heads_file), heads=str(heads_file)), field=field)
    with pytest.raises(ConfigError, match=f"^{heads_field}: no file"):
        build_perceptual(VggLpipsConfig(backbone=str(backbone), heads=absent), field=field)
    monkeypatch.setattr(package_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"^{heads_field}: needs the package 'lpips'"):
        build_perceptual(VggLpipsConfig(backbone=str(backbone)), field=field)
    with pytest.raises(ConfigError, match=f"^{field}: needs the package 'stlpips_pytorch'"):
        build_perceptual(StLpipsConfig(), field=field)
