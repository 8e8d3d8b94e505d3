"""Find files that an installed package ships, without importing the package.

Weights are read with ``weights_only=True`` or safetensors and put into layers of this project, so that no code of the
package runs: one of them reseeds every random generator when it is constructed, another needs torchvision.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ltd.config import ConfigError


def package_directory(name: str, *, field: str, pip_name: str | None = None, extra: str | None = None) -> Path:
    """Locate the folder of an installed package.

    Args:
        name: Import name of the package.
        field: Config field or argument that asked for it, for the message.
        pip_name: What pip calls it; the import name with dashes when None.
        extra: Extra of this project that brings it, if one does.

    Returns:
        The package's folder.

    Raises:
        ConfigError: If the package is not installed; says how to install it.
    """
    if not name.replace("_", "a").isalnum():
        raise ConfigError(f"{field}: package:{name}, needed the import name of one package, without dots or dashes")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pip_name = pip_name or name.replace("_", "-")
        install = f"pip install --no-deps {pip_name}"
        if extra:
            install += f", or the '{extra}' extra of ltd"
        raise ConfigError(f"{field}: needs the package {name!r}, which is not installed; {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def read_weights(path: Path, *, field: str) -> dict[str, Tensor]:
    """Read a state dict saved by ``torch.save``, without unpickling code.

    Args:
        path: File of tensors by name.
        field: Config field or argument that asked for it, for the message.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ConfigError: If the file is absent, as when the package's layout changed.
    """
    if not path.is_file():
        raise ConfigError(f"{field}: no {path.name} in {path.parent}; the package's layout is not the one known here")
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def load_frozen(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give a network (made on any device, also meta) its weights, every one of them, and freeze it.

    Args:
        network: Network whose state dict has exactly the names in ``tensors``.
        tensors: Weights by name; floating ones become float32.

    Returns:
        The same network, in eval mode, without gradients for its parameters.
    """
    floats = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    network.load_state_dict(floats, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def hash_files(paths: list[Path], *facts: object) -> str:
    """Hash files by name and content, and any facts beside them.

    Args:
        paths: Files; the order does not matter.
        facts: Whatever else decides the result, by its ``str``.

    Returns:
        SHA-256 in hex.
    """
    total = hashlib.sha256("/".join(str(fact) for fact in facts).encode())
    for path in sorted(paths, key=lambda p: p.name):
        with path.open("rb") as file:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
