"""Features from ONNX files, run by onnxruntime."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.encoders.frames import in_passes
from ltd.encoders.torchscript import NetworkFileConfig, checked_output


@dataclass(frozen=True, kw_only=True)
class OnnxFeaturesConfig(NetworkFileConfig):
    """An ONNX network with one input and an output of ``(n, dim)``."""

    kind: Literal["onnx"] = "onnx"
    #: Name of the output; null for the first.
    output: str | None = None


class OnnxFeatures:
    """Output of an ONNX network.

    Args:
        config: File, width, what it wants to see.
        device: Where it runs; a CUDA device needs onnxruntime-gpu.

    Raises:
        ConfigError: If onnxruntime or the file is missing, or the file does not load or has no such output.
    """

    def __init__(self, config: OnnxFeaturesConfig, *, device: torch.device | str = "cpu") -> None:
        self._config = config
        self._session, digest = _open(config, torch.device(device))
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ConfigError(f"path: {config.path} has {len(inputs)} inputs, needed one, the frames")
        self._input = inputs[0].name
        outputs = [output.name for output in self._session.get_outputs()]
        if config.output is not None and config.output not in outputs:
            raise ConfigError(f"output: {config.path} has no {config.output!r}, needed one of {', '.join(outputs)}")
        self._output = config.output or outputs[0]
        fixed = inputs[0].shape[0]
        #: Inputs that each pass must have; None where the file leaves that open.
        self._batch = fixed if isinstance(fixed, int) else None
        self.name = f"{Path(config.path).name}:{self._output} (ONNX, sha256 {digest[:12]})"
        self.preprocessing, self.dim = str(config.frames), config.dim

    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features of clips.

        Args:
            clips: ``(b, t, h, w, 3)`` uint8.

        Returns:
            ``(b, dim)`` float32 on the CPU.

        Raises:
            ConfigError: If the network takes no such input, or its output has another width.
        """
        return in_passes(clips, self._config.frames, self._run, batch=self._batch)

    def _run(self, x: Tensor) -> Tensor:
        count = len(x)
        if self._batch is not None and count < self._batch:  # the last pass
            x = torch.cat((x, x[-1:].expand(self._batch - count, *x.shape[1:])))
        try:
            (found,) = self._session.run([self._output], {self._input: x.contiguous().numpy()})
        except Exception as error:  # onnxruntime's errors share no public base class
            last = str(error).strip().splitlines()[-1]
            raise ConfigError(f"frames: {self.name} fails on {tuple(x.shape)}: {last}") from error
        return checked_output(torch.from_numpy(found), len(x), self.dim, self.name)[:count]


def _open(config: OnnxFeaturesConfig, device: torch.device) -> tuple[Any, str]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError("kind: 'onnx' needs the package onnxruntime; install the 'onnx' extra of ltd") from error
    file = Path(config.path).expanduser()
    if not file.is_file():
        raise ConfigError(f"path: no file {file}; needed an ONNX network")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if config.sha256 is not None and digest != config.sha256.lower():
        raise ConfigError(f"sha256: {file} has {digest}, needed {config.sha256}: it is another file, or it is damaged")
    wanted = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise ConfigError("kind: 'onnx' on a CUDA device needs the package onnxruntime-gpu; or take the CPU")
    try:
        return onnxruntime.InferenceSession(str(file), providers=[wanted]), digest
    except Exception as error:  # onnxruntime's errors share no public base class
        raise ConfigError(f"path: {file} does not load as ONNX: {str(error).strip().splitlines()[-1]}") from error
