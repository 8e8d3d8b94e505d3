import math

import pytest
import torch

from ltd.evaluation.motion import MotionStatistics, WarpingError, visible, warp


def _picture(height: int = 64, width: int = 64) -> torch.Tensor:
    """A smooth picture ``(h, w, 3)`` in 60..190, larger than a frame."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    waves = [torch.sin(x / a + c) * torch.cos(y / b - c) for a, b, c in ((5, 7, 0), (9, 4, 1), (6, 11, 2))]
    return 125 + 65 * torch.stack(waves, dim=-1)


def _clip(step: tuple[int, int] = (2, 1), frames: int = 4, flicker: float = 0.0, side: int = 32) -> torch.Tensor:
    """A window that moves over the picture, brighter and darker in turn: ``(1, t, side, side, 3)``."""
    picture = _picture()
    cuts = [
        picture[8 + k * step[1] : 8 + k * step[1] + side, 8 + k * step[0] : 8 + k * step[0] + side]
        + flicker * (-1) ** k
        for k in range(frames)
    ]
    return torch.stack(cuts)[None]


def _flow(step: tuple[int, int] = (2, 1), frames: int = 4, side: int = 32) -> torch.Tensor:
    """Where pixels go when the window moves: the other way."""
    return -torch.tensor(step, dtype=torch.float64).expand(1, frames - 1, side, side, 2)


def test_warp_is_bilinear_and_knows_the_edge():
    frame = torch.arange(12.0).view(1, 3, 4, 1)
    moved, inside = warp(frame, torch.tensor([1.0, 0.0]).expand(1, 3, 4, 2))
    assert moved[0, :, :3, 0].tolist() == frame[0, :, 1:, 0].tolist()  # x comes first
    assert inside[0].tolist() == [[True, True, True, False]] * 3
    moved, inside = warp(frame, torch.tensor([0.25, 0.5]).expand(1, 3, 4, 2))
    assert moved[0, 0, 0, 0] == pytest.approx(0 + 0.25 + 0.5 * 4)
    assert inside[0, 2].tolist() == [False] * 4
    same, inside = warp(frame, torch.zeros(1, 3, 4, 2))
    assert torch.equal(same, frame.double()) and inside.all()


def test_translation_has_no_error_and_flicker_has_its_square():
    errors = []
    for flicker in (0.0, 2.0, 4.0):
        metric = WarpingError()
        metric.update(_clip(flicker=flicker), _flow(), -_flow())
        errors.append(metric.value)
        assert metric.visible_share == pytest.approx(30 * 31 / 32**2)  # what stays in the frame
    assert errors[0] == pytest.approx(0, abs=1e-20)
    assert errors[1:] == pytest.approx([(4 / 255) ** 2, (8 / 255) ** 2], rel=1e-9)  # brightness jumps by twice that
    wrong = WarpingError()
    wrong.update(_clip(), -_flow(), _flow())  # the flow of the other direction does not explain the change
    assert wrong.value > 100 * errors[0] + 1e-3


def test_occlusions_and_motion_boundaries_are_left_out():
    flow = torch.zeros(1, 16, 16, 2)
    flow[:, :, 8:, 0] = 4.0  # the right half moves to the right
    back = -flow
    seen = visible(flow, back)[0]
    assert not seen[:, 7].any()  # the gradient at the boundary
    assert seen[:, :7].all()
    assert not seen[:, 12:].any()  # beyond the frame
    assert seen[4, 8:12].all()
    contradicted = visible(flow, torch.zeros_like(flow))[0]
    assert not contradicted[:, 8:].any() and contradicted[:, :7].all()
    # 0.5 squared pixels and 1 % of the squared lengths are allowed
    steady = torch.zeros(1, 8, 8, 2)
    for off, allowed in ((0.70, True), (0.72, False)):
        assert bool(visible(steady, steady + torch.tensor([off, 0.0])).all()) is allowed


def test_a_spoiled_hidden_pixel_does_not_count():
    clip, flow = _clip(frames=2), _flow(frames=2)
    clip[0, 1, :, -1] = 0  # seen in the first frame nowhere: the window moves right, content left
    clip[0, 0, :, 0] = 255  # leaves the frame
    metric = WarpingError()
    metric.update(clip, flow, -flow)
    assert metric.value < 0.1
    spoiled = clip.clone()
    spoiled[0, 0, :, :2], spoiled[0, 0, :1] = 0, 0
    again = WarpingError()
    again.update(spoiled, flow, -flow)
    assert again.value == pytest.approx(metric.value, rel=1e-12)


def test_motion_statistics_of_known_motion():
    metric = MotionStatistics()
    metric.update(_clip((3, 4)), _flow((3, 4)))
    assert metric.magnitude == pytest.approx(5)
    assert metric.dynamic_degree == 1
    still = MotionStatistics()
    still.update(_clip((0, 0), flicker=3.0), _flow((0, 0)))
    assert (still.magnitude, still.dynamic_degree) == (0, 0)
    assert still.flicker == pytest.approx(6 / 255)
    # in frames of 32 pixels the threshold is 6 * 32 / 256 = 0.75 pixels, of the largest 5 % (51 of 1024 pixels)
    for length, pixels, dynamic in ((0.74, 51, 0), (0.76, 51, 1), (0.76, 40, 0), (0.99, 40, 1)):
        flow = torch.zeros(1, 7, 32, 32, 2)
        flow.view(1, 7, -1, 2)[:, :2, :pixels, 1] = length  # 2 pairs of 8 frames: a quarter
        for pairs, expected in ((2, dynamic), (1, 0)):
            flow[:, pairs:] = 0
            metric = MotionStatistics()
            metric.update(torch.zeros(1, 8, 32, 32, 3), flow)
            assert metric.dynamic_degree == expected, (length, pixels, pairs)


@pytest.mark.parametrize("kind", [WarpingError, MotionStatistics])
def test_merged_shards_equal_the_whole(kind):
    clips = torch.cat([_clip(flicker=f) for f in (0.0, 1.0, 5.0)])
    flow = _flow().expand(3, -1, -1, -1, -1)
    flows = (flow, -flow) if kind is WarpingError else (flow,)
    whole, merged = kind(), kind()
    whole.update(clips, *flows)
    for part in (slice(0, 1), slice(1, 3)):
        shard = kind()
        shard.update(clips[part], *(f[part] for f in flows))
        merged.merge(shard.state())
    assert merged.state() == pytest.approx(whole.state(), rel=1e-12)
    assert merged.num_clips == 3


def test_clips_that_cannot_be_followed_and_refusals():
    clip, flow = _clip(), _flow()
    metric = WarpingError()
    metric.update(clip, flow, flow)  # forward and backward contradict each other
    assert (metric.num_clips, metric.num_followed, metric.visible_share) == (1, 0, 0)
    with pytest.raises(ValueError, match="no pixel of 1 clips can be followed to the next frame"):
        _ = metric.value
    metric.update(clip + 0, flow, -flow)
    assert metric.value == pytest.approx(0, abs=1e-20) and metric.num_followed == 1
    with pytest.raises(ValueError, match="nothing was counted yet"):
        _ = WarpingError().value
    with pytest.raises(ValueError, match=r"flow: got \(1, 2, 32, 32, 2\), needed \(1, 3, 32, 32, 2\)"):
        metric.update(clip, flow[:, 1:], -flow)
    with pytest.raises(ValueError, match=r"2 frames or more, got \(1, 1, 32, 32, 3\)"):
        metric.update(clip[:, :1], flow, -flow)
    with pytest.raises(ValueError, match="flow: NaN or infinity in clips 0 of this batch"):
        MotionStatistics().update(clip, flow * math.nan)
