"""Features from TorchScript files: the standard Inception and I3D with their own preprocessing, or any other.

A TorchScript file is a program, which torch runs in its own interpreter, without Python. Before it is loaded here, its
SHA-256 is held against the one in the config, where that gives one; pickles of Python objects are refused, and so are
programs that name files or operators that torch does not bring. The hash stands in the name of the features.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.config import ConfigError
from ltd.encoders.frames import FramesConfig, check_clips, in_passes

#: Operators that reach beyond tensors, as a program spells them.
_FORBIDDEN = re.compile(r"\b(?:torch\.(?:from_file|save|load)|ops\.(?!prim\b|aten\b|quantized\b)\w+)")
#: I3D halves time three times and then pools over 2: fewer frames than this leave nothing to pool.
_I3D_FRAMES = 10
_INCEPTION_SIDE, _INCEPTION_BATCH = 299, 32
_SPATIAL_CHANNELS = 7
_PROBE_TOLERANCE = 1e-4
#: What 0..255 is shifted by and divided by: TensorFlow's graph, and what some copies of the file have.
_NORMALISATIONS = (128.0, 127.5)


@dataclass(frozen=True, kw_only=True)
class InceptionFeaturesConfig:
    """The standard Inception-v3 of FID as TorchScript (NVIDIA's inception-2015-12-05.pt)."""

    kind: Literal["inception"] = "inception"
    #: The file.
    path: str
    #: SHA-256 that it must have, in hex; null takes any.
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class I3dFeaturesConfig:
    """The standard I3D of FVD as TorchScript (StyleGAN-V's i3d_torchscript.pt), trained on Kinetics-400."""

    kind: Literal["i3d"] = "i3d"
    #: The file.
    path: str
    #: SHA-256 that it must have, in hex; null takes any.
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkFileConfig:
    """A file that holds a network of any kind, and what it takes and gives."""

    #: The file.
    path: str
    #: Width of its output.
    dim: int
    #: SHA-256 that it must have, in hex; null takes any.
    sha256: str | None = None
    #: What it wants to see.
    frames: FramesConfig = field(default_factory=FramesConfig)

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ConfigError(f"dim: got {self.dim}, needed the width of the network's output")


@dataclass(frozen=True, kw_only=True)
class TorchScriptFeaturesConfig(NetworkFileConfig):
    """Any network that torch.jit.save wrote and that maps one tensor to one of ``(n, dim)``."""

    kind: Literal["torchscript"] = "torchscript"
    #: Further arguments of its forward, by name.
    arguments: dict[str, Any] = field(default_factory=dict)


class TorchScriptFeatures:
    """Output of any TorchScript network.

    Args:
        config: File, width, what it wants to see.
        device: Where it runs.

    Raises:
        ConfigError: If the file is missing, refused or does not load.
    """

    def __init__(self, config: TorchScriptFeaturesConfig, *, device: torch.device | str = "cpu") -> None:
        self._module, digest = load_torchscript(config.path, config.sha256, device)
        self._config, self._device = config, device
        self.name = f"{Path(config.path).name} (TorchScript, sha256 {digest[:12]})"
        self.preprocessing, self.dim = str(config.frames), config.dim

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features of clips.

        Args:
            clips: ``(b, t, h, w, 3)`` uint8.

        Returns:
            ``(b, dim)`` float32 on the CPU.

        Raises:
            ConfigError: If the network takes no such input, or its output has another width.
        """
        return in_passes(clips, self._config.frames, self._run)

    def _run(self, x: Tensor) -> Tensor:
        try:
            output = self._module(x.to(self._device), **self._config.arguments)
        except RuntimeError as error:
            raise ConfigError(
                f"frames: {self.name} fails on {tuple(x.shape)}: {str(error).strip().splitlines()[-1]}"
            ) from error
        return checked_output(output, len(x), self.dim, self.name)


class InceptionFeatures:
    """Inception-v3 before its classifier, with its logits and a spatial map beside them.

    ``outputs`` gives ``features`` (2048, FID and KID), ``logits`` (1008, without the classifier's bias, as the
    Inception score has them) and ``spatial`` (2023: 7 channels of 17 x 17, sFID), as many as are asked for in one pass.
    The file resizes by itself; the layers are fed here with the same resizing, and a probe at loading holds the result
    against the file's own forward.

    Args:
        config: The file.
        device: Where it runs.

    Raises:
        ConfigError: If the file is missing, refused, or not this network.
    """

    def __init__(self, config: InceptionFeaturesConfig, *, device: torch.device | str = "cpu") -> None:
        self._module, digest = load_torchscript(config.path, config.sha256, device)
        self._device = device
        self.name = f"inception-v3 2015-12-05 (TorchScript, sha256 {digest[:12]})"
        parts = dict(self._module.named_modules())
        missing = [name for name in ("layers", "layers.mixed_6.conv", "output") if name not in parts]
        if missing:
            raise ConfigError(f"path: {config.path} is not the Inception of FID: it has no {missing[0]}")
        self._layers = dict(self._module.layers.named_children())
        self._weight = self._module.output.weight.detach().float()  # (classes, dim)
        self.dims = {"features": self._weight.shape[1], "logits": self._weight.shape[0]}
        self.dim = self.dims["features"]
        self._middle, self.dims["spatial"] = self._probe(config.path)
        self.preprocessing = (
            f"the file's own: bilinear to 299x299 without antialiasing, (x-{self._middle:g})/{self._middle:g}; "
            "mean over frames"
        )

    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features of clips.

        Args:
            clips: ``(b, t, h, w, 3)`` uint8.

        Returns:
            ``(b, 2048)`` float32 on the CPU.
        """
        return self.outputs(clips, ("features",))["features"]

    @torch.no_grad()
    def outputs(self, clips: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Compute several outputs in one pass.

        Args:
            clips: ``(b, t, h, w, 3)`` uint8.
            names: Of ``features``, ``logits``, ``spatial``.

        Returns:
            ``(b, dims[name])`` float32 on the CPU by name, mean over frames.

        Raises:
            ValueError: If a name is none of these.
        """
        unknown = sorted(set(names) - set(self.dims))
        if unknown:
            raise ValueError(f"{self.name} has no output {unknown[0]!r}, needed one of {', '.join(self.dims)}")
        raw = FramesConfig(size=None, range="byte")

        def run(x: Tensor) -> Tensor:
            outputs = self._run(x, self._middle)
            return torch.cat([outputs[name] for name in names], dim=1)

        found = in_passes(clips, raw, run, batch=_INCEPTION_BATCH)
        return dict(zip(names, found.split([self.dims[name] for name in names], dim=1), strict=True))

    def _run(self, x: Tensor, middle: float) -> dict[str, Tensor]:
        """Run ``(n, 3, h, w)`` in 0..255 through the layers."""
        x = (_resize_as_tensorflow(x.to(self._device), _INCEPTION_SIDE) - middle) / middle
        spatial = x
        for name, layer in self._layers.items():
            if name == "mixed_6":
                spatial = layer.conv(x)[:, :_SPATIAL_CHANNELS].flatten(1)
            x = layer(x)
        features = x.flatten(1)
        return {"features": features, "logits": F.linear(features, self._weight), "spatial": spatial}

    @torch.no_grad()
    def _probe(self, path: str) -> tuple[float, int]:
        """Hold the layers, fed here, against the file's own forward.

        Returns:
            The middle of its pixels, and the width of the spatial map.
        """
        image = torch.linspace(0, 255, 3 * 40 * 48).view(1, 3, 40, 48).flip(2).round()
        try:
            theirs = self._module(image.to(self._device).to(torch.uint8), return_features=True).flatten(1)
            tried = [(middle, self._run(image, middle)) for middle in _NORMALISATIONS]
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise ConfigError(f"path: {path} is not the Inception of FID: it fails on an image: {last}") from error
        for middle, ours in tried:
            if ours["features"].shape == theirs.shape:
                error_share = float((ours["features"] - theirs).abs().max() / theirs.abs().max())
                if error_share <= _PROBE_TOLERANCE:
                    return middle, ours["spatial"].shape[1]
        raise ConfigError(
            f"path: {path} is not the Inception of FID: its layers, fed with (x-128)/128 at 299x299, do not give what "
            "its forward gives; use kind: torchscript for another network"
        )


class I3dFeatures:
    """I3D's 400 outputs before the softmax: what FVD is computed from.

    Args:
        config: The file.
        device: Where it runs.

    Raises:
        ConfigError: If the file is missing, refused or does not load.
    """

    preprocessing = "the file's own rescale=True to -1..1 and resize=True to 224x224; all frames"
    dim = 400

    def __init__(self, config: I3dFeaturesConfig, *, device: torch.device | str = "cpu") -> None:
        self._module, digest = load_torchscript(config.path, config.sha256, device)
        self._device = device
        self.name = f"i3d kinetics-400 (TorchScript, sha256 {digest[:12]})"

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features of clips.

        Args:
            clips: ``(b, t, h, w, 3)`` uint8, 10 frames or more.

        Returns:
            ``(b, 400)`` float32 on the CPU.

        Raises:
            ValueError: If the clips have fewer frames.
            ConfigError: If the file takes no such input, or its output has another width.
        """
        check_clips(clips)
        if clips.shape[1] < _I3D_FRAMES:
            raise ValueError(f"I3D needs clips of {_I3D_FRAMES} frames or more, got {clips.shape[1]}")
        batch = max(1, 8 * 16 // clips.shape[1])  # frames at 224x224 inside of the network
        return in_passes(clips, FramesConfig(size=None, range="byte", layout="ncthw"), self._run, batch=batch)

    def _run(self, x: Tensor) -> Tensor:
        try:
            output = self._module(x.to(self._device), rescale=True, resize=True, return_features=True)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise ConfigError(f"path: {self.name} is not the I3D of FVD: it fails on clips: {last}") from error
        return checked_output(output, len(x), self.dim, self.name)


def load_torchscript(
    path: str | Path, sha256: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Any, str]:
    """Load a TorchScript file after looking at what it holds.

    Args:
        path: The file.
        sha256: Hash that it must have, in hex; None takes any.
        device: Where its tensors go.

    Returns:
        The frozen module, and the hash.

    Raises:
        ConfigError: If the file is missing, has another hash, is no TorchScript, or names files or foreign operators.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"path: no file {file}; needed a network saved by torch.jit.save")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if sha256 is not None and digest != sha256.lower():
        raise ConfigError(f"sha256: {file} has {digest}, needed {sha256}: it is another file, or it is damaged")
    try:
        with zipfile.ZipFile(file) as archive:
            programs = {name: archive.read(name) for name in archive.namelist() if "/code/" in name}
    except zipfile.BadZipFile as error:
        raise ConfigError(f"path: {file} is no TorchScript file; a pickle is not read") from error
    if not programs:
        raise ConfigError(f"path: {file} holds no program: it is a pickle of weights or objects, which is not read")
    for name, text in programs.items():
        found = _FORBIDDEN.search(text.decode("utf-8", "replace")) if name.endswith(".py") else None
        if found:
            raise ConfigError(f"path: {file} is refused: its program names {found.group()!r}, which reaches out of it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the published files are in no newer format
            module = torch.jit.load(str(file), map_location=device)
    except RuntimeError as error:
        raise ConfigError(f"path: {file} does not load: {str(error).strip().splitlines()[-1]}") from error
    return module.eval(), digest


def checked_output(output: Any, num_inputs: int, dim: int, name: str) -> Tensor:
    """Check a network's output.

    Args:
        output: What it returned; trailing dimensions of 1 are dropped.
        num_inputs: Inputs it was given.
        dim: Width it should have.
        name: What to call it.

    Returns:
        ``(num_inputs, dim)``.

    Raises:
        ConfigError: If the output is something else.
    """
    if isinstance(output, Tensor) and output.dim() >= 2 and output.shape[:2] == (num_inputs, dim):
        flat = output.flatten(1)
        if flat.shape[1] == dim:
            return flat
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ConfigError(f"dim: {name} gives {got} for {num_inputs} inputs, needed ({num_inputs}, {dim})")


def _resize_as_tensorflow(x: Tensor, side: int) -> Tensor:
    """Resize ``(n, 3, h, w)`` as TensorFlow 1 did: bilinear, pixel ``i`` at ``i * h / side``, edges repeated."""
    n, channels, height, width = x.shape
    theta = torch.eye(2, 3, device=x.device, dtype=x.dtype)
    theta[0, 2] = 1 / width - 1 / side
    theta[1, 2] = 1 / height - 1 / side
    grid = F.affine_grid(theta.expand(n, 2, 3), [n, channels, side, side], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
