import pytest
import torch
import torch.nn.functional as F

from ltd.encoders.flow import DenseFlow
from ltd.evaluation.motion import MotionStatistics, WarpingError
from tests.isolation import run_without

pytest.importorskip("cv2")


def _moving(flicker: int = 0, frames: int = 4) -> torch.Tensor:
    """A window that moves by 2 right and 1 down over a smooth random picture: uint8 ``(1, t, 64, 64, 3)``."""
    noise = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    picture = F.interpolate(noise, size=(96, 96), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0) * 200 + 25
    cuts = [picture[10 + k : 74 + k, 10 + 2 * k : 74 + 2 * k] + flicker * (-1) ** k for k in range(frames)]
    return torch.stack(cuts).round().clamp(0, 255).to(torch.uint8)[None]


def test_translation_is_found_with_its_sign_and_order():
    forward, backward = DenseFlow()(_moving())
    assert forward.shape == backward.shape == (1, 3, 64, 64, 2)
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    assert forward[inner].flatten(0, -2).median(dim=0).values.tolist() == pytest.approx([-2, -1], abs=0.1)
    assert backward[inner].flatten(0, -2).median(dim=0).values.tolist() == pytest.approx([2, 1], abs=0.1)


def test_warping_error_grows_with_flicker_and_not_with_motion():
    errors = []
    for flicker in (0, 3, 10):
        clips, metric = _moving(flicker), WarpingError()
        metric.update(clips, *DenseFlow()(clips))
        assert metric.visible_share > 0.8
        errors.append(metric.value)
    assert errors[0] < 2e-5
    assert errors[1] == pytest.approx((6 / 255) ** 2, rel=0.1) and errors[2] == pytest.approx((20 / 255) ** 2, rel=0.1)
    motion = MotionStatistics()
    motion.update(_moving(), DenseFlow()(_moving())[0])
    assert motion.magnitude == pytest.approx(5**0.5, rel=0.05) and motion.dynamic_degree == 1


def test_refusals():
    with pytest.raises(ValueError, match="flow needs 2 frames of 16 x 16 or more, got 4 of 64 x 12"):
        DenseFlow()(_moving()[:, :, :, :12])
    with pytest.raises(ValueError, match="got 1 of 64 x 64"):
        DenseFlow()(_moving()[:, :1])
    done = run_without(("cv2",), "from ltd.encoders.flow import DenseFlow\nDenseFlow()")
    assert "flow: needs the package opencv-python; install the 'eval' extra of ltd" in done.stderr
