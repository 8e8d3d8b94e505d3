"""Weights and configurations to and from public layouts. Knows nothing of training, data or processes."""

from ltd.interop.denoisers import LAYOUTS, export_denoiser, import_denoiser
from ltd.interop.folders import export_autoencoder, import_autoencoder
from ltd.interop.pipeline import export_pipeline

__all__ = [
    "LAYOUTS",
    "export_autoencoder",
    "export_denoiser",
    "export_pipeline",
    "import_autoencoder",
    "import_denoiser",
]
